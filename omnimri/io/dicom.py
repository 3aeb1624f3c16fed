"""DICOM: instances -> frames -> volumes; classic, enhanced multi-frame and mosaic MR. Geometry from positions only.

No free text is kept; what a header may tell is in `headers.py`. Runs in the decoding child.
"""

from __future__ import annotations

import mmap
import re
import struct
import tempfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .headers import (
    CSA_CREATOR,
    CSA_IMAGE_HEADER,
    ENHANCED,
    MOSAIC_IMAGES,
    class_of,
    codes,
    contrast_given,
    header_of,
    kind_of,
    number,
    parameters_of,
    sequence_of,
    tags,
    uid,
)
from .series import Contents, Series, UnusableError, check_affine, check_shape, decoding

NATIVE = {"1.2.840.10008.1.2": True, "1.2.840.10008.1.2.1": False}
"""Uncompressed little-endian transfer syntaxes, and whether value types are implicit."""
DEFLATED = "1.2.840.10008.1.2.1.99"
GDCM = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81))
"""JPEG and JPEG-LS, which pydicom alone cannot decode. GDCM gets nothing else: a damaged RLE of 4 kB takes it 4 GB."""
SOF = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]\0..(.{5})", re.DOTALL)
"""The frame header of JPEG and JPEG-LS: rows, columns, components, which GDCM believes."""
PIXEL_DATA = 0x7FE00010
KEYS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
"""What tells series apart; none of it leaves."""
MAX_INFLATED = 2**30
MAX_FRAMES = 100_000
MAX_PIXELS_PER_BYTE = 4096
"""No compression of an image with contrast does better: more is a lie about its size."""
EVEN = 0.1
"""Share of the slice distance by which gaps may differ."""


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


def read_dicom(paths: list[Path]) -> Contents:
    """Every MR image of the instances, and sentences on the others."""
    found, broken = Contents(), 0
    junk: dict[str, int] = defaultdict(int)
    series: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    frames = 0
    for path in paths:
        try:
            header, offset = read_header(path)
            what = class_of(header)
            if what == "MR image":
                made = frames_of(path, header, offset)
                frames += len(made)
                key = tuple(str(header.get(k, "")) for k in KEYS)
                series[key].extend(made)
                if not made:
                    what = "MR instance without pixels or position"
        except UnusableError as error:
            junk[str(error)] += 1
            continue
        except Exception:  # pydicom raises many kinds on hostile bytes; none of their text may leave
            broken += 1
            continue
        if frames > MAX_FRAMES:
            raise UnusableError(f"expected at most {MAX_FRAMES} images, got more; choose one study")
        if what != "MR image" or not made:
            junk[what] += 1
    found.passed_over += [f"{n} x {words}" if n > 1 else words for words, n in sorted(junk.items())]
    if broken:
        found.passed_over.append(f"{broken} damaged DICOM file{'s' if broken > 1 else ''}")
    patients = {k: n for n, k in enumerate(dict.fromkeys(key[:2] for key in series))}
    spaces = {k: n for n, k in enumerate(dict.fromkeys(key[3] for key in series))}
    for k, (key, members) in enumerate(series.items()):
        for volume in volumes_of(members, found.passed_over):
            volume.group = k
            volume.patient, volume.frame = patients[key[:2]], spaces[key[3]]
            found.series.append(volume)
    return found


