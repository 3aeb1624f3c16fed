"""ISMRMRD: readouts of a raw data file (`dataset/data`, `dataset/xml`; Inati et al., MRM 2017) sorted into Cartesian k-space.

Reading runs in the decoding child.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .raw import Raw, inside
from .series import UnusableError

if TYPE_CHECKING:
    from collections.abc import Callable

NOISE = 1 << 18
"""Flag ACQ_IS_NOISE_MEASUREMENT (bit 19), and from there to 27 other readouts that are no image lines."""
NO_IMAGE = sum(1 << (bit - 1) for bit in (19, 20, 23, 24, 25, 26, 27, 28, 29))
NO_TRAJECTORY = "expected Cartesian k-space, got {}; grid it first, for instance with BART (bart nufft, or bart pics -t)"


def header_of(text: str) -> dict[str, tuple[float, float, float]]:
    """Matrix sizes and fields of view, mm, of the encoded and the shown image: `encodedSpace.matrixSize` and so on.

    Raises:
        UnusableError: the trajectory is not Cartesian.
    """
    kind = re.search(r"<trajectory>\s*(\w+)\s*</trajectory>", text)
    if kind and kind[1].lower() != "cartesian":
        raise UnusableError(NO_TRAJECTORY.format("another trajectory"))
    found = {}
    for space in ("encodedSpace", "reconSpace"):
        part = re.search(rf"<{space}>(.*?)</{space}>", text, re.DOTALL)
        for name in ("matrixSize", "fieldOfView_mm"):
            three = part and re.search(rf"<{name}>\s*" + r"\s*".join(rf"<{c}>\s*([\d.eE+-]+)\s*</{c}>" for c in "xyz"), part[1])
            if three:
                found[f"{space}.{name}"] = tuple(_number(v) for v in three.groups())
    return {k: v for k, v in found.items() if all(0 < n < 1e5 for n in v)}  # type: ignore[misc]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def read_ismrmrd(path: Path, group: Any) -> Raw:
    """Readouts sorted into (slices, coils, readout, phase encoding); averages are summed, the first of other counters is kept.

    Raises:
        UnusableError: not 2-D Cartesian, or damaged.
    """
    text = bytes(np.asarray(inside(group, "xml")).ravel()[0])[: 2**20].decode("utf-8", "ignore")
    header = header_of(text)
    if "encodedSpace.matrixSize" not in header:
        raise UnusableError("expected the encoded matrix size in the ISMRMRD header, found none")
    x, y, z = (int(v) for v in header["encodedSpace.matrixSize"])
    if z > 1:
        raise UnusableError("expected 2-D encoding, got 3-D; transform the partition axis first")
    heads, line_of = _readouts(path, inside(group, "data"))
    flags = heads["flags"].astype(np.uint64)
    keep = np.nonzero((flags & np.uint64(NO_IMAGE)) == 0)[0]
    if not len(keep):
        raise UnusableError("expected readouts of an image, got noise or calibration only")
    index = heads["idx"]
    first_of = ("contrast", "phase", "repetition", "set")
    keep = keep[np.all([index[c][keep] == 0 for c in first_of], 0) & (index["kspace_encode_step_1"][keep] < y)]
    coils = int(heads["active_channels"][keep].max(initial=0))
    samples, first = heads["number_of_samples"].astype(int), x // 2 - heads["center_sample"].astype(int)
    keep = keep[(heads["active_channels"][keep] == coils) & (first[keep] >= 0) & (first[keep] + samples[keep] <= x)]
    slices = int(index["slice"][keep].astype(int).max(initial=-1)) + 1
    mask = np.zeros((1, y), bool)
    mask[0, index["kspace_encode_step_1"][keep]] = True

    def samples_of(k: int) -> np.ndarray:
        line = line_of(k)
        if line.size != samples[k] * coils:
            raise UnusableError("expected as many samples as a readout's header says, got others; the file is damaged")
        return line.reshape(coils, samples[k])

    def read(begin: int, end: int) -> np.ndarray:
        out = np.zeros((end - begin, coils, x, y), np.complex64)
        for k in keep[(index["slice"][keep] >= begin) & (index["slice"][keep] < end)].tolist():
            step = int(index["kspace_encode_step_1"][k])
            out[int(index["slice"][k]) - begin, :, first[k] : first[k] + samples[k], step] += samples_of(k)
        return out

    silent = [k for k in np.nonzero(flags & np.uint64(NOISE))[0].tolist() if int(heads["active_channels"][k]) == coils][:64]
    noise = np.concatenate([samples_of(k) for k in silent], 1) if silent else None
    if noise is not None and "sample_time_us" in (heads.dtype.names or ()):
        # Noise grows with the square root of the bandwidth, which falls with the dwell time.
        ratio = float(heads["sample_time_us"][silent[0]]) / max(float(heads["sample_time_us"][keep[0]]), 1e-9)
        noise = noise * np.float32(np.sqrt(ratio) if 1e-3 < ratio < 1e3 else 1.0)
    spacing, crop = layout_of(header, x, y)
    return Raw((slices, coils, x, y), read, mask=mask, noise=noise, spacing_mm=spacing, crop=crop, places=_places(heads, keep, slices))


def layout_of(
    header: dict[str, tuple[float, float, float]], rows: int, columns: int
) -> tuple[tuple[float, float, float] | None, tuple[int, int] | None]:
    """Pixel size (row, column, slice) in mm, and the rows and columns of the image that the scanner would show."""
    whole, shown = (header.get(f"{space}.fieldOfView_mm") for space in ("encodedSpace", "reconSpace"))
    if whole is None:
        return None, None
    row, column = whole[0] / rows, whole[1] / columns
    if shown is None:
        return (row, column, whole[2]), None
    return (row, column, shown[2]), (min(rows, max(1, round(shown[0] / row))), min(columns, max(1, round(shown[1] / column))))


def _places(heads: np.ndarray, keep: np.ndarray, slices: int) -> np.ndarray | None:
    """(slices, 4, 3): middle, and directions of readout, phase encoding and slice, of each slice in the patient's LPS mm."""
    names = ("position", "read_dir", "phase_dir", "slice_dir")
    if not set(names) <= set(heads.dtype.names or ()):
        return None
    first = [keep[np.nonzero(heads["idx"]["slice"][keep] == s)[0][:1]] for s in range(slices)]
    if any(len(f) == 0 for f in first):
        return None
    return np.stack([np.stack([heads[n][f[0]].astype(np.float64) for n in names]) for f in first])


