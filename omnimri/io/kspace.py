"""Cartesian k-space: fastMRI's HDF5, ISMRMRD, complex NIfTI, NumPy and BART's pair of files. Reading runs in the decoding child.

Shapes: S slices, c coils, H rows (readout), W columns (phase encoding).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .ismrmrd import NO_TRAJECTORY, header_of, layout_of, read_ismrmrd
from .raw import SPREAD, Raw, focus, inside, slab_of
from .series import MAX_VOXELS, UnusableError, check_shape

if TYPE_CHECKING:
    from ..volume import KSpace

UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError, MemoryError, OverflowError, SystemError)
AXES = ("slices", "coils", "height", "width")
BART_AXES = {"read": 0, "phase": 1, "partition": 2, "coil": 3, "slice": 13}
"""Of BART's sixteen dimensions, those that may be larger than 1 here."""


def read_kspace(path: Path, kind: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
    """Slices of a file, as `raw.slab_of` tells.

    Args:
        path: The file; BART's header, with its data beside it.
        kind: `HDF5`, `NIfTI`, `NumPy` or `BART`.
        request: `first` slice, `axes` of a NumPy array, paths of a `mask` and of `coils` in NumPy files, `most` samples at once.

    Raises:
        UnusableError: no such array, an array outside the file, wrong shape, too large, or damaged.
    """
    request = request or {}
    try:
        raw = _OPEN[kind](path, request)
        if request.get("mask"):
            raw.mask = _load(Path(request["mask"]), "mask")
            if raw.mask.dtype.kind not in "biuf" or raw.mask.ndim not in (1, 2):
                raise UnusableError("expected a mask of ones and zeros with one or two axes, got another array")
        if request.get("coils"):
            given = _arranged(_load(Path(request["coils"]), "sensitivity"), request.get("axes"), "sensitivities")
            raw.coils = lambda a, b: given[a:b]
        found = slab_of(raw, int(request.get("first", 0)), int(request.get("most", MAX_VOXELS)))
        if kind == "NIfTI" and min(focus(found["data"], a) for a in (2, 3)) < SPREAD:
            raise UnusableError("expected k-space or a real image, got a complex image; export a magnitude image")
        return found
    except (UnusableError, MemoryError):
        raise
    except UNREADABLE as error:
        raise UnusableError(f"expected a {kind} file of k-space, got one that cannot be read ({type(error).__name__}); "
                            "export it again") from None


def _hdf5(path: Path, request: dict[str, Any]) -> Raw:
    import h5py

    f = h5py.File(path, "r", locking=False)
    if "kspace" in f:
        return _fastmri(f)
    if "dataset" in f and "data" in inside(f, "dataset"):
        return read_ismrmrd(path, inside(f, "dataset"))
    raise UnusableError("expected an array named 'kspace' (fastMRI) or 'dataset/data' (ISMRMRD) in the file, found neither")


def _fastmri(f: Any) -> Raw:
    """FastMRI's layout: `kspace`; where they are there, `mask`, `ismrmrd_header`, and of our own `affine`, `noise` and `coils`."""
    data = inside(f, "kspace")
    shape = tuple(int(n) for n in data.shape)
    if len(shape) not in (3, 4) or data.dtype.kind != "c":
        raise UnusableError(f"expected complex k-space (slices, [coils,] height, width), got {len(shape)} axes of kind {data.dtype.kind}")
    s, c, h, w = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    small: dict[str, np.ndarray] = {}
    for name in ("mask", "affine", "noise"):
        if name in f:
            member = inside(f, name)
            check_shape(member.shape, what="samples")
            small[name] = np.asarray(member)
    coils = inside(f, "coils") if "coils" in f else None
    header = header_of(_text(inside(f, "ismrmrd_header"))) if "ismrmrd_header" in f else {}
    spacing, crop = layout_of(header, h, w)
    return Raw((s, c, h, w), lambda a, b: np.asarray(data[a:b]).reshape(-1, c, h, w), mask=small.get("mask"), noise=small.get("noise"),
               affine=small["affine"].astype(np.float64) if "affine" in small else None, spacing_mm=spacing, crop=crop,
               coils=None if coils is None else lambda a, b: np.asarray(coils[a:b]))


def _text(member: Any) -> str:
    value = member[()]
    return (value if isinstance(value, bytes) else bytes(np.asarray(value).ravel()[0]))[: 2**20].decode("utf-8", "ignore")


def _load(path: Path, what: str) -> np.ndarray:
    """A NumPy array, mapped; never a pickle."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UnusableError(f"expected a NumPy file of {what} values, got one that cannot be read ({type(error).__name__})") from None


def _numpy(path: Path, request: dict[str, Any]) -> Raw:
    array = _load(path, "k-space")
    arranged = _arranged(array, request.get("axes"), "k-space")
    raw = Raw(arranged.shape, lambda a, b: np.asarray(arranged[a:b]))
    if not request.get("axes"):
        raw.warnings.append(f"the axes are taken as {', '.join(_usual(array.ndim))}; --axes states another order")
    return raw


def _usual(number: int) -> tuple[str, ...]:
    return AXES[4 - number :] if number != 3 else ("coils", "height", "width")


def _arranged(array: np.ndarray, axes: str | None, what: str) -> np.ndarray:
    """An array as (S, c, H, W), by the order that is stated or usual.

    Raises:
        UnusableError: it is not complex, or the order does not fit.
    """
    if array.dtype.kind != "c" or not 2 <= array.ndim <= 4:
        raise UnusableError(f"expected complex {what} with two to four axes, got {array.ndim} axes of kind {array.dtype.kind}")
    order = tuple(n.strip() for n in axes.split(",")) if axes else _usual(array.ndim)
    if len(order) != array.ndim or len(set(order)) != len(order) or not {"height", "width"} <= set(order) <= set(AXES):
        raise UnusableError(f"expected --axes with {array.ndim} of {', '.join(AXES)}, height and width among them; "
                            f"got {len(order)} or other names")
    turned = array.transpose([order.index(n) for n in AXES if n in order])
    return turned[tuple(slice(None) if n in order else None for n in AXES)]


def _nifti(path: Path, request: dict[str, Any]) -> Raw:
    """Complex NIfTI: (width, height, slices, coils), with the affine of the image."""
    import nibabel

    image: Any = nibabel.load(path)
    shape = (*(int(n) for n in image.shape), 1, 1)[:4]
    if len(image.shape) not in (3, 4) or np.dtype(image.get_data_dtype()).kind != "c":
        raise UnusableError("expected complex NIfTI with axes width, height, slices and coils, got others")
    check_shape(shape, what="samples")
    w, h, s, c = shape
    unit = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)

    def read(begin: int, end: int) -> np.ndarray:
        return np.asarray(image.dataobj[:, :, begin:end]).reshape(w, h, end - begin, c).transpose(2, 3, 1, 0)

    return Raw((s, c, h, w), read, affine=np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, dtype=np.float64))


def _bart(path: Path, request: dict[str, Any]) -> Raw:
    """BART's .hdr and .cfl: readout, phase encoding, coils in dimension 3 and slices in dimension 13, the first fastest."""
    lines = path.read_bytes()[:4096].decode("ascii", "ignore").splitlines()
    sizes = [int(n) for n in lines[1].split()] if len(lines) > 1 else []
    sizes += [1] * (16 - len(sizes))
    data = path.with_suffix(".cfl")
    if not data.is_file():
        raise UnusableError("expected BART's data (.cfl) beside its header (.hdr), found none; bring both")
    if sizes[0] == 1 and sizes[2] > 1:
        raise UnusableError(NO_TRAJECTORY.format("BART's layout of samples and spokes"))
    if sizes[2] > 1:
        raise UnusableError("expected 2-D encoding, got 3-D; transform the partition axis first (bart fft -i 4)")
    if any(n > 1 for d, n in enumerate(sizes) if d not in BART_AXES.values()):
        raise UnusableError("expected readout, phase, coil and slice dimensions only, got more; choose one of each with bart slice")
    h, w, _, c, s = (sizes[d] for d in BART_AXES.values())
    check_shape((h, w, c, s), what="samples")
    if data.stat().st_size != 8 * h * w * c * s:
        raise UnusableError(f"expected {8 * h * w * c * s} bytes of BART data, got {data.stat().st_size}; copy it again")
    array = np.memmap(data, np.complex64, "r", shape=(h, w, c, s), order="F")
    return Raw((s, c, h, w), lambda a, b: array[..., a:b].transpose(3, 2, 0, 1))


_OPEN = {"HDF5": _hdf5, "NumPy": _numpy, "NIfTI": _nifti, "BART": _bart}


def write_kspace(path: Path, kspace: KSpace) -> None:
    """Write k-space so that `read_kspace` reads it back."""
    import h5py

    with h5py.File(path, "w") as f:
        f["kspace"] = kspace.data.numpy()
        f["mask"] = kspace.mask.numpy()
        f["affine"] = kspace.affine.numpy()
