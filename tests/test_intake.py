"""Studies as hospitals send them: every format gives the same study, junk is told apart, hostile files harm nothing."""

from __future__ import annotations

import gzip
import io
import os
import re
import struct
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
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from omnimri.io import child, open_study, sandbox
from omnimri.io.headers import class_of, kind_of
from omnimri.io.series import UnusableError

from .conftest import write_dicom
from .fuzz import CORPUS, SUFFIX, lay, seeds

SECRET = "Marker7531"
PYDICOM = Path(pydicom.__file__).parent / "data" / "test_files"
NIBABEL = Path(nibabel.__file__).parent


def same_place(a, b, *, voxels=True):
    """Whether two volumes hold the same values at the same points of the scanner."""
    index = torch.cartesian_prod(*(torch.linspace(0, n - 1, 4).round() for n in a.shape)).double()
    world = index @ a.affine[:3, :3].T + a.affine[:3, 3]
    back = (world - b.affine[:3, 3]) @ torch.linalg.inv(b.affine[:3, :3]).T
    if float((back - back.round()).abs().max()) > 0.01:
        return False
    left = a.voxels[0][tuple(index.long().T)]
    right = b.voxels[0][tuple(back.round().long().T)]
    return not voxels or float((left - right).abs().max()) < 0.001 * float(a.voxels.max())


# --- formats ------------------------------------------------------------------------------------------------------


def written(scan, folder):
    """The scan in every format that can be written here."""
    import SimpleITK as sitk  # noqa: N813

    array, affine = scan.voxels[0].numpy(), scan.affine.numpy()
    nibabel.save(nibabel.Nifti1Image(array, affine), folder / "a.nii")
    nibabel.save(nibabel.Nifti2Image(array, affine), folder / "b.nii.gz")
    nibabel.save(nibabel.Nifti1Pair(array, affine), folder / "pair.hdr")
    nibabel.save(nibabel.MGHImage(array, affine), folder / "c.mgz")
    nibabel.save(nibabel.MGHImage(array, affine), folder / "d.mgh")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    for name in ("e.nrrd", "f.mha", "g.mhd"):
        sitk.WriteImage(image, str(folder / name))
    write_dicom(scan, folder / "dicom")
    return [folder / n for n in ("a.nii", "b.nii.gz", "pair.hdr", "c.mgz", "d.mgh", "e.nrrd", "f.mha", "g.mhd", "dicom")]


def test_every_format_of_one_scan_is_the_same_study(scan, tmp_path):
    for path in written(scan, tmp_path):
        study = open_study(path)
        assert len(study.volumes) == 1, path.name
        assert same_place(scan, study.primary), path.name
        assert study.primary.oriented, path.name


def test_a_name_says_nothing_about_the_content(scan, tmp_path):
    nibabel.save(nibabel.Nifti1Image(scan.voxels[0].numpy(), scan.affine.numpy()), tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").rename(tmp_path / "IM0001.dcm")
    assert same_place(scan, open_study(tmp_path / "IM0001.dcm").primary)


def test_metres_are_millimetres(scan, tmp_path):
    image = nibabel.Nifti1Image(scan.voxels[0].numpy(), scan.affine.numpy() / 1000)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "m.nii.gz")
    assert open_study(tmp_path / "m.nii.gz").primary.spacing_mm == pytest.approx(scan.spacing_mm, rel=1e-3)


def test_a_picture_has_no_side(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48), dtype=np.uint8)).save(tmp_path / "p.png")
    study = open_study(tmp_path / "p.png")
    assert study.primary.shape == (48, 64, 1)
    assert not study.primary.oriented
    assert any("no geometry" in w for w in study.warnings)


