"""Hostile files harm nothing and headers stay private: one sentence each, whatever the bytes; the libraries' own test files counted."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
)

from omnimri.io import child, open_study, sandbox
from omnimri.io.series import UnusableError

from .conftest import NIBABEL, PYDICOM, SECRET, change, write_dicom
from .fuzz import CORPUS, SUFFIX, lay, seeds


def hostile(tmp_path, scan):
    """Name -> path of files that mean harm."""
    cases = {}

    def archive(name, *entries, **info):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as z:
            for inner, data in entries:
                entry = zipfile.ZipInfo(inner)
                entry.compress_type = zipfile.ZIP_DEFLATED
                for key, value in info.items():
                    setattr(entry, key, value)
                z.writestr(entry, data)
        return tmp_path / name

    header = bytearray(nibabel.Nifti1Header(endianness="<").structarr.tobytes().ljust(352, b"\0"))
    header[344:348] = b"n+1\0"
    header[40:56] = np.array([3, 4000, 4000, 4000, 1, 1, 1, 1], "<i2").tobytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(header)) + gzip.compress(b"\0" * 2**26) * 4)
    cases["gzip that inflates to gigabytes"] = tmp_path / "bomb.nii.gz"
    header[40:56] = np.array([3, 8, 8, 8, 1, 1, 1, 1], "<i2").tobytes()
    header[108:112] = struct.pack("<f", 3e9)
    (tmp_path / "offset.nii.gz").write_bytes(gzip.compress(bytes(header) + b"\0" * 2**20))
    cases["offset out of reach"] = tmp_path / "offset.nii.gz"
    header[40:56] = np.array([3, -5, 8, 8, 1, 1, 1, 1], "<i2").tobytes()
    (tmp_path / "negative.nii").write_bytes(bytes(header) + b"\0" * 4096)
    cases["negative size"] = tmp_path / "negative.nii"
    start = (PYDICOM / "MR_small.dcm").read_bytes()
    nested = b"".join(b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" for _ in range(20_000))
    (tmp_path / "nested.dcm").write_bytes(start[:340] + nested)
    cases["sequences nested 20,000 deep"] = tmp_path / "nested.dcm"
    d = pydicom.dcmread(PYDICOM / "MR_small.dcm")
    d.Rows = d.Columns = 65535
    d.save_as(tmp_path / "lie.dcm")
    cases["dimension lie"] = tmp_path / "lie.dcm"
    meta = io.BytesIO()
    d.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.filewriter.write_file_meta_info(meta, d.file_meta)
    pack = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"".join(pack.compress(b"\0" * 2**24) for _ in range(70)) + pack.flush()
    (tmp_path / "deflate.dcm").write_bytes(b"\0" * 128 + b"DICM" + meta.getvalue() + zeros)
    cases["deflate bomb"] = tmp_path / "deflate.dcm"
    cases["zip slip"] = archive("slip.zip", ("../../evil.dcm", b"x"))
    cases["absolute path"] = archive("absolute.zip", ("/etc/evil.dcm", b"x"))
    cases["drive"] = archive("drive.zip", ("C:\\evil.dcm", b"x"))
    cases["device names"] = archive("device.zip", ("CON", b"x"), ("aux.dcm", b"y"), ("nul.nii.gz", b"z"))
    cases["unicode tricks"] = archive("unicode.zip", ("a\u202egnp.dcm", b"x"), ("\uff0e\uff0e/\u2215etc", b"y"))
    cases["link"] = archive("link.zip", ("a.dcm", b"/etc/passwd"), external_attr=0o120777 << 16)
    cases["nested zip"] = archive("outer.zip", ("inner.zip", (tmp_path / "slip.zip").read_bytes()))
    cases["zip bomb"] = archive("bomb.zip", ("a.dcm", b"\0" * 50_000_000))
    cases["100,000 files"] = archive("many.zip", *((f"{k}", b"") for k in range(100_000)))
    secret = tmp_path / "secret.raw"
    secret.write_bytes(os.urandom(4096))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "points.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 16 16 16\nElementType = MET_UCHAR\nElementDataFile = ../secret.raw\n")
    cases["MetaImage that points elsewhere"] = tmp_path / "x" / "points.mhd"
    (tmp_path / "x" / "points.nrrd").write_text(
        f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 16 16 16\nencoding: raw\ndata file: {secret}\n\n")
    cases["NRRD that points elsewhere"] = tmp_path / "x" / "points.nrrd"
    with h5py.File(tmp_path / "aim.h5", "w") as f:
        f["kspace"] = np.ones((1, 1, 8, 8), np.complex64)
    with h5py.File(tmp_path / "external.h5", "w") as f:
        f["kspace"] = h5py.ExternalLink(str(tmp_path / "aim.h5"), "kspace")
    with h5py.File(tmp_path / "stored.h5", "w") as f:
        f.create_dataset("kspace", (1, 1, 8, 8), np.complex64, external=[(str(secret), 0, 512)])
    cases["HDF5 external link"], cases["HDF5 external storage"] = tmp_path / "external.h5", tmp_path / "stored.h5"
    os.symlink(tmp_path / "aim.h5", tmp_path / "x" / "l.h5")
    (tmp_path / "links").mkdir()
    os.symlink(tmp_path / "aim.h5", tmp_path / "links" / "l.h5")
    cases["folder of links"] = tmp_path / "links"
    return cases


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """A list of what this test's children leave in the temporary folder, when it is called."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return lambda: list((tmp_path / "temporary").iterdir())


