"""Files in and out: file -> Study, and Volume -> file. Nothing here needs torch until arrays exist.

Files are decoded in a child process without torch, under limits (`sandbox`, `child`); only numbers and words of this
project's own come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .sandbox import TIME_S, take, tidy, warm

if TYPE_CHECKING:
    import numpy as np

    from ..volume import KSpace, Study, Volume

__all__ = ["open_study", "study_of", "tidy", "warm"]


def open_study(
    path: str | Path, *, series: Sequence[str] | None = None, kspace: Mapping[str, Any] | None = None, time_s: float = TIME_S
) -> Study:
    """Read a file, folder or zip in any of the formats of `omnimri.io.intake`.

    Args:
        series: Names of series to use, as `omnimri info` prints them; None chooses.
        kspace: How to read k-space: `axes`, paths of a `mask` and of `coils` (`omnimri.io.kspace.read_kspace`).
        time_s: Longest that decoding may take.

    Raises:
        ValueError: it cannot be used; the message says what was expected, what came and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError("expected a file or folder, found none at the given path; check its spelling")
    request: dict[str, Any] = {"path": str(path.resolve()), "series": list(series) if series else None}

    def ask(first: int) -> Study:
        child = take()
        try:
            return _study(child.ask({**request, "kspace": {**(kspace or {}), "first": first}}, time_s), child.arrays, ask)
        finally:
            child.close()

    return ask(0)


def _study(told: dict[str, Any], arrays: BinaryIO, ask: Callable[[int], Study]) -> Study:
    """The study of a child's answer; its arrays are mapped, so that the file may be closed.

    Args:
        ask: Opens it again at a slice of its k-space.
    """
    import numpy as np
    import torch

    from ..grid import plane_of
    from ..volume import KSpace, SeriesNote, Study, Volume
    from .series import NARROW

    def mapped(place: dict[str, Any]) -> Any:
        kind = {*NARROW, "float32", "complex64", "bool"} & {place["type"]}
        array = np.memmap(arrays, kind.pop(), "c", offset=place["offset"], shape=tuple(place["shape"]), order=place["order"])
        return torch.from_numpy(array)

    volumes, notes, warnings = [], [], []
    several = sum(row["voxels"] is not None for row in told["series"]) > 1
    for row in told["series"]:
        name = f"series {row['name']}"
        if row["voxels"] is not None:
            volumes.append(_volume(row, mapped(row["voxels"]).float(), name))
            warnings += [f"{name}: {w}" if several else w for w in row["warnings"]]
        place = Volume(torch.zeros(1).expand(1, *row["shape"]), torch.tensor(row["affine"], dtype=torch.float64))
        notes.append(SeriesNote(name, row["format"], row["kind"], row["variant"], row["sequence"], plane_of(place)[1], place.shape,
                                place.spacing_mm, row["parameters"], row["why"]))
        if row["why"].startswith("not used: expected"):
            warnings.append(f"{name} is not used: {row['why'].removeprefix('not used: ')}")
    if told["passed_over"]:
        warnings.append(f"passed over: {'; '.join(told['passed_over'])}")
    if len({row["patient"] for row in told["series"]}) > 1:
        warnings.append("more than one patient or study in these files: only one is used")
    if len({v.frame for v in volumes}) > 1:
        warnings.append("the series do not share one frame of reference: places in one cannot be compared with places in another")
    kspace = None
    if told["kspace"] is not None:
        warnings += told["kspace"]["warnings"]
        raw = told["kspace"]
        kspace = KSpace(
            mapped(raw["data"]), mapped(raw["mask"]), torch.tensor(raw["affine"], dtype=torch.float64), oriented=raw["oriented"],
            coils=raw["coils"] and mapped(raw["coils"]), noise=raw["noise"], crop=raw["crop"] and tuple(raw["crop"]),
            num_slices=raw["slices"], rest=lambda first: _kspace_of(ask(first)),
        )
    return Study(volumes=tuple(volumes), kspace=kspace, warnings=tuple(warnings), series=tuple(notes))


def _kspace_of(study: Study) -> KSpace:
    assert study.kspace is not None
    return study.kspace


def _volume(row: dict[str, Any], voxels: Any, name: str) -> Volume:
    import torch

    from ..volume import Volume

    return Volume(
        voxels=voxels[None], affine=torch.tensor(row["affine"], dtype=torch.float64), sequence=row["sequence"],
        source=tuple(row["source"]), parameters=row["parameters"], oriented=row["oriented"], name=name, frame=row["frame"],
    )


def study_of(voxels: np.ndarray, affine: np.ndarray, *, oriented: bool = True) -> Study:
    """A one-volume study from an array of this program's own and its affine, checked like a file's.

    Raises:
        ValueError: no finite value, no contrast, or a degenerate affine.
    """
    import numpy as np
    import torch

    from ..volume import Study, Volume
    from .series import check_affine, check_voxels

    checked, warnings = check_voxels(voxels)
    place = torch.from_numpy(check_affine(affine).copy())
    volume = Volume(torch.from_numpy(np.ascontiguousarray(checked)).float()[None], place, oriented=oriented, name="series 1")
    return Study(volumes=(volume,), warnings=tuple(warnings))