def _readouts(path: Path, rows: Any) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """Headers of all readouts, and the samples of the k-th, taken from the file's bytes as HDF5's format specification says.

    HDF5's own reader of values of drawn length (library 1.14) reads them all even where headers alone are asked for, believes any
    length, and on some damaged files never ends.
    """
    import h5py

    damaged = UnusableError("expected readouts where the file says they are, got a cut off or damaged file; write it again")
    kind = rows.id.get_type()
    member = {kind.get_member_name(i): i for i in range(kind.get_nmembers())}
    values, begin = kind.get_member_type(member[b"data"]), kind.get_member_offset(member[b"data"])
    plan = rows.id.get_create_plist()
    file = rows.file.id.get_create_plist()
    if rows.ndim != 1 or values.get_class() != h5py.h5t.VLEN or values.get_super().dtype.str != "<f4" or plan.get_nfilters() \
            or file.get_sizes() != (8, 8) or file.get_userblock():
        raise UnusableError("expected a plain list of readouts, got another or a compressed one; write it with the ISMRMRD library")
    data = np.memmap(path, mode="r").data
    row = np.dtype({"names": ["head", "length", "heap", "index"], "itemsize": kind.get_size(), "formats":
                    [kind.get_member_type(member[b"head"]).dtype, "<u4", "<u8", "<u4"], "offsets":
                    [kind.get_member_offset(member[b"head"]), begin, begin + 4, begin + 12]})
    if rows.shape[0] * row.itemsize > len(data):
        raise damaged
    table = np.zeros(rows.shape[0], row)
    if plan.get_layout() == h5py.h5d.CONTIGUOUS:
        table[:] = np.frombuffer(data, row, len(table), rows.id.get_offset())
    else:
        chunks: list[Any] = []
        rows.id.chunk_iter(chunks.append)
        for chunk in chunks:
            part = table[chunk.chunk_offset[0]:][: plan.get_chunk()[0]]
            part[:] = np.frombuffer(data, row, len(part), chunk.byte_offset)
    heaps: dict[int, dict[int, tuple[int, int]]] = {}
    left = len(data) // 16

    def line_of(k: int) -> np.ndarray:
        nonlocal left
        heap, index = int(table["heap"][k]), int(table["index"][k])
        if heap not in heaps:
            at, end = heap + 16, heap + int.from_bytes(data[heap + 8 : heap + 16], "little")
            if end > len(data) or data[heap : heap + 4] != b"GCOL":
                raise damaged
            heaps[heap] = {}
            while at + 16 <= end:
                name, size = struct.unpack_from("<H6xQ", data, at)
                left -= 1
                if not name:  # what is left is free
                    break
                if at + 16 + size > end or left < 0:
                    raise damaged
                heaps[heap][name] = (at + 16, size)
                at += 16 + -(-size // 8) * 8
        at, size = heaps[heap].get(index, (0, 0))
        if not 0 < 4 * int(table["length"][k]) <= size:
            raise damaged
        return np.frombuffer(data, "<f4", int(table["length"][k]), at).view(np.complex64)

    return table["head"], line_of