def test_hostile_files_get_one_sentence_and_leave_nothing(tmp_path, scan, rooms):
    for name, path in hostile(tmp_path, scan).items():
        with pytest.raises(ValueError, match=r"^expected [^\n]{10,400}$") as error:
            pytest.fail(f"{name}: {open_study(path)}")
        assert str(tmp_path) not in str(error.value), name
    assert not rooms()


@pytest.mark.parametrize("kind", ["nii.gz", "nrrd", "dcm", "mgz", "h5"])
def test_cut_and_flipped_at_every_percent(scan, tmp_path, kind):
    """In the child's own code, in this process: what the sandbox turns into a sentence must not be needed for it."""
    import SimpleITK as sitk  # noqa: N813

    path = tmp_path / f"a.{kind}"
    array = scan.voxels[0, ::2, ::2, ::2].numpy()
    if kind == "nrrd":
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path), useCompression=True)
    elif kind == "dcm":
        path.write_bytes((PYDICOM / "MR_small.dcm").read_bytes())
    elif kind == "h5":
        with h5py.File(path, "w") as f:
            f["kspace"] = np.fft.fft2(array.T[:, None]).astype(np.complex64)
    else:
        nibabel.save((nibabel.MGHImage if kind == "mgz" else nibabel.Nifti1Image)(array, np.eye(4)), path)
    whole, rng, seen = path.read_bytes(), np.random.default_rng(0), Counter()
    for percent in range(100):
        at = len(whole) * percent // 100
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        for data in (whole[:at], bytes(flipped)):
            path.write_bytes(data)
            seen[decode(path)] += 1
    assert seen["refused"] >= 50, seen


def sentence_of(path):
    """`read`, or the sentence by which a file is refused; anything but these two is raised."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        try:
            with open("arrays", "w+b") as arrays:
                child.answer({"path": str(path), "series": None}, arrays)
        except UnusableError as error:
            return str(error)
        finally:
            os.chdir(here)
    return "read"


def decode(path):
    """`read`, or `refused` with a sentence; an error that only the child's last net turns into a sentence is raised."""
    said = sentence_of(path)
    assert said == "read" or said.startswith("expected"), said
    return "read" if said == "read" else "refused"