def read_header(path: Path) -> tuple[dict[Any, Any], int]:
    """Whitelisted header fields (see `headers.header_of`), and where Pixel Data begins.

    Raises:
        UnusableError: a deflated file inflates beyond its limit.
    """
    import pydicom
    from pydicom.filereader import _read_file_meta_info, data_element_generator, read_preamble

    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data: Any = mapped
        syntax = _plain_syntax(data)
        if syntax:  # Without the data sets that pydicom makes around the elements, in half the time.
            elements = data_element_generator(data, NATIVE[syntax], True, lambda tag, *_: tag >= PIXEL_DATA, specific_tags=list(tags()))
            return header_of(elements) | {"TransferSyntaxUID": syntax}, data.tell()
        if data.find(DEFLATED.encode()) >= 0:
            read_preamble(data, force=True)
            if str(_read_file_meta_info(data).get("TransferSyntaxUID", "")) == DEFLATED:
                inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                if len(inflate.decompress(data.read(), MAX_INFLATED + 1)) > MAX_INFLATED:
                    raise UnusableError("expected an image file, got one that inflates beyond its limit")
            data.seek(0)
        dataset = pydicom.dcmread(data, force=True, stop_before_pixels=True, specific_tags=list(tags()))
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
        return header_of(dataset.values()) | {"TransferSyntaxUID": syntax}, data.tell() if syntax in NATIVE else 0


def _plain_syntax(data: Any) -> str:
    """The transfer syntax of an open file with preamble, left after its meta group, if `NATIVE` and true; or nothing, left at 0."""
    from pydicom.filereader import data_element_generator

    if data[128:132] == b"DICM":
        data.seek(132)
        meta = {int(e.tag): e.value for e in data_element_generator(data, False, True, lambda tag, *_: tag >> 16 != 2)}
        syntax = bytes(meta.get(0x00020010) or b"").rstrip(b"\0 ").decode("ascii", "replace")
        kind = data[data.tell() + 4 : data.tell() + 6]
        if syntax in NATIVE and NATIVE[syntax] != (kind.isalpha() and kind.isupper()):
            return syntax
    data.seek(0)
    return ""


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


SAME = (*(0.01,) * 6, 0.001, 0.001, 0.1, 1.0)
"""By how much images of one volume may differ in the components of row and column, pixel spacing (mm), echo time (ms) and b (s/mm2)."""


def _numbers(f: Frame) -> tuple[float, ...]:
    """What `SAME` compares."""
    echo, b = f.parameters.get("echo_time_ms", 0.0), f.parameters.get("b_value_s_per_mm2", 0.0)
    return (*f.row.tolist(), *f.column.tolist(), *f.spacing, echo, b)


def volumes_of(frames: list[Frame], passed_over: list[str]) -> list[Series]:
    """The volumes of one series: told apart by kind, orientation, size, stack, echo, b-value and repetition."""
    groups: dict[tuple[Any, ...], list[Frame]] = {}
    for f in frames:
        mine = _numbers(f)
        # Against the first of a group and not by rounding, which parts neighbours at its edges.
        known = next((m for m in groups.values() if (m[0].kind, m[0].size, m[0].stack) == (f.kind, f.size, f.stack)
                      and all(abs(x - y) <= off for x, y, off in zip(mine, _numbers(m[0]), SAME, strict=True))), None)
        if known is not None:
            known.append(f)
            continue
        groups[(f.kind, mine[:6], (*f.size, *mine[6:8]), f.stack, round(mine[8], 1), round(mine[9]))] = [f]
    kinds = {k[:4] for k in groups}
    echoes, bs = sorted({k[4] for k in groups}), sorted({k[5] for k in groups})
    made = []
    for key, members in groups.items():
        words = []
        if len(echoes) > 1 and len(kinds) < len(groups):
            words.append(f"echo {echoes.index(key[4]) + 1} of {len(echoes)}")
        if len(bs) > 1:
            words.append(f"b {key[5]:g} s/mm2")
        told_apart = repeats(members)
        if left := len(members) - sum(len(stack) for *_, stack in told_apart):
            passed_over.append(f"{key[0]}: {left} image{'s' if left > 1 else ''} of an incomplete repetition")
        for repeat, of, stack in told_apart:
            told = [*words, f"volume {repeat} of {of}"] if of > 1 else words
            try:
                with decoding("a readable DICOM series"):
                    made.append(stack_frames(stack, ", ".join(told)))
            except UnusableError as error:
                passed_over.append(f"{key[0]} of {len(stack)} slice{'s' if len(stack) > 1 else ''}: {error}")
    return made


