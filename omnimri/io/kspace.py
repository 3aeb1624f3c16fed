"""Cartesian k-space in HDF5: fastMRI's layout (`kspace`, optional `mask`) or ISMRMRD's (`dataset/data`, `dataset/xml`).

Reading runs in the decoding child.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .series import UnusableError, check_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..volume import KSpace

UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError, MemoryError, OverflowError, SystemError)
NOISE = 1 << 18
"""ISMRMRD flag ACQ_IS_NOISE_MEASUREMENT (bit 19), and from there to 27 other readouts that are no image lines."""
NO_IMAGE = sum(1 << (bit - 1) for bit in (19, 20, 23, 24, 25, 26, 27, 28, 29))


def read_kspace(path: Path) -> dict[str, Any]:
    """`data` (S, coils, H, W) complex64, `mask`, `affine` and `warnings` of a file.

    Raises:
        UnusableError: no such array, an array outside the file, wrong shape, too large, or damaged.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as f:
            if "kspace" in f:
                data, mask, affine = _fastmri(f)
            elif "dataset" in f and "data" in _inside(f, "dataset"):
                data, mask, affine = _ismrmrd(path, _inside(f, "dataset"))
            else:
                raise UnusableError("expected an array named 'kspace' (fastMRI) or 'dataset/data' (ISMRMRD) in the file, found neither")
    except UnusableError:
        raise
    except UNREADABLE as error:
        raise UnusableError(f"expected an HDF5 file of k-space, got one that cannot be read ({type(error).__name__})") from None
    if not np.isfinite(data.view(np.float32)).all() or not data.any():
        raise UnusableError("expected finite k-space with signal, got NaN, infinity or zeros only")
    warnings = []
    if mask is None:
        mask = (data != 0).any((0, 1))
        lines = mask.any(0, keepdims=True)
        mask = lines if (mask == lines).all() else mask
    mask = mask.reshape(1, -1) if mask.ndim == 1 else mask
    if mask.shape[-1] != data.shape[-1] or mask.shape[0] not in (1, data.shape[-2]):
        raise UnusableError(f"expected a mask of {data.shape[-1]} columns, got {tuple(mask.shape)}")
    if affine is None or affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        affine = np.eye(4)
        warnings.append("the file gives no geometry: 1 mm voxels are assumed and sides are unknown")
    return {"data": data, "mask": mask, "affine": affine, "warnings": warnings}


def _inside(group: Any, name: str) -> Any:
    """A member that lies in this very file.

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


def _fastmri(f: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    data = _inside(f, "kspace")
    shape = tuple(int(n) for n in data.shape)
    if len(shape) not in (3, 4) or data.dtype.kind != "c":
        raise UnusableError(f"expected complex k-space (slices, [coils,] height, width), got {len(shape)} axes of kind {data.dtype.kind}")
    check_shape(shape, what="samples")
    values = np.asarray(data, dtype=np.complex64)
    small = {k: _inside(f, k) for k in ("mask", "affine") if k in f}
    for extra in small.values():
        check_shape(extra.shape, what="samples")
    mask = np.asarray(small["mask"]).astype(bool) if "mask" in small else None
    affine = np.asarray(small["affine"], dtype=np.float64) if "affine" in small else None
    return values[:, None] if values.ndim == 3 else values, mask, affine


def _ismrmrd(path: Path, group: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Readouts sorted into (slices, coils, readout, phase encoding); averages are summed, the first of other counters is kept."""
    text = bytes(np.asarray(_inside(group, "xml")).ravel()[0])[: 2**20].decode("utf-8", "ignore")
    kind = re.search(r"<trajectory>\s*(\w+)\s*</trajectory>", text)
    if kind and kind[1].lower() != "cartesian":
        raise UnusableError("expected Cartesian k-space, got another trajectory; grid it first, for instance with BART's nufft")
    sizes = re.search(r"<encodedSpace>\s*<matrixSize>\s*<x>(\d+)</x>\s*<y>(\d+)</y>\s*<z>(\d+)</z>", text)
    if not sizes:
        raise UnusableError("expected the encoded matrix size in the ISMRMRD header, found none")
    x, y, z = (int(v) for v in sizes.groups())
    if z > 1:
        raise UnusableError("expected 2-D encoding, got 3-D; transform the partition axis first")
    heads, line_of = _readouts(path, _inside(group, "data"))
    keep = np.nonzero((heads["flags"].astype(np.uint64) & np.uint64(NO_IMAGE)) == 0)[0]
    if not len(keep):
        raise UnusableError("expected readouts of an image, got noise or calibration only")
    index = heads["idx"]
    slices, coils = int(index["slice"][keep].max()) + 1, int(heads["active_channels"][keep].max())
    check_shape((slices, coils, x, y), what="samples")
    out, mask = np.zeros((slices, coils, x, y), np.complex64), np.zeros((1, y), bool)
    for k in keep.tolist():
        at = index[k]
        if any(int(at[c]) for c in ("contrast", "phase", "repetition", "set")) or int(at["kspace_encode_step_1"]) >= y:
            continue
        samples, channels = int(heads["number_of_samples"][k]), int(heads["active_channels"][k])
        first = x // 2 - int(heads["center_sample"][k])
        if channels != coils or not 0 <= first <= x - samples:
            continue
        line = line_of(k)
        if line.size != samples * channels:
            raise UnusableError("expected as many samples as a readout's header says, got others; the file is damaged")
        step = int(at["kspace_encode_step_1"])
        out[int(at["slice"]), :, first : first + samples, step] += line.reshape(channels, samples)
        mask[0, step] = True
    return out, mask, None


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


def write_kspace(path: Path, kspace: KSpace) -> None:
    """Write k-space so that `read_kspace` reads it back."""
    import h5py

    with h5py.File(path, "w") as f:
        f["kspace"] = kspace.data.numpy()
        f["mask"] = kspace.mask.numpy()
        f["affine"] = kspace.affine.numpy()