@pytest.mark.parametrize("kind", SUFFIX)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["set", "insert", "cut"]), st.binary(min_size=1, max_size=8)), max_size=6),
       choice=st.integers(0, 9))
def test_any_bytes_are_read_or_refused(tmp_path_factory, kind, edits, choice):
    """Short fuzzing of every reader; `python -m tests.fuzz` is the long one, guided by coverage."""
    folder = tmp_path_factory.getbasetemp() / f"seeds-{kind}"
    if not folder.exists():
        folder.mkdir()
        seeds(kind, folder)
    files = sorted(folder.iterdir())
    chosen = files[choice % len(files)]
    data = bytearray(chosen.read_bytes())
    for at, how, new in edits:
        k = int(at * len(data))
        data[k : k + (0 if how == "insert" else len(new) if how == "set" else 200)] = b"" if how == "cut" else new
    with tempfile.TemporaryDirectory() as room:
        assert decode(lay(kind, bytes(data), Path(room))) in (("read", "refused") if edits or chosen.name == "test-SR.dcm" else ("read",))


def test_what_once_failed_is_read_or_refused(tmp_path):
    kept = sorted(CORPUS.iterdir())
    assert kept
    for path in kept:
        kind = path.name.split("-")[0]
        assert decode(lay(kind, path.read_bytes(), tmp_path)) in ("read", "refused"), path.name


OUTCOMES = {
    "read": r"^read$",
    "not MR: another modality, report, plan, segmentation, screen": r"^expected an MR image or k-space, got ",
    "no image format that is known": r"got a file of another kind",
    "a header whose voxels are not there": r"^expected the voxels of a|^expected 902629 voxels",
    "one value everywhere": r"^expected an image with contrast",
    "argued": r"",
}
TABLE = {
    "pydicom": (27, 138, 10, 0, 0, 1),
    "nibabel": (19, 0, 29, 32, 0, 5),
    "nibabel.nicom": (3, 0, 6, 0, 3, 2),
}
"""Files of the libraries' own tests by the outcomes above."""
ARGUED = {
    "MR_truncated.dcm": "made without the end of its pixels: an image with a part made up is worse than none",
    "minc1_4d.mnc": "nibabel reads no time axis of MINC by volume; the sentence says what to do",
    "minc2-4d-d.mnc": "as above",
    "minc2_4d.mnc": "as above",
    "phantom_truncated.PAR": "made with fewer slices than its header says, and nibabel reads it only when asked to permit that",
    "row_major.dconn.nii": "a matrix of connectivity in NIfTI's clothes, without any place in space",
    "csa_slice_norm.dcm": "its pixels were taken away",
    "philips_mprage.dcm.gz": "its pixels were zeroed, so that it packs like a bomb; unpacked it has no contrast either",
}
NOT_MR_OR_UNKNOWN = ("no_meta.dcm: begins in the middle of an element, and pydicom reads one garbled element of it",
                     "ExplVR_BigEndNoMeta.dcm: a radiotherapy plan without the preamble that tells DICOM")
"""What `a file of another kind` holds that is named like an image."""


def test_libraries_own_test_files_read_or_are_refused():
    """Every file of pydicom's and nibabel's tests; whatever is refused for its own reason has its argument above."""
    folders = {"pydicom": PYDICOM, "nibabel": NIBABEL / "tests/data", "nibabel.nicom": NIBABEL / "nicom/tests/data"}
    argued, named = set(), []
    for name, folder in folders.items():
        seen = dict.fromkeys(OUTCOMES, 0)
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
            said = sentence_of(path)
            assert said == "read" or re.match(r"expected [^\n]{10,400}$", said), (path.name, said)
            outcome = next(k for k, pattern in OUTCOMES.items() if re.search(pattern, said))
            seen[outcome] += 1
            argued |= {path.name} if outcome == "argued" else set()
            named += [path.name] if outcome.startswith("no image") and path.suffix == ".dcm" else []
        assert tuple(seen.values()) == TABLE[name], (name, seen)
    assert argued == set(ARGUED)
    assert named == sorted((n.split(":")[0] for n in NOT_MR_OR_UNKNOWN), key=str), named


