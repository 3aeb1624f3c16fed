"""Files in and out: file -> Study, and Volume -> file. Nothing here needs torch until arrays exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..volume import Study

MAX_VOXELS = 512 * 512 * 1024
"""A study whose header claims more is refused before anything is decoded."""


def open_study(path: str | Path) -> Study:
    """Read a NIfTI file, a DICOM folder or zip, or an HDF5 k-space file.

    Raises:
        ValueError: it cannot be used; the message says what was expected, what came and what to do.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise ValueError("expected a file or folder, found none at the given path; check its spelling")
    if path.is_dir() or name.endswith(".zip") or name.endswith(".dcm"):
        from .dicom import read_dicom

        return read_dicom(path)
    if name.endswith((".nii", ".nii.gz")):
        from .nifti import read_nifti

        return read_nifti(path)
    if name.endswith((".h5", ".hdf5")):
        from .kspace import read_kspace

        return read_kspace(path)
    if path.is_file() and _is_dicom(path):
        from .dicom import read_dicom

        return read_dicom(path)
    raise ValueError(
        "expected NIfTI (.nii, .nii.gz), a DICOM folder or .zip, or k-space (.h5); got a file of another kind; "
        "convert the series first, for instance to NIfTI"
    )


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(132)[128:] == b"DICM"