def repeats(frames: list[Frame]) -> list[tuple[int, int, list[Frame]]]:
    """(number, of how many, frames): images that share their positions are repetitions, in the order they were taken."""
    normal = np.cross(frames[0].row, frames[0].column)
    at: dict[float, list[Frame]] = defaultdict(list)
    for f in sorted(frames, key=lambda f: f.order):
        at[round(float(f.position @ normal), 2)].append(f)
    counts = {len(v) for v in at.values()}
    if len(counts) == 1:
        of = counts.pop()
        return [(k + 1, of, [v[k] for v in at.values()]) for k in range(of)]
    return [(1, 1, [v[0] for v in at.values()])]


def stack_frames(frames: list[Frame], variant: str) -> Series:
    """One volume of frames with one orientation and one size, each at a position of its own.

    Raises:
        UnusableError: slices are unevenly spaced or do not lie on one line.
    """
    first = frames[0]
    normal = np.cross(first.row, first.column)
    kept = sorted(frames, key=lambda f: float(f.position @ normal))
    positions = np.array([f.position for f in kept])
    warnings = []
    if len(kept) > 1:
        gaps = np.diff(positions @ normal)
        usual, mean = float(np.median(gaps)), float(gaps.mean())
        if np.abs(gaps - mean).max() > EVEN * mean:
            missing = int(np.round(gaps / usual - 1).clip(0).sum()) if usual > 0 else 0
            why = f"{missing} slice{'s seem' if missing > 1 else ' seems'} to be missing" if missing else "are two stacks mixed?"
            raise UnusableError(f"expected evenly spaced slices, got gaps from {gaps.min():.2f} to {gaps.max():.2f} mm; {why}")
        step = (positions[-1] - positions[0]) / (len(kept) - 1)
        line = positions[0] + np.arange(len(kept))[:, None] * step
        if np.linalg.norm(positions - line, axis=1).max() > 2 * EVEN * max(usual, 1.0):
            raise UnusableError("expected slices along one line, got positions beside it; export the series again")
        lean = np.degrees(np.arccos(np.clip(abs(step @ normal) / np.linalg.norm(step), 0, 1)))
        if lean > 1:
            warnings.append(f"slices are sheared by {lean:.0f} degrees (tilted gantry or oblique export); the geometry is kept")
    else:
        thickness = number(first.header.get("SliceThickness")) or 1.0
        step = normal * thickness
        warnings.append("a single slice: its thickness is taken from the header")
    rows, columns = first.size
    check_shape((columns, rows, len(kept)))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = first.row * first.spacing[1], first.column * first.spacing[0], step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # DICOM's LPS+ to RAS+
    scanning = codes(first.header.get("ScanningSequence"))
    sequence = sequence_of(first.parameters, scanning=scanning, contrast=contrast_given(first.header), kind=first.kind)
    return Series(
        (columns, rows, len(kept)), check_affine(affine), lambda: decode(kept), "DICOM", kind=first.kind, variant=variant,
        sequence=sequence, parameters=first.parameters, warnings=warnings,
        source=tuple(uid(f.header.get("SOPInstanceUID")) for f in kept),
    )


