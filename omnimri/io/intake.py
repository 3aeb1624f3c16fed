"""Intake: a path -> every series under it. Kinds are told by content and not by name. Runs in the decoding child."""

from __future__ import annotations

import gzip
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .dicom import read_dicom
from .images import read_picture, read_with_itk
from .kspace import read_kspace
from .nifti import is_complex, read_with_nibabel
from .series import MAX_FILE_BYTES, MAX_FILES, Contents, Series, UnusableError, decoding

MAX_RATIO = 200
"""Most that an archive's file may inflate by."""
MAX_TOTAL_BYTES = 8 * 2**30
MAX_DEPTH = 32
SUFFIX = {"NIfTI": ".nii", "Analyze": ".hdr", "MGH": ".mgh", "MINC": ".mnc", "PAR/REC": ".par", "NRRD": ".nrrd", "MetaImage": ".mha",
          "PNG": ".png", "JPEG": ".jpg"}
"""The name that each format's decoder expects."""
PAIRS = {".hdr": ".img", ".par": ".rec"}
"""Formats in two files: header and voxels."""
VOXEL_FILES = {".img", ".rec", ".raw", ".zraw", ".cfl"}


def read(path: Path, room: Path, kspace: dict[str, Any] | None = None) -> Contents:
    """Everything under a path.

    Args:
        path: A file, a folder, or a zip archive.
        room: An empty folder for what has to be unpacked.
        kspace: How k-space is to be read (`kspace.read_kspace`).

    Raises:
        UnusableError: nothing in it can be used, or it is hostile.
    """
    files = files_of(path, room)
    whole = files == [path]
    if not files:
        raise UnusableError("expected files of a study, got an empty folder or archive")
    found = _read_files(files, room, whole, kspace)
    if not found.series and found.kspace is None:
        told = "; ".join(found.passed_over[:8]) or "nothing that can be read"
        raise UnusableError(f"expected an MR image or k-space, got {told}")
    members: dict[int, list[Series]] = {}
    for series in found.series:
        members.setdefault(series.group, []).append(series)
    for number, group in enumerate(members.values(), 1):
        for k, series in enumerate(group, 1):
            series.name = f"{number}.{k}" if len(group) > 1 else str(number)
    return found


def files_of(path: Path, room: Path) -> list[Path]:
    """Every file of a study: of a folder, of a zip archive (unpacked into `room`), or the file itself.

    Raises:
        UnusableError: there is none, or it is hostile.
    """
    if path.is_dir():
        return list(_walk(path))
    if path.is_file() and kind_of_file(path) == "zip":
        return list(_unpack(path, room))
    if path.is_file():
        return [path]
    raise UnusableError("expected a file or folder, found none at the given path; check its spelling")


def kind_of_file(path: Path) -> str:
    """The format of a file by its first bytes; `other` where none is known, `gzip` for what is packed."""
    with path.open("rb") as f:
        start = f.read(544)
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path, "rb") as f:
                packed = _by_magic(f.read(544))
        except (OSError, EOFError, zlib.error) as error:
            raise UnusableError(f"expected a gzip file, got a truncated or damaged one ({type(error).__name__}); copy it again") from None
        return f"{packed} in gzip" if packed in ("NIfTI", "MGH", "Analyze", "DICOM") else "gzip of another kind"
    return _by_magic(start)


