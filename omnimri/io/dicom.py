"""Classic MR DICOM: a file, a folder or a zip, one or several series; geometry from positions only.

No free text is kept: sequence parameters come through a whitelist of numeric and coded fields.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..volume import Study, Volume
from . import MAX_VOXELS

MAX_FILES = 20_000
MAX_FILE_BYTES = 256 * 2**20
MAX_RATIO = 200
PARAMETERS = {
    "repetition_time_ms": "RepetitionTime",
    "echo_time_ms": "EchoTime",
    "inversion_time_ms": "InversionTime",
    "flip_angle_deg": "FlipAngle",
    "field_strength_tesla": "MagneticFieldStrength",
}
"""Numeric header fields that may be spoken of."""


def read_dicom(path: Path) -> Study:
    """Read every MR series of one frame that can be stacked into a volume.

    Raises:
        ValueError: nothing usable; the message tells why.
    """
    import pydicom

    series: dict[tuple, list[Any]] = defaultdict(list)
    other: set[str] = set()
    unreadable = total = 0
    for data in _files(path):
        total += 1
        try:
            instance = pydicom.dcmread(io.BytesIO(data), force=False)
            modality = str(instance.get("Modality", ""))
        except Exception as error:  # any decoder error: pydicom raises many kinds on hostile bytes
            unreadable += 1
            _ = error
            continue
        if modality != "MR":
            other.add(modality if modality.isalpha() and len(modality) <= 4 else "unknown")
        elif "PixelData" in instance and "ImagePositionPatient" in instance and "ImageOrientationPatient" in instance:
            direction = tuple(round(float(v), 3) for v in instance.ImageOrientationPatient)
            key = (str(instance.get("SeriesInstanceUID", "")), direction, int(instance.Rows), int(instance.Columns))
            series[key].append(instance)
        else:
            other.add("MR without pixels or position")
    if total == 0:
        raise ValueError("expected DICOM files, got an empty folder or archive")
    if not series:
        if other:
            raise ValueError(f"expected DICOM of modality MR, got {', '.join(sorted(other))}; choose an MR series")
        raise ValueError(f"expected DICOM files, got {total} files of which none can be read as DICOM; copy them again")
    warnings = [f"{unreadable} files are not DICOM and were passed over"] if unreadable else []
    if other:
        warnings.append(f"passed over: {', '.join(sorted(other))}")
    volumes, reasons = [], []
    for number, instances in enumerate(series.values(), 1):
        try:
            volumes.append(_stack(instances, f"series {number}", warnings))
        except ValueError as error:
            reasons.append(f"series {number}: {error}")
    if not volumes:
        raise ValueError("; ".join(reasons))
    return Study(volumes=tuple(volumes), warnings=(*warnings, *reasons))


def _files(path: Path) -> Iterator[bytes]:
    """Contents of every regular file; archives are read in memory and never unpacked to disk."""
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        if len(names) > MAX_FILES:
            raise ValueError(f"expected at most {MAX_FILES} files, got {len(names)}; choose one study's folder")
        for name in names:
            if name.stat().st_size <= MAX_FILE_BYTES:
                yield name.read_bytes()
        return
    if not path.name.lower().endswith(".zip"):
        yield path.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            if len(entries) > MAX_FILES:
                raise ValueError(f"expected at most {MAX_FILES} files, got {len(entries)}; zip one study")
            for entry in entries:
                parts = entry.filename.replace("\\", "/").split("/")
                if ".." in parts or entry.filename.startswith(("/", "\\")) or ":" in parts[0]:
                    raise ValueError("expected plain names in the archive, got one that points outside it; zip it again")
                if entry.file_size > MAX_FILE_BYTES or entry.file_size > MAX_RATIO * max(entry.compress_size, 1024):
                    raise ValueError("expected image files in the archive, got one that inflates beyond its limit")
                with archive.open(entry) as f:
                    yield f.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"expected a zip archive, got one that cannot be read ({type(error).__name__})") from None


def _stack(instances: list[Any], name: str, warnings: list[str]) -> Volume:
    """One volume from the instances of a series.

    Raises:
        ValueError: slices are unevenly spaced or pixels cannot be decoded.
    """
    import numpy as np

    first = instances[0]
    row, column = (np.array([float(v) for v in first.ImageOrientationPatient[k : k + 3]]) for k in (0, 3))
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise ValueError("expected perpendicular unit image directions in the header, got others")
    normal = np.cross(row, column)
    at: dict[float, tuple[Any, Any]] = {}
    for instance in sorted(instances, key=lambda i: int(i.get("InstanceNumber") or 0)):
        position = np.array([float(v) for v in instance.ImagePositionPatient])
        at.setdefault(round(float(position @ normal), 3), (position, instance))
    if len(at) < len(instances):
        warnings.append(f"{name}: {len(instances) - len(at)} images share a position with another and were passed over")
    places = sorted(at)
    positions = np.array([at[p][0] for p in places])
    kept = [at[p][1] for p in places]
    rows_mm, columns_mm = (float(v) for v in first.PixelSpacing)
    if rows_mm <= 0 or columns_mm <= 0:
        raise ValueError(f"expected positive pixel spacing, got {rows_mm} x {columns_mm} mm")
    if len(kept) * int(first.Rows) * int(first.Columns) > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS} voxels, got more; choose one series")
    if len(kept) > 1:
        gaps = np.diff(places)
        if gaps.max() - gaps.min() > 0.1 * np.median(gaps):
            raise ValueError(
                f"expected evenly spaced slices, got gaps from {gaps.min():.2f} to {gaps.max():.2f} mm; is a slice missing?"
            )
        step = (positions[-1] - positions[0]) / (len(kept) - 1)
    else:
        step = normal * float(first.get("SliceThickness") or 1.0)
        warnings.append(f"{name}: a single slice; its thickness is taken from the header")
    planes = []
    for instance in kept:
        try:
            pixels = instance.pixel_array.astype(np.float32)
        except Exception as error:  # decoders raise many kinds on damaged or compressed pixels
            raise ValueError(f"expected decodable pixels, got damaged or unsupported ones ({type(error).__name__})") from None
        if pixels.shape != (int(first.Rows), int(first.Columns)):
            raise ValueError(f"expected single-frame grey images, got pixels of shape {pixels.shape}")
        slope, intercept = float(instance.get("RescaleSlope") or 1), float(instance.get("RescaleIntercept") or 0)
        planes.append(pixels * slope + intercept)
    voxels = np.stack(planes, -1).transpose(1, 0, 2)
    if not np.isfinite(voxels).all() or float(voxels.max()) == float(voxels.min()):
        raise ValueError("expected an image with contrast, got one value everywhere or values that are not finite")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * columns_mm, column * rows_mm, step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # DICOM's LPS+ to RAS+
    parameters = {k: float(first.get(f)) for k, f in PARAMETERS.items() if _is_number(first.get(f))}
    return Volume(
        voxels=torch.from_numpy(np.ascontiguousarray(voxels))[None],
        affine=torch.from_numpy(affine),
        sequence=sequence_of(parameters, inversion="IR" in list(first.get("ScanningSequence") or []),
                             contrast=bool(first.get("ContrastBolusAgent"))),
        source=tuple(str(i.SOPInstanceUID) for i in kept),
        parameters=parameters,
        name=name,
    )


def _is_number(value: Any) -> bool:
    try:
        return value is not None and 0 <= float(value) < 1e6
    except (TypeError, ValueError):
        return False


def sequence_of(parameters: dict[str, float], *, inversion: bool = False, contrast: bool = False) -> str:
    """Sequence by TR, TE and TI (rules after Westbrook, MRI in Practice); `unknown` where they do not decide."""
    tr, te = parameters.get("repetition_time_ms"), parameters.get("echo_time_ms")
    ti = parameters.get("inversion_time_ms", 0.0)
    if tr is None or te is None:
        return "unknown"
    if te > 60 and tr > 3500 and (ti > 1400 or (inversion and ti == 0)):
        return "FLAIR"
    if te < 30 and (tr < 1200 or 400 < ti < 1400):
        return "T1w-Gd" if contrast else "T1w"
    if te > 60 and tr > 1800:
        return "T2w"
    if te <= 45 and tr > 1800 and ti == 0:
        return "PDw"
    return "unknown"
