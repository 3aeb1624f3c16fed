"""What SimpleITK decodes (NRRD, MetaImage), and pictures (PNG, JPEG), which have no geometry. Runs in the decoding child."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

from .series import Series, UnusableError, check_affine, check_shape

MAX_HEADER_BYTES = 2**20
SIZES = {"int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8, "float": 4, "double": 8}
DETACHED = re.compile(rb"^\s*(data ?file|ElementDataFile)\s*[:=]+\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)
"""Where a header names another file for its voxels."""
AXES = re.compile(rb"NDims\s*[=:]?\s*(\S*)")
"""MetaImage's number of axes, which ITK counts up to before it looks at it."""


def read_with_itk(path: Path, file_format: str) -> list[Series]:
    """The image of an NRRD or MetaImage file, or each volume of a 4-D one.

    Args:
        path: Its suffix must be the usual one of `file_format`.
        file_format: `NRRD` or `MetaImage`.

    Raises:
        UnusableError: header unreadable, voxels in another file out of reach, not 3-D or 4-D, or not real.
    """
    import SimpleITK as sitk  # noqa: N813

    with path.open("rb") as f:
        header = f.read(MAX_HEADER_BYTES)
    header = header.split(b"\n\n", 1)[0] if file_format == "NRRD" else header[: header.find(b"ElementDataFile") + 300]
    if not set(AXES.findall(header)) <= {b"2", b"3", b"4"}:
        raise UnusableError("expected a 3-D or 4-D image, got a header with another number of axes; export one volume")
    for _, named in DETACHED.findall(header):
        beside = path.parent / Path(named.decode("latin-1")).name
        if named.upper() in (b"LOCAL",):
            continue
        odd = any(c in named for c in (b"/", b"\\", b"%")) or named.upper().startswith(b"LIST")
        if odd or not beside.is_file() or beside.is_symlink():
            raise UnusableError(f"expected a {file_format} file with its voxels in it or in a plain file beside it, got one that points "
                           "elsewhere; save it as one file (.nrrd, .mha)")
    reader = sitk.ImageFileReader()
    reader.SetImageIO({"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}[file_format])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = tuple(int(n) for n in reader.GetSize())
        parts, dimension = reader.GetNumberOfComponents(), reader.GetDimension()
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID()).lower()
        spacing, origin, direction = reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()
    except RuntimeError as error:  # its text holds the path and the header
        raise UnusableError(f"expected a {file_format} image, got a file whose header cannot be read ({type(error).__name__}); "
                       "export it again") from None
    if dimension not in (2, 3, 4) or "complex" in kind or "label" in kind:
        raise UnusableError(f"expected a 3-D or 4-D image of real intensities, got {dimension}-D; export one volume")
    volumes = parts * (shape[3] if dimension == 4 else 1)
    space = (*shape[:3], 1)[:3] if dimension == 2 else shape[:3]
    check_shape(space)
    check_shape((volumes, *space), what="values")
    affine = np.eye(4)
    turn = np.array(direction).reshape(dimension, dimension)
    k = min(3, dimension)
    affine[:k, :k] = turn[:k, :k] * np.array(spacing[:k])
    affine[:k, 3] = origin[:k]
    affine[:2] *= -1  # ITK's LPS+ to RAS+
    affine = check_affine(affine)

    @functools.cache
    def whole() -> np.ndarray:
        try:
            array = sitk.GetArrayFromImage(reader.Execute())
        except (RuntimeError, MemoryError) as error:
            raise UnusableError(f"expected {int(np.prod(space))} voxels, got a truncated or damaged file ({type(error).__name__}); "
                           "copy it again") from None
        array = np.moveaxis(array, -1, 0) if parts > 1 else array
        return array.reshape(volumes, *reversed(space))

    def decode(volume: int) -> np.ndarray:
        return whole()[volume].transpose(2, 1, 0)

    found = []
    oriented = dimension > 2 and _tells_sides(header, file_format)
    for v in range(volumes):
        found.append(Series(space, affine, functools.partial(decode, v), file_format, oriented=oriented,
                            variant=f"volume {v + 1} of {volumes}" if volumes > 1 else ""))
        if dimension == 2:
            found[-1].warnings.append("a flat picture has no place in the scanner: sides are unknown")
    return found


def _tells_sides(header: bytes, file_format: str) -> bool:
    """Whether a NRRD or MetaImage header gives directions in the patient; ITK takes its own for those that are not there."""
    if file_format == "NRRD":
        space = rb"^space: *(?:(?:left|right)-(?:anterior|posterior)-superior|[lr][ap]s)(?:-time)?\s*$"
        return bool(re.search(space, header, re.MULTILINE | re.IGNORECASE) and re.search(rb"^space directions:", header, re.MULTILINE))
    return bool(re.search(rb"^(?:TransformMatrix|Rotation|Orientation|AnatomicalOrientation) *=", header, re.MULTILINE))


def read_picture(path: Path, file_format: str) -> list[Series]:
    """A PNG or JPEG as one slice of 1 mm pixels: it has no geometry, so sides and sizes are unknown.

    Raises:
        UnusableError: it cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # Our own budget is checked before pixels are decoded.
    try:
        picture = Image.open(path, formats=[file_format])
        columns, rows = picture.size
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UnusableError(f"expected a {file_format} picture, got a file that cannot be read ({type(error).__name__})") from None
    check_shape((columns, rows, 1))

    def decode() -> np.ndarray:
        try:
            return np.asarray(picture.convert("F"), dtype=np.float32).T[:, ::-1, None]
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise UnusableError(f"expected a whole picture, got a truncated or damaged one ({type(error).__name__})") from None

    told = "a picture has no geometry: 1 mm pixels and an axial slice are assumed, sizes mean nothing, and sides are unknown"
    return [Series((columns, rows, 1), np.diag([-1.0, 1.0, 1.0, 1.0]), decode, file_format, oriented=False, warnings=[told])]
