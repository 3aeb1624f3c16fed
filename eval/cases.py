"""Cases: what a suite asks about, and the truth about it. Reading a case needs no model.

Real scans are listed in `scans.tsv`, whose truth was written from looking at them. Labels are (X, Y, Z) in the scan's own space.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_recipes import Synthetic, describe
from data_recipes.phantom import record_volume
from data_recipes.recipe import generator
from data_recipes.synthetic import CHOOSING_MAPS
from data_recipes.wording import Voice
from omnimri.anatomy import STRUCTURES
from omnimri.answer import fill_slots, lesion_measures
from omnimri.example import Record
from omnimri.io import open_study, study_of
from omnimri.lesions import Lesion
from omnimri.measure import measure, right_of_midline, side_of
from omnimri.volume import KSpace, Study, Volume

SCANS = Path(__file__).parent / "scans.tsv"
SUITES = ("synthetic", "mni", "colin", "freesurfer", "individuals", "brats", "refused")
SYNTHETIC_SEED = 500
TUMOUR = {"FLAIR": (1, 2, 3, 4), "T1w-Gd": (1, 3, 4)}
"""Classes of BRATS 2013 that the lesion of a contrast is made of: all of it, or its core."""
GREY = [s.label for s in STRUCTURES if s.tissue == "gm"]
WHITE = [s.label for s in STRUCTURES if s.tissue == "wm"]
"""White matter and brain-stem."""
FREESURFER_PARTIAL = (24,)
"""CSF: aseg draws the fluid around the third ventricle, a millilitre, and leaves that around the brain unlabelled."""


@dataclass(frozen=True)
class Truth:
    """What is known of a case; None where nobody said."""

    sequence: str | None = None
    plane: str | None = None
    lesion: bool | None = None
    side: str | None = None
    lobes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    """Structures, FreeSurfer numbers."""
    partial: tuple[int, ...] = ()
    """Of these the ones that are drawn only in part."""
    grey: np.ndarray | None = None
    white: np.ndarray | None = None
    brain: np.ndarray | None = None
    lesions: np.ndarray | None = None
    ignored: np.ndarray | None = None
    """Where nobody can say whether a lesion is."""
    report: str | None = None
    image: np.ndarray | None = None
    """(S, H, W) magnitude that k-space was made of."""


@dataclass(frozen=True)
class Case:
    """One study of a suite, read when it is asked for."""

    name: str
    suite: str
    patient: str
    source: Any = field(repr=False)
    """What `open_case` reads."""


def open_case(case: Case) -> tuple[Study, Truth]:
    """The study and what is true of it.

    Raises:
        ValueError: it cannot be read, or truth and scan have not one geometry.
    """
    return case.source()


def to_structures(labels: np.ndarray) -> np.ndarray:
    """FreeSurfer aparc+aseg numbers -> the structures that are segmented."""
    table = {31: 4, 63: 43}
    out = labels.astype(np.int32).copy()
    out[(labels >= 11000) & (labels < 12000)] = 3
    out[(labels >= 12000) & (labels < 13000)] = 42
    for a, b in table.items():
        out[labels == a] = b
    # Corpus callosum and hypointensities belong to the nearer white matter.
    loose = np.argwhere(np.isin(labels, [251, 252, 253, 254, 255, 77]))
    if len(loose):
        from scipy import ndimage

        white = np.isin(out, [2, 41])
        index = ndimage.distance_transform_edt(~white, return_distances=False, return_indices=True)
        out[tuple(loose.T)] = out[tuple(index[:, loose[:, 0], loose[:, 1], loose[:, 2]])]
    out[~np.isin(out, [s.label for s in STRUCTURES])] = 0
    return out


def load_any(path: Path) -> tuple[Study, np.ndarray]:
    """A study from a file, and its array.

    Raises:
        ValueError: it cannot be read.
    """
    study = open_study(path)
    return study, study.primary.voxels[0].numpy()


def load_mask(path: Path, study: Study) -> np.ndarray:
    """A label map that must have the scan's geometry.

    Raises:
        ValueError: it has another shape or affine.
    """
    other, array = load_any(path)
    if array.shape != tuple(study.primary.shape) or not torch.allclose(other.primary.affine, study.primary.affine, atol=1e-2):
        raise ValueError(
            f"expected the truth {path.name} on the scan's own lattice {tuple(study.primary.shape)}, got {array.shape} or another affine"
        )
    return array


def template() -> tuple[Study, Truth]:
    """The MNI152 2009 template that nilearn carries, with its tissue maps at one half."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image = load_mni152_template(resolution=1)
    study = study_of(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine), oriented=True)
    grey, white = (np.asarray(load(resolution=1).dataobj) > 0.5 for load in (load_mni152_gm_template, load_mni152_wm_template))
    return study, Truth(grey=grey, white=white)


def _scan(row: dict[str, str], folders: Sequence[Path]) -> tuple[Study, Truth]:
    told = Truth(
        row["sequence"],
        row["plane"],
        {"yes": True, "no": False}.get(row["lesion"]),
        row["side"] or None,
        tuple(filter(None, row["lobes"].split(","))),
    )
    if row["path"] == "nilearn:":
        study, known = template()
        return study, replace(told, grey=known.grey, white=known.white)
    study, _ = load_any(_find(row["path"], folders))
    if row["truth"]:
        array = load_mask(_find(row["truth"], folders), study)
        if row["suite"] == "brats":
            told = replace(told, lesions=np.isin(array, TUMOUR[row["sequence"]]))
        elif row["suite"] == "colin":
            told = replace(told, brain=array > 0)
        else:
            told = replace(told, labels=to_structures(array), partial=FREESURFER_PARTIAL)
    return study, told


