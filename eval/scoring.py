"""Scoring: predictions beside the truth and beside their controls, as tables of estimates. No model is needed.

A table has one row a figure and one column a system: the model, the same model with random weights, a trivial baseline, a peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from data_recipes.recipe import generator
from data_recipes.wording import Voice
from omnimri.anatomy import STRUCTURES
from omnimri.example import Record, classes_of, normalise
from omnimri.lesions import Lesion
from omnimri.measure import brain_mask, rank_components, signal_words
from omnimri.measure import measure as measure_mask
from omnimri.volume import Study

from . import predict
from .cases import GREY, WHITE, Case, Truth, open_case, written
from .metrics.reconstruction import MEASURES as IMAGE_MEASURES
from .metrics.reconstruction import measure_images
from .metrics.report import METRICS
from .metrics.segmentation import MEASURES as MASK_MEASURES
from .metrics.segmentation import dice, measure_masks, pooled_dice
from .reports import Texts, score
from .resampling import Estimate, mean_estimate

MIXTURE, CONSTANT, BY_RULE, ZERO_FILLED, DEEPBET, WAVELET = (
    "three Gaussians",
    "one report for all",
    "by rule from the model's masks",
    "zero-filled",
    "deepbet",
    "sigpy L1-wavelet",
)
DRAWN, MERGED = "mean of those that are wholly drawn", "mean of those that are wholly drawn, sides as one"
WHOLE_HEADS = ("Colin27", "multi_t1")
"""Cases that are T1-weighted whole heads, as deepbet expects."""
CONSTANT_REPORT = (
    "Axial T1-weighted MRI of the brain. The slices show the cerebral hemispheres and lateral ventricles. No focal lesion is seen. "
    "Impression: no focal lesion."
)


@dataclass
class Table:
    """Figures of one kind in one suite."""

    suite: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, what: str, metric: str, direction: str, values: dict[str, Estimate | str], range_: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """A row: system -> figure, or k of n as text."""
        self.rows.append(
            {
                "what": what,
                "metric": metric,
                "direction": direction,
                "range": list(range_),
                "values": {k: v if isinstance(v, str) else vars(v) for k, v in values.items()},
            }
        )


def beside(tables: Sequence[Table]) -> Table:
    """The first table with the columns of the others added to its rows; its notes are its own."""
    first, *others = tables
    for row in first.rows:
        for other in others:
            row["values"] |= next((r["values"] for r in other.rows if r["what"] == row["what"]), {})
    return first


@dataclass(frozen=True)
class Scored:
    """One case with what the systems said of it."""

    case: Case
    study: Study
    truth: Truth
    told: dict[str, dict[str, Any]]
    """System -> answer.json."""
    labels: dict[str, np.ndarray]
    """System -> label map."""


def load(case: Case, out: Path, systems: Sequence[str]) -> Scored:
    """Read a case and its predictions.

    Raises:
        ValueError: one is not there, or it failed.
    """
    told, labels = {}, {}
    for system in systems:
        told[system], found = predict.read(out, system, case)
        if found is not None:
            labels[system] = found
        wrong = told[system].get("failed") or told[system].get("refused")
        if wrong:
            raise ValueError(f"{system}: {wrong}")
    study, truth = open_case(case)
    if any(t["study"] != predict.fingerprint(study) for t in told.values()):
        raise ValueError("expected the study that was predicted, got other voxels; predict it again")
    arrays = [*labels.values(), truth.labels, truth.grey, truth.white, truth.brain, truth.lesions, truth.ignored]
    if any(a is not None and a.shape != tuple(study.primary.shape) for a in arrays):
        raise ValueError(f"expected masks of {tuple(study.primary.shape)} voxels, got others")
    return Scored(case, study, truth, told, labels)


def image_of(s: Scored) -> np.ndarray:
    """(X, Y, Z) intensities."""
    return s.study.primary.voxels[0].numpy()


def as_truth(labels: np.ndarray) -> np.ndarray:
    """A label map with lesions told as the white matter that they lie in."""
    out = labels.copy()
    out[labels == 25], out[labels == 57] = 2, 41
    return out


def by_rule(s: Scored) -> str:
    """The report that rules write of the model's own masks, plane and sequence in the references' sentences: what of a report's score
    is masks and not words. Where the model abstained, its own words.
    """
    told, volume = s.told[predict.MODEL]["report"], s.study.primary
    if not told["scope"]["in_scope"]:
        return told["text"]
    labels = s.labels[predict.MODEL]
    ranks, _ = rank_components(torch.from_numpy(np.isin(labels, (25, 57))))
    found = [Lesion(f["number"], f["side"], f["location"], measure_mask(ranks == f["number"], volume, slice_axis=2), 1.0, 1.0)
             for f in told["findings"]]  # fmt: skip
    images = normalise(volume.voxels[0].permute(2, 1, 0)[:, None])
    classes, ranks = (x.permute(2, 1, 0) for x in (classes_of(torch.from_numpy(as_truth(labels))), ranks))
    record = Record(
        images.expand(-1, 3, -1, -1), torch.arange(len(images), dtype=torch.float32), told["study"]["plane"], (1.0, 1.0, 1.0),
        told["study"]["sequence"], classes, ranks, tuple(f.place for f in found), signal=signal_words(images[:, 0], classes, ranks),
    )  # fmt: skip
    return written(Voice(generator(0, "by rule", s.case.name), wide=False), record, found, volume)


def mixture_of(s: Scored) -> np.ndarray:
    """The baseline of three Gaussians, its grey and white matter sided at the scanner's midline."""
    volume = s.study.primary
    labels = predict.mixture_labels(image_of(s), s.truth.sequence)
    axes = [np.arange(n) for n in labels.shape]
    right = (
        sum(float(volume.affine[0, k]) * a.reshape([-1 if d == k else 1 for d in range(3)]) for k, a in enumerate(axes))
        + float(volume.affine[0, 3])
        > 0
    )
    return np.where((labels == 2) & right, 41, np.where((labels == 3) & right, 42, labels))


