"""Series: one image as the decoding child hands it over. numpy only: the child never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_VOXELS = 512 * 512 * 1024
"""A series whose header claims more is refused before anything is decoded."""
NARROW = ("int8", "uint8", "int16", "uint16")
"""Types that go to the parent as they are: half the bytes of float32, which holds them exactly."""
MAX_FILES = 20_000
"""Most files of a folder or archive."""
MAX_FILE_BYTES = 2 * 2**30
"""Largest file of a folder or archive that is looked at."""


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Whatever a decoder raises on hostile bytes, panics of Rust too, becomes one sentence; its own text may hold the header's.

    Raises:
        UnusableError: anything was raised but that, or want of memory.
    """
    try:
        yield
    except (UnusableError, MemoryError):
        raise
    except BaseException as error:
        raise UnusableError(f"expected {what}, got damaged or unsupported data ({type(error).__name__}); export it again") from None


class UnusableError(ValueError):
    """Input that cannot be used. Its text is this project's own, with nothing of the file's in it: expected, got, remedy."""


@dataclass(eq=False)
class Series:
    """One image of a study, decoded only when it is used."""

    shape: tuple[int, ...]
    """Voxels along the three axes."""
    affine: np.ndarray
    """(4, 4) float64, voxel index -> RAS+ mm."""
    decode: Callable[[], np.ndarray]
    """Gives (X, Y, Z) values of any real type in scanner units."""
    format: str
    """Such as `NIfTI`, `DICOM`."""
    kind: str = "image"
    """`image`, or from DICOM `localizer` or `derived map`."""
    variant: str = ""
    """What tells volumes of one series apart: `echo 2 of 3`, `b 1000 s/mm2`, `volume 1 of 60`."""
    sequence: str = "unknown"
    parameters: dict[str, float] = field(default_factory=dict)
    """Whitelisted numeric header values."""
    source: tuple[str, ...] = ()
    """SOPInstanceUID of each slice along the last axis."""
    oriented: bool = True
    """Whether the file tells its orientation."""
    group: int = 0
    """Volumes of one DICOM series, or of one file, have the same."""
    patient: int = 0
    """Number of the patient and study, from 0 in the order found."""
    frame: int = 0
    """Number of the frame of reference, from 0: series of one frame share their space."""
    warnings: list[str] = field(default_factory=list)
    name: str = ""
    """`1`, or `1.2` for the second volume of series 1: what `--series` takes."""

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel edge lengths, mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


@dataclass
class Contents:
    """Everything that was found under a path."""

    series: list[Series] = field(default_factory=list)
    kspace: dict[str, Any] | None = None
    """`data` (S, coils, H, W) complex64, `mask` bool, `affine` (4, 4), `warnings`."""
    passed_over: list[str] = field(default_factory=list)
    """Sentences on what is not an image that can be used, and why."""


def check_shape(shape: tuple[int, ...], *, what: str = "voxels") -> None:
    """Refuse sizes that lie or do not fit.

    Raises:
        UnusableError: an extent is not positive, or there are too many voxels.
    """
    if any(n < 1 for n in shape):
        raise UnusableError(f"expected positive image extents, got {shape}; export the series again")
    total = 1
    for n in shape:
        total *= int(n)
    if total > MAX_VOXELS:
        raise UnusableError(f"expected at most {MAX_VOXELS} {what}, got {total}; crop or downsample the image")


def check_affine(affine: np.ndarray) -> np.ndarray:
    """The affine as float64 if it can be inverted.

    Raises:
        UnusableError: it is not finite, or degenerate.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not 1e-6 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
        raise UnusableError("expected an invertible affine, got a degenerate one; repair the header's geometry")
    if np.abs(affine).max() > 1e6:
        raise UnusableError("expected positions within a kilometre, got one beyond it; repair the header's geometry")
    return affine


def check_voxels(voxels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Voxels as float32, or as stored where that is `NARROW`; values that are not finite replaced; and warnings.

    Raises:
        UnusableError: no finite value, or no contrast.
    """
    warnings = []
    narrow = voxels.dtype.name in NARROW
    voxels = voxels.astype(voxels.dtype.newbyteorder("=") if narrow else np.float32, copy=False)
    low, high = voxels.min(), voxels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        good = np.isfinite(voxels)
        if not good.any():
            raise UnusableError("expected finite intensities, got NaN everywhere; export the series again")
        warnings.append(f"{100 * (1 - good.mean()):.1f} % of the voxels are not finite and are read as the darkest value")
        voxels = np.where(good, voxels, voxels[good].min())
        low, high = voxels.min(), voxels.max()
    if low == high:
        raise UnusableError("expected an image with contrast, got one value everywhere; export the series again")
    if max(abs(float(low)), abs(float(high))) > 1e30:
        raise UnusableError("expected intensities below 1e30, got larger ones; export the series again")
    return voxels, warnings
