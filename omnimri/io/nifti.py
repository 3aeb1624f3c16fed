"""What nibabel decodes: NIfTI-1/2, Analyze, FreeSurfer MGH/MGZ, MINC, PAR/REC. And NIfTI out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import igzip

from .series import Series, UnusableError, check_affine, check_shape

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
"""Voxels that begin later than this in a NIfTI file follow no header."""
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""By the spatial code of a NIfTI header's `xyzt_units`; 0 is unknown."""


def read_with_nibabel(path: Path, file_format: str) -> list[Series]:
    """The image of a file, or each volume of a 4-D one.

    Args:
        path: Its suffix must be the usual one of `file_format`.
        file_format: `NIfTI`, `Analyze`, `MGH`, `MINC` or `PAR/REC`.

    Raises:
        UnusableError: header unreadable, not 3-D or 4-D, too large, or without a usable affine.
    """
    import nibabel
    from nibabel.openers import ImageOpener

    # Twice as fast as zlib; read only: it cannot leave the time of writing out.
    ImageOpener.compress_ext_map[".gz"] = ImageOpener.compress_ext_map[".mgz"] = igzip.open, ("mode", "compresslevel")
    if file_format in ("NIfTI", "Analyze"):
        _check_start(path)
    try:
        # Old scaling of PAR/REC files and the like warn with header text: warnings go nowhere in the child.
        image: Any = nibabel.load(path)
        shape = tuple(int(n) for n in image.shape)
        dtype = np.dtype(image.get_data_dtype())
        affine = np.array(image.affine, dtype=np.float64)
        oriented = _oriented(image, file_format)
        if file_format == "NIfTI":
            affine[:3] *= MILLIMETRES[int(image.header["xyzt_units"]) & 3]
    except Exception as error:  # decoders raise many kinds on damaged bytes
        raise UnusableError(f"expected a {file_format} image, got a file whose header cannot be read "
                       f"({type(error).__name__}); export it again") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 4 and file_format == "MINC":
        raise UnusableError("expected a 3-D MINC image, got one with a time axis; convert one volume, for instance to NIfTI")
    if len(shape) not in (3, 4):
        raise UnusableError(f"expected a 3-D or 4-D image, got {len(shape)}-D of shape {shape}; extract one volume of the series")
    check_shape(shape[:3])
    check_shape(shape[3:], what="volumes")
    if dtype.kind not in "iufb":
        raise UnusableError(f"expected real intensities, got voxels of type {dtype.kind}{8 * dtype.itemsize}; export a magnitude image")
    affine = check_affine(affine)
    volumes = shape[3] if len(shape) == 4 else 1
    found = []
    for k in range(volumes):
        found.append(Series(shape[:3], affine, _decoder(image, shape, k), file_format, oriented=oriented,
                            variant=f"volume {k + 1} of {volumes}" if volumes > 1 else ""))
        if not oriented:
            found[-1].warnings.append("the header gives no orientation: sides are unknown")
    return found


def is_complex(path: Path) -> bool:
    """Whether a NIfTI file that starts well holds complex values."""
    import nibabel

    _check_start(path)
    try:
        return np.dtype(nibabel.load(path).get_data_dtype()).kind == "c"
    except Exception:  # read_with_nibabel tells what is wrong
        return False


def _check_start(path: Path) -> None:
    """Refuse a header that lies about its size before nibabel allocates by it."""
    opened: Any = igzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            start = f.read(540)
    except Exception as error:
        raise UnusableError(f"expected a NIfTI image, got a damaged file ({type(error).__name__}); copy it again") from None
    if len(start) < 348:
        raise UnusableError("expected a NIfTI image, got a truncated header; copy it again")
    order = "<" if start[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    if int(np.frombuffer(start[:4], f"{order}i4")[0]) == 540:
        offset = float(np.frombuffer(start[168:176].ljust(8, b"\0"), f"{order}i8")[0])
    else:
        offset = float(np.frombuffer(start[108:112], f"{order}f4")[0])
    if not 0 <= offset <= MAX_HEADER_BYTES:
        raise UnusableError("expected voxels right after the header, got an offset out of reach; export the image again")


def _oriented(image: Any, file_format: str) -> bool:
    if file_format == "NIfTI":
        return int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    if file_format == "MGH":
        return int(image.header["goodRASFlag"]) == 1
    return file_format != "Analyze"


def _decoder(image: Any, shape: tuple[int, ...], volume: int) -> Any:
    """A function that decodes one volume of an image."""

    def decode() -> np.ndarray:
        proxy = image.dataobj
        try:
            # Scaling in float32 halves the time of large integer files.
            plain = len(shape) == 3 and hasattr(proxy, "get_unscaled") and np.ndim(proxy.slope) == 0 and np.ndim(proxy.inter) == 0
            if not plain:
                return np.asarray(proxy if len(shape) == 3 else proxy[..., volume], dtype=np.float32).reshape(shape[:3])
            stored = proxy.get_unscaled().reshape(shape)
            if (proxy.slope, proxy.inter) == (1, 0):
                return stored
            scaled = stored.astype(np.float32)
            scaled *= np.float32(proxy.slope)
            scaled += np.float32(proxy.inter)
            return scaled
        except Exception as error:
            raise UnusableError(f"expected {int(np.prod(shape[:3]))} voxels, got a truncated or damaged file "
                           f"({type(error).__name__}); copy it again") from None

    return decode


MOST_ALONG = 2**15 - 1
"""Voxels along an axis that a NIfTI header can tell."""


def write_nifti(path: str | Path, voxels: Tensor, affine: Tensor, *, comment: str = "") -> None:
    """Write (X, Y, Z) voxels with an affine; integers as int16, others as float32; whole or not at all.

    Args:
        comment: Kept in the header's extension for comments.

    Raises:
        ValueError: the name does not end in .nii or .nii.gz, or the folder cannot be written.
    """
    import nibabel

    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    if not path.name.endswith(suffix):
        raise ValueError(f"expected an output name ending in .nii or .nii.gz, got {path.name!r}")
    if max(voxels.shape) > MOST_ALONG:
        raise ValueError(f"expected at most {MOST_ALONG} voxels along an axis, as NIfTI holds, got {max(voxels.shape)}; crop the image")
    array = voxels.cpu().numpy()
    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int16)
    image = nibabel.Nifti1Image(array, affine.numpy())
    image.set_sform(affine.numpy(), code=1)
    image.set_qform(affine.numpy(), code=1)
    if comment:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment.encode()))
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
    except OSError as error:
        raise ValueError(f"expected an output file that can be written, got {path.name!r}: {error.strerror}; name another") from None
    finally:
        Path(partial).unlink(missing_ok=True)
