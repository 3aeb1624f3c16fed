"""Frames: where every slice of an MR instance lies, and what its header tells of it; classic, enhanced multi-frame and mosaic."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .headers import CSA_CREATOR, CSA_IMAGE_HEADER, ENHANCED, MOSAIC_IMAGES, codes, kind_of, number, parameters_of
from .series import UnusableError

MAX_FRAMES = 100_000


@dataclass
class Frame:
    """One slice of one instance."""

    path: Path
    number: int
    """Frame of a multi-frame instance, from 0; tile of a mosaic."""
    header: dict[Any, Any]
    offset: int
    """Where Pixel Data begins in the file; 0 where it has to be parsed again."""
    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    spacing: tuple[float, float]
    """Between rows, between columns, mm."""
    size: tuple[int, int]
    """Rows, columns."""
    tiles: int = 0
    """Tiles a side of a mosaic; 0 for none."""
    slope: float = 1.0
    intercept: float = 0.0
    parameters: dict[str, float] = field(default_factory=dict)
    kind: str = "image"
    stack: str = ""
    order: tuple[int, ...] = ()
    """Temporal position, acquisition and instance number."""


def frames_of(path: Path, header: dict[Any, Any], offset: int) -> list[Frame]:
    """The frames of one MR instance; none where it has no pixels or no position."""
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if rows < 1 or columns < 1 or int(header.get("SamplesPerPixel") or 1) != 1:
        return []
    parameters, kind = parameters_of(header), kind_of(codes(header.get("ImageType")))
    common: dict[str, Any] = {"path": path, "header": header, "offset": offset, "size": (rows, columns), "parameters": parameters,
                              "kind": kind}
    order = ("TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber")
    numbers = tuple(int(number(header.get(k), high=1e9) or 0) for k in order)
    slope, intercept = _rescale(header)
    if "PerFrameFunctionalGroupsSequence" in header:
        return _enhanced_frames(header, common)
    if "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header or "PixelSpacing" not in header:
        return []
    position, row, column = _vectors(header["ImagePositionPatient"], header["ImageOrientationPatient"])
    spacing = _spacing(header["PixelSpacing"])
    if "MOSAIC" in codes(header.get("ImageType")):
        return _mosaic_frames(header, common, position, row, column, spacing, (slope, intercept), numbers)
    if int(header.get("NumberOfFrames") or 1) != 1:
        return []
    return [Frame(number=0, position=position, row=row, column=column, spacing=spacing, slope=slope, intercept=intercept,
                  order=numbers, **common)]


def _enhanced_frames(header: dict[Any, Any], common: dict[str, Any]) -> list[Frame]:
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    made = []
    for k, own in enumerate(header["PerFrameFunctionalGroupsSequence"]):
        if k >= MAX_FRAMES:
            raise UnusableError(f"expected at most {MAX_FRAMES} frames, got more; choose one study")

        def item(name: str, own: Any = own) -> Any:
            group = own.get(name) or shared.get(name)
            return group[0] if group else {}

        place, turn, measures = item("PlanePositionSequence"), item("PlaneOrientationSequence"), item("PixelMeasuresSequence")
        if "ImagePositionPatient" not in place or "ImageOrientationPatient" not in turn or "PixelSpacing" not in measures:
            return []
        position, row, column = _vectors(place.ImagePositionPatient, turn.ImageOrientationPatient)
        parameters = dict(common["parameters"])
        for name, (group, key) in ENHANCED.items():
            value = number(item(group).get(key))
            if value is not None:
                parameters[name] = value
        content, frame_type = item("FrameContentSequence"), item("MRImageFrameTypeSequence")
        slope, intercept = _rescale(item("PixelValueTransformationSequence"))
        order = (int(number(content.get("TemporalPositionIndex"), high=1e9) or 0), 0, k)
        kind = kind_of(codes(frame_type.get("FrameType"))) if "FrameType" in frame_type else common["kind"]
        made.append(Frame(number=k, position=position, row=row, column=column, spacing=_spacing(measures.PixelSpacing), slope=slope,
                          intercept=intercept, stack=str(content.get("StackID", "")), order=order,
                          **{**common, "parameters": parameters, "kind": kind}))
    return made


def _mosaic_frames(
    header: dict[Any, Any], common: dict[str, Any], position: np.ndarray, row: np.ndarray, column: np.ndarray, spacing: tuple[float, float],
    rescale: tuple[float, float], numbers: tuple[int, ...]
) -> list[Frame]:
    """Tiles of a Siemens mosaic: the header's position is that of the whole sheet, as if it were one slice.

    Raises:
        UnusableError: the private header that counts and orders the tiles is missing.
    """
    from nibabel.nicom.csareader import get_n_mosaic, get_slice_normal, read

    siemens = str(header.get(CSA_CREATOR, "")).startswith("SIEMENS CSA") and CSA_IMAGE_HEADER in header
    csa = read(header[CSA_IMAGE_HEADER]) if siemens else None
    count = get_n_mosaic(csa) if csa else None
    if not count and MOSAIC_IMAGES in header:
        count = int(number(header[MOSAIC_IMAGES]) or 0)
    normal = get_slice_normal(csa) if csa else None
    if not count or normal is None:
        raise UnusableError("a mosaic whose private header does not tell its tiles; export it as single images")
    rows, columns = common["size"]
    side = int(np.ceil(np.sqrt(count)))
    tile = rows // side, columns // side
    if min(tile) < 1:
        raise UnusableError("a mosaic with more tiles than pixels")
    # Siemens places the sheet so that its middle is the tile's middle.
    corner = position + row * spacing[1] * (columns - tile[1]) / 2 + column * spacing[0] * (rows - tile[0]) / 2
    gap = float(number(header.get("SpacingBetweenSlices")) or number(header.get("SliceThickness")) or 1.0)
    made = []
    for k in range(count):
        made.append(Frame(number=k, position=corner + k * gap * np.asarray(normal, float), row=row, column=column, spacing=spacing,
                          tiles=side, slope=rescale[0], intercept=rescale[1], order=numbers, **{**common, "size": tile}))
    return made


def _rescale(item: Any) -> tuple[float, float]:
    slope, intercept = item.get("RescaleSlope"), item.get("RescaleIntercept")
    values = float(slope) if slope not in (None, "") else 1.0, float(intercept) if intercept not in (None, "") else 0.0
    if not np.isfinite(values).all() or values[0] == 0:
        raise UnusableError("an image whose rescale slope is zero or not finite")
    return values


def _spacing(value: Any) -> tuple[float, float]:
    rows_mm, columns_mm = (float(v) for v in value)
    if not (0 < rows_mm < 1000 and 0 < columns_mm < 1000):
        raise UnusableError("an image without positive pixel spacing")
    return rows_mm, columns_mm


def _vectors(position: Any, orientation: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p, o = np.array([float(v) for v in position]), np.array([float(v) for v in orientation])
    if p.shape != (3,) or o.shape != (6,) or not (np.isfinite(p).all() and np.isfinite(o).all()):
        raise UnusableError("an image whose position or orientation is no number")
    row, column = o[:3], o[3:]
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise UnusableError("an image whose directions are not perpendicular unit vectors")
    return p, row, column