def _find(path: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / path).exists():
            return folder / path
    raise ValueError(f"expected {path} in one of the folders of --scans, got none there")


def written(voice: Voice, record: Record, lesions: Sequence[Lesion], volume: Volume) -> str:
    """The whole report that rules write of a record with masks: a terse reference would call true sentences unsupported."""
    told = describe.report(voice, describe.facts_of(record), terse=0.0)
    measures = [lesion_measures(x, volume.shape[2]) for x in lesions]
    return fill_slots(told, measures, SimpleNamespace(volume=volume), lesions)  # type: ignore[arg-type]


def _synthetic(recipe: Synthetic, index: int) -> tuple[Study, Truth]:
    record = recipe.record(SYNTHETIC_SEED, index)
    assert record.labels is not None
    assert record.lesions is not None
    volume = replace(record_volume(record), sequence="unknown")
    table = torch.tensor([0, *(s.label for s in STRUCTURES)])
    labels, lesions = (x.permute(2, 1, 0).contiguous() for x in (table[record.labels.long()], record.lesions))
    places = record.lesion_places or ()
    true = []
    for rank, place in enumerate(places, 1):
        # As of a finding: what lies on both sides has neither, whatever structure most of it is in.
        side = side_of(right_of_midline(torch.nonzero(lesions == rank), labels, volume.affine))
        true.append(Lesion(rank, side, place, measure(lesions == rank, volume, slice_axis=2), 1.0, 1.0))
    report = written(Voice(generator(SYNTHETIC_SEED, "reference", index), wide=True), record, true, volume)
    lobe = (record.lesion_lobes or ("",))[0] if places else ""
    kspace = image = None
    if record.kspace:
        kspace = KSpace(record.kspace["kspace"][None], record.kspace["mask"], torch.eye(4, dtype=torch.float64))
        image = record.kspace["image"][None].numpy()
    truth = Truth(
        record.sequence,
        record.plane,
        bool(places),
        true[0].side if true else None,
        (lobe.split()[1],) if lobe else (),
        labels=labels.numpy(),
        lesions=((lesions > 0) & (lesions < 255)).numpy(),
        ignored=(lesions == 255).numpy(),
        report=report,
        image=image,
    )
    return Study(volumes=(volume,), kspace=kspace), truth


def _refused(folders: Sequence[Path]) -> list[Case]:
    """Images that are no brain MRI: noise, photographs, what pydicom carries of a vessel and of CT, and what lies in folders `refused`."""
    import pydicom

    files = Path(pydicom.__file__).parent / "data" / "test_files"

    def noise(seed: int) -> tuple[Study, Truth]:
        rng = np.random.default_rng(seed)
        shape = ((96, 96, 40), (128, 128, 24), (64, 64, 64))[seed % 3]
        values = np.abs(rng.normal(size=shape)) if seed % 2 else np.hypot(*rng.normal(size=(2, *shape)))
        return study_of(values.astype(np.float32), np.diag([2.0, 2.0, 3.0, 1.0]), oriented=True), Truth()

    def photograph(name: str) -> tuple[Study, Truth]:
        from sklearn.datasets import load_sample_image

        grey = load_sample_image(name).astype(np.float32).mean(-1).T[:, ::-1]
        return study_of(np.ascontiguousarray(grey)[..., None], np.diag([1.0, 1.0, 5.0, 1.0]), oriented=False), Truth()

    cases = [Case(f"noise {k}", "refused", f"noise {k}", lambda k=k: noise(k)) for k in range(4)]
    cases += [Case(f"photograph {n.split('.')[0]}", "refused", n, lambda n=n: photograph(n)) for n in ("china.jpg", "flower.jpg")]
    paths = [files / "MR_small.dcm", files / "CT_small.dcm", *(p for f in folders for p in sorted((f / "refused").glob("[!.]*")))]
    return cases + [Case(p.name, "refused", p.name, lambda p=p: (open_study(p), Truth())) for p in paths]


def cases_of(suite: str, *, scans: Sequence[Path] = (), maps: Path | None = None, count: int = 24) -> list[Case]:
    """The cases of a suite, or of all.

    Raises:
        ValueError: the suite is not known, or a folder that it needs is not given.
    """
    wanted = SUITES if suite == "all" else (suite,)
    if not set(wanted) <= set(SUITES):
        raise ValueError(f"expected a suite from {', '.join(SUITES)}, all; got {suite!r}")
    out: list[Case] = []
    if "synthetic" in wanted:
        if maps is None:
            raise ValueError("expected --maps FOLDER with label maps for the synthetic suite, got none")
        recipes = [Synthetic(maps, numbers=(n,), num_slices=24) for n in CHOOSING_MAPS]
        for i in range(count):
            k = i % len(recipes)
            out.append(Case(f"synthetic {i:03d}", "synthetic", f"map {CHOOSING_MAPS[k]}", lambda r=recipes[k], i=i: _synthetic(r, i)))
    with SCANS.open(encoding="utf-8") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            if row["suite"] in wanted:
                out.append(Case(row["name"], row["suite"], row["name"].split("_")[0], lambda row=row: _scan(row, scans)))
    out += _refused(scans) if "refused" in wanted else []
    names = [c.name for c in out]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"\w[\w. -]*", n) for n in names):
        raise ValueError(
            "expected cases with different names of letters, digits and dots, got others; rename the files in the folder 'refused'"
        )
    return out
