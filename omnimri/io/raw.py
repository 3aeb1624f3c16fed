"""Raw: Cartesian k-space whose slices are decoded when they are asked for. numpy only: the child never imports torch.

Shapes: S slices, c coils, H rows (readout), W columns (phase encoding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .series import UnusableError

LEAST_SIDE = 8
MOST_SLICES = 1 << 16
FOCUS, SPREAD = 0.6, 0.4
"""Share of the energy that the middle quarter of a k-space axis holds at least; an axis with less than SPREAD is none."""


@dataclass(eq=False)
class Raw:
    """One file of k-space."""

    shape: tuple[int, int, int, int]
    """(S, c, H, W)"""
    read: Callable[[int, int], np.ndarray]
    """Slices from one to before another, (n, c, H, W) complex."""
    mask: np.ndarray | None = None
    """(W,), (1, W) or (H, W) bool: what is sampled."""
    noise: np.ndarray | None = None
    """(c, samples) complex: a measurement without signal."""
    coils: Callable[[int, int], np.ndarray] | None = None
    """Sensitivities, read as the slices are."""
    affine: np.ndarray | None = None
    """(4, 4) of the image (W, H, S), voxel index -> RAS+ mm."""
    spacing_mm: tuple[float, float, float] | None = None
    """Row, column, slice: where there is no affine."""
    places: np.ndarray | None = None
    """(S, 4, 3): see `ismrmrd`."""
    crop: tuple[int, int] | None = None
    """Rows and columns of the image that the scanner would show."""
    warnings: list[str] = field(default_factory=list)


def inside(group: Any, name: str) -> Any:
    """A member of an HDF5 group that lies in this very file.

    Raises:
        UnusableError: it is a link, or its values are stored elsewhere.
    """
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise UnusableError("expected data inside the file, got a link to elsewhere; store it in one file")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise UnusableError("expected data inside the file, got values stored elsewhere; store it in one file")
    return found


def slab_of(raw: Raw, begin: int, most_samples: int) -> dict[str, Any]:
    """As many slices as fit, checked and with noise made equal: what the parent gets.

    Raises:
        UnusableError: sizes that lie, values that are not finite, no signal, or axes in another order.
    """
    slices, coils, h, w = raw.shape
    if min(raw.shape) < 1 or min(h, w) < LEAST_SIDE:
        raise UnusableError(f"expected k-space of at least {LEAST_SIDE} x {LEAST_SIDE} samples, got (slices, coils, height, width) "
                            f"{raw.shape}; state the order of the axes (--axes)")
    if slices > MOST_SLICES:
        raise UnusableError(f"expected at most {MOST_SLICES} slices, got {slices}; state the order of the axes (--axes)")
    one = coils * h * w
    if one > most_samples:
        raise UnusableError(f"expected at most {most_samples} samples a slice, got {one}; compress the coils first")
    end = min(slices, begin + most_samples // one)
    if not begin < end:
        raise UnusableError(f"expected a slice below {slices}, got {begin}")
    data = np.ascontiguousarray(raw.read(begin, end), dtype=np.complex64)
    if data.shape != (end - begin, coils, h, w):
        raise UnusableError("expected as much data as the header says, got less; the file is truncated: copy it again")
    if not np.isfinite(data.view(np.float32)).all():
        raise UnusableError("expected finite k-space, got NaN or infinity; export it again")
    warnings = list(raw.warnings)
    if not data.any():
        raise UnusableError("expected k-space with signal, got zeros only; export it again")
    top = float(np.abs(data).max())
    if not 1e-25 < top < 1e25:
        raise UnusableError("expected k-space between 1e-25 and 1e25, got other values; scale it first")
    check_order(data)
    mask = raw.mask
    if mask is None:
        mask = (data != 0).any((0, 1))
        lines = mask.any(0, keepdims=True)
        mask = lines if (mask == lines).all() else mask
        if not mask.all():
            warnings.append(f"the file has no mask: the {100 * mask.mean():.1f} % of the samples that are not zero are taken as measured")
    mask = np.asarray(mask).astype(bool)
    mask = mask.reshape(1, -1) if mask.ndim == 1 else mask
    if mask.ndim != 2 or mask.shape[-1] != w or mask.shape[0] not in (1, h):
        raise UnusableError(f"expected a mask of {w} columns, or of {h} x {w}, got {tuple(mask.shape)}")
    if not mask.any():
        raise UnusableError("expected a mask with samples, got an empty one")
    given = None if raw.coils is None else np.ascontiguousarray(raw.coils(begin, end), dtype=np.complex64)
    if given is not None and (given.shape != data.shape or not np.isfinite(given.view(np.float32)).all() or not given.any()):
        raise UnusableError(f"expected finite sensitivities of shape {data.shape}, got others; give them in the order of the k-space")
    noise = None
    if raw.noise is not None and raw.noise.shape[-1] >= 16 * coils:
        white = whitening(raw.noise)
        if white is not None:
            data = np.einsum("ab,sbhw->sahw", white, data).astype(np.complex64)
            given = None if given is None else np.einsum("ab,sbhw->sahw", white, given).astype(np.complex64)
            noise = 1.0
    affine, oriented = geometry(raw)
    if affine is None:
        affine = np.eye(4)
        warnings.append("the file gives no geometry: 1 mm voxels are assumed and sides are unknown")
    return {"data": data * mask, "mask": mask, "affine": affine, "oriented": oriented, "coils": given, "noise": noise, "crop": raw.crop,
            "first": begin, "slices": slices, "warnings": warnings}


def whitening(noise: np.ndarray) -> np.ndarray | None:
    """(c, c) matrix that gives every coil uncorrelated noise of standard deviation 1 (Pruessmann et al., MRM 2001); None where the
    noise (c, samples) has no such matrix.
    """
    covariance = noise @ noise.conj().T / noise.shape[1]
    try:
        return np.linalg.inv(np.linalg.cholesky(covariance.astype(np.complex128)))
    except np.linalg.LinAlgError:
        return None


def focus(data: np.ndarray, axis: int, *, shifted: bool = False) -> float:
    """Share of the energy that lies in the middle quarter of an axis; of its rolled copy when the middle lies at its ends."""
    energy = np.square(np.abs(data)).sum(tuple(a for a in range(data.ndim) if a != axis), dtype=np.float64)
    energy = np.fft.fftshift(energy) if shifted else energy
    n = len(energy)
    return float(energy[int(0.375 * n) : int(np.ceil(0.625 * n)) + 1].sum() / energy.sum())


def check_order(data: np.ndarray) -> None:
    """Refuse (S, c, H, W) whose energy tells that other axes are those of k-space, or that its middle lies at the corners.

    Raises:
        UnusableError: it tells so.
    """
    names = ("slices", "coils", "height", "width")
    found = [focus(data, a) if n >= LEAST_SIDE else 0.0 for a, n in enumerate(data.shape)]
    if min(found[2:]) >= SPREAD:
        return
    if all(focus(data, a, shifted=True) > FOCUS > 0.5 > found[a] for a in (2, 3)):
        raise UnusableError("expected the middle of k-space in the middle of the array, got it at the corners; shift it first (fftshift)")
    like = [names[a] for a in range(4) if found[a] > FOCUS]
    if len(like) >= 2:
        raise UnusableError(f"expected k-space along height and width, got it along what was taken as {' and '.join(like)}; "
                            "state the order of the axes (--axes)")


def geometry(raw: Raw) -> tuple[np.ndarray | None, bool]:
    """Affine of the image (W, H, S) as it is shown, and whether it tells sides."""
    _, _, h, w = raw.shape
    rows, columns = raw.crop or (h, w)
    if raw.affine is not None:
        good = raw.affine.shape == (4, 4) and np.isfinite(raw.affine).all() and abs(np.linalg.det(raw.affine[:3, :3])) > 1e-6
        return (raw.affine, False) if good else (None, False)
    if raw.spacing_mm is None:
        return None, False
    row, column, between = raw.spacing_mm
    affine = np.diag([column, row, between, 1.0])
    if raw.places is None:
        return affine, False
    middle, read, phase, normal = raw.places.transpose(1, 0, 2)
    turned = np.stack([phase[0], read[0], normal[0]], 1)
    steps = np.diff(middle, axis=0)
    if not (np.isfinite(raw.places).all() and np.allclose(turned.T @ turned, np.eye(3), atol=1e-3)):
        return affine, False
    if len(steps) and (not np.allclose(steps, steps[0], atol=0.05) or not 1e-3 < abs(float(steps[0] @ normal[0])) < 1e3):
        return affine, False  # slices in another order than their places
    affine[:3, :3] = turned * [column, row, between]
    if len(steps):
        affine[:3, 2] = steps[0]
    affine[:3, 3] = middle[0] - affine[:3, 0] * (columns // 2) - affine[:3, 1] * (rows // 2)
    affine[:2] *= -1  # LPS -> RAS
    return affine, True