def means(values: dict[str, list[float]], patients: list[str]) -> dict[str, Estimate | str]:
    """System -> mean of its cases with interval by patient."""
    return {k: mean_estimate(v, patients) for k, v in values.items()}


class Structures:
    """Structures by FreeSurfer labels: every measure of every structure of every case."""

    def __init__(self, suite: str, *, pooled: bool) -> None:
        self.suite, self.pooled = suite, pooled
        self.found: dict[str, list[dict[int, dict[str, float]]]] = {}
        self.patients: list[str] = []
        self.pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.whole: dict[str, dict[str, list[float]]] = {}
        self.partial: set[str] = set()

    def see(self, s: Scored) -> None:
        """Measure one case."""
        truth = s.truth.labels
        if truth is None or predict.MODEL not in s.labels:
            return
        self.patients.append(s.case.patient)
        spacing = s.study.primary.spacing_mm
        for system, labels in {**{k: as_truth(v) for k, v in s.labels.items()}, MIXTURE: mixture_of(s)}.items():
            rows = {}
            for structure in STRUCTURES:
                said, true = labels == structure.label, truth == structure.label
                rows[structure.label] = measure_masks(said, true, spacing) if system == predict.MODEL else {"dice": dice(said, true)}
                if self.pooled and system == predict.MODEL:
                    self.pairs.setdefault(structure.label, []).append((said, true))
            self.found.setdefault(system, []).append(rows)
            drawn = [x for x in STRUCTURES if x.label not in s.truth.partial]
            both: dict[str, list[int]] = {}
            for x in drawn:
                both.setdefault(x.name.removeprefix(f"{x.side} "), []).append(x.label)
            merged = [dice(np.isin(labels, group), np.isin(truth, group)) for group in both.values()]
            for what, values in ((DRAWN, [rows[x.label]["dice"] for x in drawn]), (MERGED, merged)):
                value = float("nan") if np.isnan(values).all() else float(np.nanmean(values))
                self.whole.setdefault(what, {}).setdefault(system, []).append(value)
        self.partial |= {x.name for x in STRUCTURES if x.label in s.truth.partial}

    def table(self) -> Table:
        """Means over structures, then each structure."""
        t = Table(self.suite, "Structures (foreground alone, each case on its own)")
        for measure, (direction, range_) in MASK_MEASURES.items():
            values = {}
            for system, cases in self.found.items():
                if measure in next(iter(cases[0].values())):
                    each = [np.array([row[measure] for row in c.values()]) for c in cases]
                    values[system] = [float(np.nanmean(v)) if not np.isnan(v).all() else float("nan") for v in each]
            t.add("mean of the structures of a case", measure, direction, means(values, self.patients), range_)
        for what, cases in self.whole.items():
            if what == MERGED or self.partial:
                t.add(what, "dice", "higher", means(cases, self.patients))
        if self.partial:
            t.notes.append(f"drawn only in part by the reference: {', '.join(sorted(self.partial))}")
        for structure in STRUCTURES:
            values = {system: [c[structure.label]["dice"] for c in cases] for system, cases in self.found.items()}
            t.add(structure.name, "dice", "higher", means(values, self.patients))
        for label, pairs in self.pairs.items():
            value = pooled_dice(pairs)
            t.add(
                next(s.name for s in STRUCTURES if s.label == label),
                "dice, all voxels of all cases pooled",
                "higher",
                {predict.MODEL: Estimate(value, float("nan"), float("nan"), len(pairs))},
            )
        return t


