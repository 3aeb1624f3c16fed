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
from pathlib import Path
from typing import Any

import numpy as np

from .frames import MAX_FRAMES, Frame, frames_of
from .headers import class_of, codes, contrast_given, header_of, number, sequence_of, tags, uid
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
MAX_PIXELS_PER_BYTE = 4096
"""No compression of an image with contrast does better: more is a lie about its size."""
EVEN = 0.1
"""Share of the slice distance by which gaps may differ."""


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