def _by_magic(b: bytes) -> str:
    marks = ((b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"NRRD000", "NRRD"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"CDF\x01", "MINC"),
             (b"CDF\x02", "MINC"), (b"\x89PNG\r\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"\x93NUMPY", "NumPy"), (b"# Dimensions", "BART"))
    for mark, kind in marks:
        if b.startswith(mark):
            return kind
    if b[128:132] == b"DICM":
        return "DICOM"
    if b[344:348] in (b"n+1\0", b"ni1\0") or b[4:12] in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        return "NIfTI"
    if b[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") and len(b) >= 348:
        return "Analyze"
    if b[:4] == b"\0\0\0\x01" and len(b) >= 284:
        return "MGH"
    if b.lstrip()[:10] in (b"ObjectType", b"NDims = 3\n", b"NDims = 2\n") or b.lstrip().startswith(b"NDims ="):
        return "MetaImage"
    if b.startswith(b"# === DATA DESCRIPTION FILE"):
        return "PAR/REC"
    # DICOM without preamble: the file meta group, or at once the identifying group.
    return "DICOM" if b[:4] in (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0") else "other"


def _read_files(files: list[Path], room: Path, whole: bool, kspace: dict[str, Any] | None) -> Contents:
    """The series of some files; those of DICOM are read together.

    Args:
        whole: There is only this file: what is wrong with it is told in full.
    """
    kinds = {}
    for path in files:
        try:
            kinds[path] = kind_of_file(path)
        except UnusableError as error:
            if whole:
                raise
            kinds[path] = str(error)
        except OSError:
            kinds[path] = "unreadable"
    left = MAX_TOTAL_BYTES
    for k, path in enumerate(files):
        if kinds[path] == "DICOM in gzip":
            files[k] = gunzip(path, room / f"gz{k}", left)
            left -= files[k].stat().st_size
            kinds[files[k]] = "DICOM"
    instances = [p for p in files if kinds[p] == "DICOM"]
    found = read_dicom(instances) if instances else Contents()
    passed: Counter[str] = Counter()
    taken = {p for h, v in PAIRS.items() for p in _partners(files, h, v)}
    for k, path in enumerate(p for p in files if kinds[p] != "DICOM"):
        kind = kinds[path]
        try:
            if whole and path.suffix.lower() == ".cfl" and path.with_suffix(".hdr").is_file():
                kind, path = "BART", path.with_suffix(".hdr")
            if kind in ("HDF5", "NumPy", "BART"):
                with decoding("readable k-space"):
                    if kind == "HDF5" and _is_minc(path):
                        _add(found, _read_image(path, "MINC", room / f"in{k}"))
                    else:
                        _take_kspace(found, path, kind, kspace)
            elif kind.removesuffix(" in gzip") in SUFFIX:
                with decoding(f"a readable {kind.removesuffix(' in gzip')} file"):
                    if kind.startswith("NIfTI") and is_complex(link := _link(path, f".nii{'.gz' * kind.endswith('gzip')}", room / f"c{k}")):
                        _take_kspace(found, link, "NIfTI", kspace)
                    else:
                        _add(found, _read_image(path, kind, room / f"in{k}"))
            elif path in taken or (not whole and path.suffix.lower() in VOXEL_FILES):
                continue
            elif kind == "zip":
                passed["an archive inside the archive or folder (not opened; unpack it first)"] += 1
            else:
                passed["a file of another kind" if kind in ("other", "gzip of another kind") else kind] += 1
        except UnusableError as error:
            if whole:
                raise
            passed[str(error)] += 1
    if whole and passed:
        raise UnusableError("expected NIfTI, MGH, NRRD, MetaImage, MINC, PAR/REC, DICOM, k-space (.h5, .npy, .cfl), PNG or JPEG, or a "
                       "folder or zip of them; got a file of another kind; convert the series first, for instance to NIfTI")
    found.passed_over += [f"{n} x {words}" if n > 1 else words for words, n in passed.items()]
    return found


def _add(found: Contents, volumes: list[Series]) -> None:
    """Take the volumes of one file in, as a series of their own."""
    group = 1 + max((s.group for s in found.series), default=-1)
    frame = 1 + max((s.frame for s in found.series), default=-1)
    for series in volumes:
        # Files without a frame of reference share the space that their affines tell.
        series.group, series.frame = group, min((s.frame for s in found.series if s.format != "DICOM"), default=frame)
    found.series += volumes


def _take_kspace(found: Contents, path: Path, kind: str, request: dict[str, Any] | None) -> None:
    """The first file of k-space."""
    if found.kspace is None:
        found.kspace = read_kspace(path, kind, request)
    else:
        found.passed_over.append("more k-space: only the first file is used")


def _is_minc(path: Path) -> bool:
    """Whether an HDF5 file is MINC-2, without links."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as f:
            minc = isinstance(f.get("minc-2.0", getlink=True), h5py.HardLink)
    except (OSError, RuntimeError) as error:
        raise UnusableError(f"expected an HDF5 file, got one that cannot be read ({type(error).__name__}); copy it again") from None
    if minc:
        _refuse_links(path)
    return minc


def _refuse_links(path: Path) -> None:
    """Refuse an HDF5 file that holds links, or values stored outside it."""
    import h5py

    with h5py.File(path, "r", locking=False) as f:
        groups, seen = [f], 0
        while groups:
            group = groups.pop()
            for name in group:
                seen += 1
                member = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
                if member is None or seen > 10_000 or (isinstance(member, h5py.Dataset) and (member.external or member.is_virtual)):
                    raise UnusableError("expected data inside the file, got links to elsewhere; store it in one file")
                if isinstance(member, h5py.Group):
                    groups.append(member)


def _read_image(path: Path, kind: str, place: Path) -> list[Series]:
    """Series of a single-image format, through a link whose name its decoder understands."""
    packed = kind.endswith(" in gzip")
    kind = kind.removesuffix(" in gzip")
    suffix = SUFFIX[kind]
    partner = _partner(path)
    if kind in ("NIfTI", "Analyze") and partner is not None:
        suffix = ".hdr"
    elif kind == "Analyze" or (kind == "PAR/REC" and partner is None):
        raise UnusableError(f"expected the voxels of a {kind} header in a file beside it, found none; bring both, or convert them to NIfTI")
    if kind == "MGH" and packed:
        suffix, packed = ".mgz", False
    if kind == "MetaImage" or kind == "NRRD":
        # A detached header names the file of its voxels, so that these stay where they are.
        return read_with_itk(path, kind)
    link = _link(path, f"{suffix}{'.gz' if packed else ''}", place)
    if partner is not None and suffix in PAIRS:
        (place / f"0{PAIRS[suffix]}{'.gz' if partner.name.lower().endswith('.gz') else ''}").symlink_to(partner.resolve())
    if kind in ("PNG", "JPEG"):
        return read_picture(link, kind)
    return read_with_nibabel(link, kind)


def _link(path: Path, suffix: str, place: Path) -> Path:
    """A link to a file, in a folder of its own, whose name its decoder understands."""
    place.mkdir()
    link = place / f"0{suffix}"
    link.symlink_to(path.resolve())
    return link


def gunzip(path: Path, target: Path, most: int = MAX_FILE_BYTES) -> Path:
    """A gzip file's content, within its limit and `most` bytes.

    Raises:
        UnusableError: it inflates beyond it, or is damaged.
    """
    left = min(MAX_FILE_BYTES, most, MAX_RATIO * max(path.stat().st_size, 4096))
    try:
        with gzip.open(path, "rb") as f, target.open("wb") as out:
            while data := f.read(2**20):
                left -= len(data)
                if left < 0:
                    raise UnusableError("expected an image file, got one that inflates beyond its limit")
                out.write(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UnusableError(f"expected a gzip file, got a truncated or damaged one ({type(error).__name__}); copy it again") from None
    return target


def _partner(path: Path) -> Path | None:
    """The voxels' file beside a header of two-file formats."""
    name = path.name.lower().removesuffix(".gz")
    for header, voxels in PAIRS.items():
        if name.endswith(header):
            stem = name.removesuffix(header)
            for beside in path.parent.iterdir():
                if beside.name.lower().removesuffix(".gz") == stem + voxels and beside.is_file() and not beside.is_symlink():
                    return beside
    return None


def _partners(files: list[Path], header: str, voxels: str) -> Iterator[Path]:
    stems = {(p.parent, p.name.lower().removesuffix(".gz").removesuffix(header)) for p in files
             if p.name.lower().removesuffix(".gz").endswith(header)}
    for p in files:
        name = p.name.lower().removesuffix(".gz")
        if name.endswith(voxels) and (p.parent, name.removesuffix(voxels)) in stems:
            yield p


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files under a folder, sorted, without following links.

    Raises:
        UnusableError: too many files, or too deep.
    """
    todo, count = [(folder, 0)], 0
    while todo:
        here, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise UnusableError(f"expected folders at most {MAX_DEPTH} deep, got deeper ones; choose one study's folder")
        for path in sorted(here.iterdir()):
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                todo.append((path, depth + 1))
            elif stat.S_ISREG(mode) and not path.name.startswith("."):
                count += 1
                if count > MAX_FILES:
                    raise UnusableError(f"expected at most {MAX_FILES} files, got more; choose one study's folder")
                if 0 < path.stat().st_size <= MAX_FILE_BYTES:
                    yield path


def _unpack(path: Path, room: Path) -> Iterator[Path]:
    """An archive's files, unpacked under names of our own: only the suffix and which files lie together are kept.

    Raises:
        UnusableError: too many or too large files, names that point outside, links, encryption, or damage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            if len(entries) > MAX_FILES:
                raise UnusableError(f"expected at most {MAX_FILES} files, got {len(entries)}; zip one study")
            if sum(e.file_size for e in entries) > MAX_TOTAL_BYTES:
                raise UnusableError(f"expected at most {MAX_TOTAL_BYTES} bytes in the archive, got more; zip one study")
            stems: dict[str, str] = {}
            for entry in entries:
                name = entry.filename.replace("\\", "/")
                if ".." in name.split("/") or name.startswith("/") or ":" in name or "\0" in entry.orig_filename:
                    raise UnusableError("expected plain names in the archive, got one that points outside it; zip it again")
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise UnusableError("expected files in the archive, got a link; zip the files themselves")
                if entry.flag_bits & 1:
                    raise UnusableError("expected an archive without a password, got an encrypted one")
                if entry.file_size > MAX_FILE_BYTES or entry.file_size > MAX_RATIO * max(entry.compress_size, 4096):
                    raise UnusableError("expected image files in the archive, got one that inflates beyond its limit")
                base = name.rsplit("/", 1)[-1].lower()
                packed = base.endswith(".gz")
                stem, dot, suffix = base.removesuffix(".gz").rpartition(".")
                known = f".{suffix}" if dot and f".{suffix}" in {*PAIRS, *VOXEL_FILES, ".mhd", ".nhdr"} else ""
                key = f"{name.rpartition('/')[0]}/{stem if known else name}"
                own = stems.setdefault(key, f"{len(stems):06d}")
                target = room / f"{own}{known}{'.gz' if packed else ''}"
                while target.exists():
                    target = target.with_name(f"{target.stem}_{target.suffix}")
                with archive.open(entry) as f, target.open("wb") as out:
                    left = entry.file_size
                    while left > 0 and (data := f.read(min(left, 2**20))):
                        out.write(data)
                        left -= len(data)
                if entry.file_size:
                    yield target
    except (UnusableError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        raise UnusableError(f"expected a zip archive, got one that cannot be read ({type(error).__name__})") from None