def test_ismrmrd_readouts_become_kspace(tmp_path):
    counters = [(n, "<u2") for n in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast", "phase",
                                     "repetition", "set", "segment")]
    head = np.dtype([("flags", "<u8"), ("number_of_samples", "<u2"), ("active_channels", "<u2"), ("center_sample", "<u2"),
                     ("idx", counters)])
    rng, lines = np.random.default_rng(0), [1, 5, 8, 11]
    truth = (rng.normal(size=(2, 3, 16, 4)) + 1j * rng.normal(size=(2, 3, 16, 4))).astype(np.complex64)
    xml = ("<ismrmrdHeader><encoding><trajectory>cartesian</trajectory><encodedSpace><matrixSize><x>16</x><y>12</y><z>1</z>"
           "</matrixSize></encodedSpace></encoding></ismrmrdHeader>")
    with h5py.File(tmp_path / "raw.h5", "w") as f:
        rows = f.create_dataset("dataset/data", (9,), np.dtype([("head", head), ("data", h5py.vlen_dtype(np.float32))]))
        heads = np.zeros(9, head)
        k = 0
        for s in range(2):
            for n, line in enumerate(lines):
                heads[k] = (0, 16, 3, 8, (line, 0, 0, s, 0, 0, 0, 0, 0))
                rows[k] = (heads[k], np.ascontiguousarray(truth[s, :, :, n]).view(np.float32).ravel())
                k += 1
        heads[8] = (1 << 18, 16, 3, 8, (0,) * 9)  # a noise measurement is no image line
        rows[8] = (heads[8], rng.normal(size=96).astype(np.float32))
        f.create_dataset("dataset/xml", data=np.array([xml.encode()]))
    found = open_study(tmp_path / "raw.h5").kspace
    assert found.data.shape == (2, 3, 16, 12)
    assert found.mask[0].nonzero().flatten().tolist() == lines
    assert np.allclose(found.data[..., lines].numpy(), truth)


@pytest.mark.parametrize("name", ["RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"])
def test_transfer_syntaxes_agree(name):
    plain = open_study(PYDICOM / "MR_small.dcm").primary
    other = open_study(PYDICOM / f"MR_small_{name}.dcm").primary
    assert torch.equal(plain.voxels, other.voxels)
    assert torch.equal(plain.affine, other.affine)
    raw = pydicom.dcmread(PYDICOM / "MR_small.dcm").pixel_array
    assert np.array_equal(plain.voxels[0, :, :, 0].numpy().T, raw)


def test_deflated_and_rle_series(scan, tmp_path):
    for syntax in (DeflatedExplicitVRLittleEndian, RLELossless):
        folder = write_dicom(scan, tmp_path / syntax.name.replace(" ", ""))
        for path in folder.iterdir():
            d = pydicom.dcmread(path)
            if syntax is RLELossless:
                d.compress(RLELossless)
            else:
                d.file_meta.TransferSyntaxUID = syntax
            d.save_as(path, enforce_file_format=True)
        assert same_place(scan, open_study(folder).primary)