class Tissue:
    """Grey matter, white matter with brain-stem, and the brain mask."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.values: dict[str, dict[str, list[float]]] = {}
        self.patients: list[str] = []

    def see(self, s: Scored) -> None:
        """Measure one case."""
        truth = s.truth
        grey = truth.grey if truth.grey is not None else None if truth.labels is None else np.isin(truth.labels, GREY)
        white = truth.white if truth.white is not None else None if truth.labels is None else np.isin(truth.labels, WHITE)
        whole = s.case.name in WHOLE_HEADS
        if predict.MODEL not in s.labels or (grey is None and not whole):
            return
        self.patients.append(s.case.patient)
        if grey is not None and white is not None:
            for system, labels in {**{k: as_truth(v) for k, v in s.labels.items()}, MIXTURE: mixture_of(s)}.items():
                self._put("grey matter", system, dice(np.isin(labels, GREY), grey))
                self._put("white matter and brain-stem", system, dice(np.isin(labels, WHITE), white))
        if not whole:
            return
        # Strippers differ in whether the fluid around the brain is brain: all labels, and the brain as strippers draw it.
        image, peer = image_of(s), predict.deepbet_mask(s.study)
        masks = {system: (ndimage.binary_fill_holes(labels > 0), brain_mask(torch.from_numpy(labels), s.study.primary.spacing_mm).numpy())
                 for system, labels in s.labels.items()}  # fmt: skip
        masks["whole head"] = (ndimage.binary_fill_holes(image > 0.1 * np.percentile(image, 99)),) * 2
        for other, true in (("against ch2bet", truth.brain), ("agreement with deepbet", peer)):
            for system, both in {**masks, **({DEEPBET: (peer, peer)} if peer is not None and true is not peer else {})}.items():
                for what, mask in zip(("all labels, holes filled", "the brain as strippers draw it"), both, strict=True):
                    if true is not None:
                        self._put(f"{what}, {other}", system, dice(mask, true))

    def _put(self, what: str, system: str, value: float) -> None:
        self.values.setdefault(what, {}).setdefault(system, []).append(value)

    def table(self) -> Table:
        """One row a tissue."""
        t = Table(self.suite, "Tissue and brain mask")
        for what, values in self.values.items():
            t.add(what, "dice", "higher", means(values, self.patients))
        return t


def reports_table(seen: Sequence[tuple[str, str, str, str | None, str, str]]) -> Table:
    """Reports of the synthetic suite against their references.

    Args:
        seen: (case, patient, said, said by random weights or None, said by rule, reference).
    """
    t = Table("synthetic", "Reports against the reference, by rules and n-grams")
    ids, patients, said, control, ruled, true = zip(*seen, strict=True)
    systems = {predict.MODEL: said, **({predict.RANDOM: control} if all(control) else {}), BY_RULE: ruled,
               CONSTANT: [CONSTANT_REPORT] * len(ids)}  # fmt: skip
    scored = {
        k: score(Texts(ids, tuple(v), tuple((r,) for r in true), patients), list(METRICS.values()))["metrics"] for k, v in systems.items()
    }
    for name, m in METRICS.items():
        t.add(
            "reports",
            name,
            m.direction,
            {k: Estimate(v[name]["value"], v[name]["low"], v[name]["high"], v[name]["n"]) for k, v in scored.items()},
            m.range,
        )
    return t


class Reconstructions:
    """Images from undersampled k-space."""

    WEIGHTS = (0.0001, 0.0003, 0.001, 0.003, 0.01)
    """Of the wavelet norm; the first cases choose."""
    CHOOSING = 3

    def __init__(self) -> None:
        self.cases: list[tuple[dict[str, np.ndarray], np.ndarray, str]] = []

    def see(self, s: Scored, out: Path) -> None:
        """Collect every system's image of one case."""
        if s.study.kspace is None or s.truth.image is None:
            return
        from omnimri.physics import estimate_coils, sense_adjoint

        found = {}
        for system in s.told:
            path = out / "predictions" / system / s.case.name / "reconstruction.npy"
            if path.exists():
                found[system] = np.load(path, allow_pickle=False)
        data, mask = s.study.kspace.data, s.study.kspace.mask[None]
        found[ZERO_FILLED] = sense_adjoint(data, mask, estimate_coils(data, mask)).abs().numpy()
        for weight in self.WEIGHTS:
            peer = predict.wavelet_reconstruction(s.study, weight)
            if peer is not None:
                found[f"{WAVELET} {weight}"] = peer
        self.cases.append((found, s.truth.image, s.case.patient))

    def table(self) -> Table:
        """Means over the cases after the choosing ones."""
        t = Table("synthetic", "Reconstruction of undersampled k-space (peers with sensitivities of its middle)")
        first = self.cases[: self.CHOOSING]
        chosen = None
        if any(name.startswith(WAVELET) for found, _, _ in first for name in found):
            chosen = max(self.WEIGHTS, key=lambda w: np.mean([measure_images(c[0][f"{WAVELET} {w}"], c[1])["psnr_db"] for c in first]))
            edge = " (at the end of the range tried)" if chosen in (self.WEIGHTS[0], self.WEIGHTS[-1]) else ""
            t.notes.append(f"{WAVELET}: weight {chosen}{edge}, chosen on {len(first)} other cases")
        rest = self.cases[self.CHOOSING :]
        values: dict[str, dict[str, list[float]]] = {}
        for found, truth, _ in rest:
            for system, image in found.items():
                if system.startswith(WAVELET) and system != f"{WAVELET} {chosen}":
                    continue
                name = WAVELET if system.startswith(WAVELET) else system
                for measure, v in measure_images(image, truth).items():
                    values.setdefault(measure, {}).setdefault(name, []).append(v)
        for measure, by in values.items():
            t.add("images", measure, IMAGE_MEASURES[measure][1], means(by, [p for _, _, p in rest]), IMAGE_MEASURES[measure][2])
        return t