def decode(frames: list[Frame]) -> np.ndarray:
    """(columns, rows, slices) in scanner units: float32, or as stored where all slices are of one type and none is rescaled.

    Raises:
        UnusableError: pixels are damaged, or compressed in a way that no decoder here knows.
    """
    rows, columns = frames[0].size
    stored = {_stored(f) for f in frames}
    plain = len(stored) == 1 and all(f.offset and (f.slope, f.intercept) == (1, 0) for f in frames)
    out = np.empty((columns, rows, len(frames)), stored.pop() if plain else np.float32, order="F")
    last: tuple[Path | None, Any] = (None, None)
    for f, section in zip(frames, out.transpose(2, 1, 0), strict=True):
        with decoding("decodable pixels"):
            if last[0] is not f.path:
                last = f.path, pixels_of(f)
            pixels = last[1]
            plane = pixels if pixels.ndim == 2 else pixels[f.number]
            if f.tiles:
                y, x = divmod(f.number, f.tiles)
                plane = pixels[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
            if plane.shape != (rows, columns):
                raise UnusableError(f"expected {rows} x {columns} pixels, got {' x '.join(map(str, plane.shape))}; export the series again")
            np.copyto(section, plane, casting="unsafe")
            if not plain:
                section *= np.float32(f.slope)
                section += np.float32(f.intercept)
    return out


def _stored(f: Frame) -> np.dtype[Any]:
    """The type of an instance's uncompressed values; float32 where no array has such."""
    bits, signed = int(f.header["BitsAllocated"]), int(f.header.get("PixelRepresentation") or 0)
    return np.dtype(f"<{'i' if signed else 'u'}{bits // 8}" if bits in (8, 16, 32) else np.float32)


def pixels_of(f: Frame) -> np.ndarray:
    """All stored values of an instance: (rows, columns) or (frames, rows, columns)."""
    h = f.header
    stored, frames = _stored(f), int(h.get("NumberOfFrames") or 1)
    shape: tuple[int, ...] = (int(h["Rows"]), int(h["Columns"]))
    shape = (frames, *shape) if frames > 1 else shape
    check_shape(shape)
    if np.prod(shape) > MAX_PIXELS_PER_BYTE * f.path.stat().st_size:
        raise UnusableError("expected as many pixels as the header says, got far too few bytes for them; copy the file again")
    if f.offset and stored.kind != "f":
        with f.path.open("rb") as file:
            file.seek(f.offset)
            start = 8 if NATIVE[h["TransferSyntaxUID"]] else 12
            unused = 8 * stored.itemsize - int(h.get("BitsStored") or 8 * stored.itemsize)
            low = unused > 0 and int(h.get("HighBit") or 0) + 1 + unused == 8 * stored.itemsize  # values begin at the lowest bit
            if file.read(start)[:4] == b"\xe0\x7f\x10\x00" and (low or unused == 0):
                values = np.frombuffer(file.read(int(np.prod(shape)) * stored.itemsize), stored).reshape(shape)
                # Bits above the stored ones are no part of a value: older scanners keep an overlay there.
                return values << unused >> unused if unused else values
    import pydicom

    whole = pydicom.dcmread(f.path, force=True)
    try:
        return whole.pixel_array
    except RuntimeError:  # no decoder of its own, or one that gave up
        if h["TransferSyntaxUID"] not in GDCM:
            raise
        return _with_gdcm(whole, list(pydicom.encaps.generate_frames(whole.PixelData, number_of_frames=frames)))


def _with_gdcm(whole: Any, frames: list[bytes]) -> np.ndarray:
    """What pydicom's own decoders do not know (JPEG, JPEG-LS), through SimpleITK's GDCM, which believes whatever lengths it reads:
    it gets a file with nothing in it but frames of the size that the header says.
    """
    import pydicom
    import SimpleITK as sitk  # noqa: N813

    for frame in frames:
        begun = SOF.search(frame)
        if not begun or struct.unpack(">HHB", begun[1]) != (whole.Rows, whole.Columns, 1):
            raise UnusableError("expected frames of the size that the header says, got damaged ones; export the series again")
    bare = pydicom.Dataset()
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(bare, name, int(whole[name].value))
    bare.SamplesPerPixel, bare.PhotometricInterpretation, bare.NumberOfFrames = 1, "MONOCHROME2", len(frames)
    bare.SOPClassUID, bare.SOPInstanceUID = pydicom.uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage, pydicom.uid.generate_uid()
    bare.PixelData = pydicom.encaps.encapsulate(frames)
    bare["PixelData"].VR = "OB"
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = whole.file_meta.TransferSyntaxUID
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        bare.save_as(file.name, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file.name)
        pixels = sitk.GetArrayFromImage(reader.Execute())
    return pixels[0] if pixels.shape[0] == 1 else pixels
