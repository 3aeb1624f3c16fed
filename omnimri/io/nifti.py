"""NIfTI in and out."""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..volume import Study, Volume
from . import MAX_VOXELS

UNREADABLE = (OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError, KeyError)


def read_nifti(path: Path) -> Study:
    """Read one 3-D NIfTI image; voxels stay in the file's order.

    Raises:
        ValueError: unreadable, not 3-D, too large, or without finite values or a usable affine.
    """
    import nibabel
    import numpy as np
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        kind = image.get_data_dtype()
        affine = np.asarray(image.affine, dtype=np.float64)
        header = image.header
        coded = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    except (*UNREADABLE, ImageFileError) as error:
        raise ValueError(
            f"expected a NIfTI image, got a file whose header cannot be read ({type(error).__name__}); export it again"
        ) from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"expected a 3-D image, got {len(shape)}-D of shape {shape}; extract one volume of the series")
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS} voxels, got {math.prod(shape)}; crop or downsample the image")
    if kind.kind not in "iuf":
        raise ValueError(f"expected real intensities, got voxels of type {kind}; export a magnitude image")
    try:
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except UNREADABLE as error:
        raise ValueError(
            f"expected {math.prod(shape)} voxels, got a truncated or damaged file ({type(error).__name__}); copy it again"
        ) from None
    return study_of(voxels, affine, oriented=coded)


def study_of(voxels, affine, *, oriented: bool) -> Study:
    """A one-volume study from an array and an affine, checked.

    Raises:
        ValueError: no finite value, no contrast, or a degenerate affine.
    """
    import numpy as np

    warnings = []
    bad = ~np.isfinite(voxels)
    if bad.any():
        if bad.all():
            raise ValueError("expected finite intensities, got NaN everywhere; export the series again")
        share = 100 * bad.mean()
        warnings.append(f"{share:.1f} % of the voxels are not finite and are read as the darkest value")
        voxels = np.where(bad, voxels[~bad].min(), voxels)
    if float(voxels.max()) == float(voxels.min()):
        raise ValueError("expected an image with contrast, got one value everywhere; export the series again")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError("expected an invertible affine, got a degenerate one; repair the header's sform or qform")
    if not oriented:
        warnings.append("the header gives no orientation: sides are unknown")
    volume = Volume(
        voxels=torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))[None],
        affine=torch.from_numpy(affine.copy()),
        name="series 1",
        oriented=oriented,
    )
    return Study(volumes=(volume,), warnings=tuple(warnings))


def write_nifti(path: str | Path, voxels: Tensor, affine: Tensor) -> None:
    """Write (X, Y, Z) voxels with an affine; integers as int16, others as float32; whole or not at all.

    Raises:
        ValueError: the name does not end in .nii or .nii.gz, or the folder cannot be written.
    """
    import nibabel
    import numpy as np

    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    if not path.name.endswith(suffix):
        raise ValueError(f"expected an output name ending in .nii or .nii.gz, got {path.name!r}")
    array = voxels.cpu().numpy()
    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int16)
    image = nibabel.Nifti1Image(array, affine.numpy())
    image.set_sform(affine.numpy(), code=1)
    image.set_qform(affine.numpy(), code=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=suffix, dir=path.parent)
    except OSError as error:
        raise ValueError(f"expected a folder that can be written for the output, got {error.strerror}") from None
    os.close(handle)
    try:
        nibabel.save(image, partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
