"""Cartesian k-space in HDF5, as fastMRI lays it out: `kspace` (slices, coils, height, width), optional `mask`."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..volume import KSpace, Study
from . import MAX_VOXELS


def read_kspace(path: Path) -> Study:
    """Read k-space; where no mask is given, lines that hold a sample count as sampled.

    Raises:
        ValueError: no such array, wrong shape, too large, or damaged.
    """
    import h5py
    import numpy as np

    try:
        with h5py.File(path, "r") as f:
            if "kspace" not in f or not isinstance(f.get("kspace", getlink=True), h5py.HardLink):
                raise ValueError("expected an array named 'kspace' in the file, found none; store it as fastMRI does")
            data = f["kspace"]
            shape = tuple(int(n) for n in data.shape)
            if len(shape) not in (3, 4) or data.dtype.kind != "c":
                raise ValueError(f"expected complex k-space (slices, [coils,] height, width), got {data.dtype} {shape}")
            if math.prod(shape) > MAX_VOXELS:
                raise ValueError(f"expected at most {MAX_VOXELS} samples, got {math.prod(shape)}")
            kspace = torch.from_numpy(np.asarray(data, dtype=np.complex64))
            mask = torch.from_numpy(np.asarray(f["mask"]).astype(bool)) if "mask" in f else None
            affine = np.asarray(f["affine"], dtype=np.float64) if "affine" in f else None
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"expected an HDF5 file, got one that cannot be read ({type(error).__name__})") from None
    if kspace.ndim == 3:
        kspace = kspace[:, None]
    if not bool(torch.isfinite(torch.view_as_real(kspace)).all()) or float(kspace.abs().max()) == 0:
        raise ValueError("expected finite k-space with signal, got NaN, infinity or zeros only")
    warnings = []
    if mask is None:
        mask = (kspace.abs() > 0).any(0).any(0)
        mask = mask.any(0, keepdim=True) if bool((mask == mask.any(0, keepdim=True)).all()) else mask
    mask = mask.reshape(1, -1) if mask.ndim == 1 else mask
    if mask.shape[-1] != kspace.shape[-1] or mask.shape[0] not in (1, kspace.shape[-2]):
        raise ValueError(f"expected a mask of {kspace.shape[-1]} columns, got {tuple(mask.shape)}")
    if affine is None or affine.shape != (4, 4):
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        warnings.append("the file gives no geometry: 1 mm voxels are assumed and sides are unknown")
    return Study(kspace=KSpace(kspace, mask, torch.from_numpy(affine)), warnings=tuple(warnings))


def write_kspace(path: Path, kspace: KSpace) -> None:
    """Write k-space so that `read_kspace` reads it back."""
    import h5py

    with h5py.File(path, "w") as f:
        f["kspace"] = kspace.data.numpy()
        f["mask"] = kspace.mask.numpy()
        f["affine"] = kspace.affine.numpy()