def test_a_child_that_takes_too_long_or_dies_is_one_sentence(scan_file, rooms):
    with pytest.raises(ValueError, match="took longer"):
        open_study(scan_file, time_s=0.001)
    waiting = sandbox.take()
    waiting.process.kill()
    waiting.process.wait()
    with pytest.raises(ValueError, match="broke or ran out"):
        waiting.ask({"path": str(scan_file), "series": None}, 10)
    waiting.close()
    assert not rooms()
    sandbox.warm()
    assert open_study(scan_file).volumes
    assert not rooms()


def test_where_no_memory_can_be_shared_a_file_of_the_room_is(scan, scan_file, rooms, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert torch.allclose(open_study(scan_file).primary.voxels, scan.voxels)
    assert not rooms()


TEXT_TAGS = (
    "PatientName", "PatientID", "StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName", "ReferringPhysicianName",
    "StationName", "Manufacturer", "ImageComments", "SequenceName", "ContrastBolusAgent", "AccessionNumber", "StudyID", "PatientComments",
    "OperatorsName", "BodyPartExamined", "DeviceSerialNumber")


def marked(scan, folder):
    """A series with a marker in every text field."""
    for path in write_dicom(scan, folder).iterdir():
        d = pydicom.dcmread(path)
        for keyword in TEXT_TAGS:
            setattr(d, keyword, SECRET[:16])
        d.ImageType = ["ORIGINAL", "PRIMARY", SECRET.upper()]
        d.SOPInstanceUID = SECRET
        d.ScanningSequence = SECRET.upper()[:16]
        d.save_as(path)
    return folder


def test_no_text_of_a_header_leaves_the_reader(scan, tmp_path, capfd):
    """Markers in every text field: in nothing that is returned, printed, raised or named."""
    folder = marked(scan, tmp_path / "marked")
    study = open_study(folder)
    told = repr(study) + repr(study.series) + "".join(capfd.readouterr())
    change(folder, PixelData=b"\0" * 10)
    with pytest.raises(ValueError, match="expected") as error:
        open_study(folder)
    told += str(error.value) + "".join(capfd.readouterr())
    assert SECRET.lower() not in told.lower()
    assert study.primary.sequence == "unknown"
    image = nibabel.Nifti1Image(scan.voxels[0].numpy(), scan.affine.numpy())
    image.header["descrip"] = SECRET
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", SECRET.encode()))
    nibabel.save(image, tmp_path / f"{SECRET}.nii.gz")
    assert SECRET not in repr(open_study(tmp_path / f"{SECRET}.nii.gz"))


def test_no_text_of_a_header_is_in_any_output(scan, tmp_path, capfd):
    from omnimri.cli import main

    folder, out = marked(scan, tmp_path / "in"), tmp_path / "out"
    for command, *rest in (["info", "--json"], ["report", "--out", out], ["ask", "Who is it?", "--out", out / "ask", "--json"]):
        assert main([command, str(folder), *map(str, rest)]) == 0
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) >= 3
    told = "".join(capfd.readouterr()).encode()
    told += b"".join(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in files)
    assert SECRET.lower().encode() not in told.lower()
    assert not any(SECRET in p.name for p in files)


def test_the_child_never_imports_torch():
    import subprocess
    import sys

    code = "import sys, omnimri.io.child, omnimri.io.intake; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    from omnimri.io import sandbox

    monkeypatch.setattr(sandbox.tempfile, "gettempdir", lambda: str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"{sandbox.ROOM}{gone.pid}-abc", f"{sandbox.ROOM}{os.getpid()}-abc", "other"):
        (tmp_path / name).mkdir()
    sandbox.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"{sandbox.ROOM}{os.getpid()}-abc", "other"])