def enhanced(scan, *, echoes=1):
    """One enhanced multi-frame instance, frames shuffled."""
    voxels = scan.voxels[0].numpy()
    stored = np.round(voxels / voxels.max() * 4000).astype(np.uint16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine.numpy()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    d = pydicom.dcmread(io.BytesIO((PYDICOM / "MR_small.dcm").read_bytes()))
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "EchoTime", "RepetitionTime", "SliceThickness"):
        delattr(d, key)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    d.ImageType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    measures, turn, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    turn.ImageOrientationPatient = [float(v) for v in (*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1]))]
    timing = Dataset()
    timing.RepetitionTime = 500.0
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([turn])
    shared.MRTimingAndRelatedParametersSequence = Sequence([timing])
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    frames, pixels = [], []
    for e in range(echoes):
        for k in np.random.default_rng(e).permutation(stored.shape[2]):
            place, transform, echo, frame = Dataset(), Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient = [float(v) for v in lps[:3, :3] @ [0, 0, k] + lps[:3, 3]]
            transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = float(voxels.max() / 4000), 0.0, "US"
            echo.EffectiveEchoTime = 10.0 + 70 * e
            frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([place]), Sequence([transform])
            frame.MREchoSequence = Sequence([echo])
            frames.append(frame)
            pixels.append(stored[:, :, k].T // (e + 1))
    d.PerFrameFunctionalGroupsSequence = Sequence(frames)
    d.NumberOfFrames, d.Rows, d.Columns = len(pixels), stored.shape[1], stored.shape[0]
    d.PixelRepresentation = 0
    d.PixelData = np.stack(pixels).tobytes()
    return d


def test_enhanced_multi_frame(scan, tmp_path):
    enhanced(scan).save_as(tmp_path / "e.dcm")
    volume = open_study(tmp_path / "e.dcm").primary
    assert same_place(scan, volume)
    assert volume.sequence == "T1w"
    enhanced(scan, echoes=2).save_as(tmp_path / "two.dcm")
    study = open_study(tmp_path / "two.dcm")
    assert [s.variant for s in study.series] == ["echo 1 of 2", "echo 2 of 2"]
    assert study.primary.parameters["echo_time_ms"] == 10
    second = open_study(tmp_path / "two.dcm", series=["1.2"]).primary
    assert second.parameters["echo_time_ms"] == 80
    assert float(second.voxels.max()) < 0.6 * float(study.primary.voxels.max())


def test_mosaic_lies_where_nibabel_puts_it(tmp_path):
    from nibabel.nicom.dicomwrappers import wrapper_from_data

    packed = (NIBABEL / "nicom/tests/data/siemens_dwi_1000.dcm.gz").read_bytes()
    d = pydicom.dcmread(io.BytesIO(gzip.decompress(packed)))
    d.PixelData = np.random.default_rng(0).integers(0, 4000, (d.Rows, d.Columns), dtype=np.uint16).tobytes()
    d.save_as(tmp_path / "m.dcm")
    peer = wrapper_from_data(d)
    volume = open_study(tmp_path / "m.dcm").primary
    data, affine = peer.get_data(), np.diag([-1, -1, 1, 1]) @ peer.affine
    assert volume.parameters["b_value_s_per_mm2"] == 1000
    for index in ((0, 0, 0), (10, 20, 5), (100, 3, 40)):
        at = np.linalg.inv(volume.affine.numpy()) @ affine @ [*index, 1]
        assert np.allclose(at, at.round(), atol=1e-3)
        assert float(volume.voxels[0][tuple(at.round().astype(int)[:3])]) == data[index]


# --- studies ------------------------------------------------------------------------------------------------------


def change(folder, **header):
    for path in folder.iterdir():
        d = pydicom.dcmread(path)
        for key, value in header.items():
            setattr(d, key, value(d) if callable(value) else value)
        d.save_as(path)
    return folder


def test_a_whole_study_is_told_apart(scan, tmp_path):
    folder = tmp_path / "study"
    write_dicom(scan, folder / "t1", header={"RepetitionTime": 500, "EchoTime": 12})
    write_dicom(scan, folder / "flair", header={"RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500})
    write_dicom(scan, folder / "adc", header={"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]})
    write_dicom(scan, folder / "scout", header={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_dicom(scan, folder / "other", header={"PatientID": "99", "StudyInstanceUID": generate_uid()})
    shot = write_dicom(scan, folder / "shot", header={"SOPClassUID": SecondaryCaptureImageStorage})
    for path in list(shot.iterdir())[1:]:
        path.unlink()
    (folder / "notes.txt").write_text(SECRET)
    (folder / "inner.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    study = open_study(folder)
    assert sorted(v.sequence for v in study.volumes) == ["FLAIR", "T1w"]
    assert {v.frame for v in study.volumes} == {study.volumes[0].frame}
    why = {(s.kind, s.sequence): s.why for s in study.series}
    assert why[("ADC map", "other")] == "not used: ADC map"
    assert why[("localizer", "unknown")] == "not used: localizer"
    assert why[("image", "unknown")] == "not used: of another patient or study"
    told = " ".join(study.warnings)
    assert "secondary capture" in told
    assert "more than one patient" in told
    assert "archive inside" in told
    assert study.named("Is there a lesion on the FLAIR?").sequence == "FLAIR"
    assert study.named("Is this a FLAIR?") is None
    name = next(s.name for s in study.series if s.kind == "ADC map")
    assert open_study(folder, series=[name.removeprefix("series ")]).primary.name == name
    with pytest.raises(ValueError, match="expected series from"):
        open_study(folder, series=["77"])


def test_series_without_a_common_frame_are_told(scan, tmp_path):
    one, two = generate_uid(), generate_uid()
    for uids, told in (((one, one), False), ((one, two), True)):
        folder = tmp_path / str(told)
        for name, uid, tr, te in zip("ab", uids, (500, 5000), (12, 90), strict=True):
            write_dicom(scan, folder / name, header={"FrameOfReferenceUID": uid, "RepetitionTime": tr, "EchoTime": te})
        study = open_study(folder)
        assert len(study.volumes) == 2
        assert any("frame of reference" in w for w in study.warnings) == told


def test_missing_doubled_sheared_and_repeated_slices(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "missing", shuffle=False)
    (folder / "IM0005").unlink()
    with pytest.raises(ValueError, match="1 slice seems to be missing"):
        open_study(folder)
    folder = write_dicom(scan, tmp_path / "jitter", shuffle=False)
    change(folder, ImagePositionPatient=lambda d: [*d.ImagePositionPatient[:2], d.ImagePositionPatient[2]
                                                   + 0.04 * scan.spacing_mm[2] * (-1) ** int(d.InstanceNumber)])
    assert open_study(folder).primary.shape == scan.shape
    folder = write_dicom(scan, tmp_path / "shear", shuffle=False)
    change(folder, ImagePositionPatient=lambda d: [d.ImagePositionPatient[0], d.ImagePositionPatient[1] + 2.0 * int(d.InstanceNumber),
                                                   d.ImagePositionPatient[2]])
    study = open_study(folder)
    assert any("sheared" in w for w in study.warnings)
    moved = study.primary.affine[:3, 2] - scan.affine[:3, 2]
    assert moved.tolist() == pytest.approx([0, -2.0, 0], abs=1e-3)
    folder = write_dicom(scan, tmp_path / "time", shuffle=False, header={"TemporalPositionIdentifier": 1})
    again = write_dicom(scan, tmp_path / "again", shuffle=False, header={"TemporalPositionIdentifier": 2})
    uid = pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    for path in change(again, SeriesInstanceUID=uid).iterdir():
        path.rename(folder / f"b{path.name}")
    assert [s.variant for s in open_study(folder).series] == ["volume 1 of 2", "volume 2 of 2"]


def test_three_orientations_in_one_series_are_three_volumes(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "three", shuffle=False)
    turns = ([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1])
    change(folder, ImageOrientationPatient=lambda d: turns[int(d.InstanceNumber) % 3],
           ImagePositionPatient=lambda d: [10.0 * int(d.InstanceNumber)] * 3)
    study = open_study(folder)
    assert len(study.series) == 3
    assert sorted(s.plane for s in study.series) == ["axial", "coronal", "sagittal"]


def test_vocabulary():
    assert kind_of(["DERIVED", "PRIMARY", "M", "ND", "MPR"]) == "projection or reformat"
    assert kind_of(["ORIGINAL", "PRIMARY", "M", "ND"]) == "image"
    d = Dataset()
    d.SOPClassUID, d.Modality = "1.2.840.10008.5.1.4.1.1.88.33", "SR"
    assert class_of(d) == "structured report"
    d.SOPClassUID, d.Modality = MRImageStorage, SECRET
    assert class_of(d) == "image of another modality"


# --- hostile files ------------------------------------------------------------------------------------------------


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


def rooms():
    return {p.name for p in Path(tempfile.gettempdir()).glob("omnimri-in-*")}


def test_hostile_files_get_one_sentence_and_leave_nothing(tmp_path, scan):
    before = rooms()
    for name, path in hostile(tmp_path, scan).items():
        with pytest.raises(ValueError, match=r"^expected [^\n]{10,400}$") as error:
            pytest.fail(f"{name}: {open_study(path)}")
        assert str(tmp_path) not in str(error.value), name
    assert rooms() <= before


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
    assert not seen["other"], seen
    assert seen["refused"] >= 50, seen


def sentence_of(path):
    """`read`, or the sentence by which a file is refused; anything but these two is raised."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as room:
        os.chdir(room)
        try:
            child.answer({"path": str(path), "series": None})
        except UnusableError as error:
            return str(error)
        finally:
            os.chdir(here)
    return "read"


def decode(path):
    """`read`, `refused` with a sentence, or `other`: an error that only the child's last net turns into a sentence."""
    try:
        said = sentence_of(path)
    except Exception:
        return "other"
    return "read" if said == "read" else "refused" if said.startswith("expected") else "other"


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
    data = bytearray(files[choice % len(files)].read_bytes())
    for at, how, new in edits:
        k = int(at * len(data))
        data[k : k + (0 if how == "insert" else len(new) if how == "set" else 200)] = b"" if how == "cut" else new
    with tempfile.TemporaryDirectory() as room:
        assert decode(lay(kind, bytes(data), Path(room))) in (("read", "refused") if edits else ("read",))


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


def test_a_child_that_takes_too_long_or_dies_is_one_sentence(scan_file, monkeypatch):
    before = rooms()
    with pytest.raises(ValueError, match="took longer"):
        open_study(scan_file, time_s=0.001)
    waiting = sandbox.take()
    waiting.process.kill()
    waiting.process.wait()
    with pytest.raises(ValueError, match="broke or ran out"):
        waiting.ask({"path": str(scan_file), "series": None}, 10)
    waiting.close()
    assert rooms() <= before
    sandbox.warm()
    assert open_study(scan_file).volumes
    assert rooms() <= before


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
