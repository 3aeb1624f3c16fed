"""Studies as hospitals send them: every format gives the same study, junk is told apart."""

from __future__ import annotations

import gzip
import io
import re

import nibabel
import numpy as np
import pydicom
import pytest
import torch
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

from omnimri.io import open_study
from omnimri.io.headers import class_of, kind_of
from omnimri.volume import Study, Volume

from .conftest import NIBABEL, PYDICOM, SECRET, change, write_dicom
from .fuzz import write_ismrmrd


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


@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_ismrmrd_readouts_become_kspace(tmp_path, chunk):
    truth, lines = write_ismrmrd(tmp_path / "raw.h5", chunk)
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


def test_jpeg_of_twelve_bits(tmp_path):
    """What only GDCM decodes, in an MR header of ours."""
    import SimpleITK as sitk  # noqa: N813

    source = pydicom.dcmread(PYDICOM / "JPEG-lossy.dcm")
    made = pydicom.dcmread(PYDICOM / "MR_small.dcm")
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(made, name, source[name].value)
    made.PixelData = source.PixelData
    made.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
    made.save_as(tmp_path / "a.dcm")
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(PYDICOM / "JPEG-lossy.dcm")))[0]
    assert np.array_equal(open_study(tmp_path / "a.dcm").primary.voxels[0, :, :, 0].numpy().T, truth)
    made.Rows += 8
    made.save_as(tmp_path / "b.dcm")
    with pytest.raises(ValueError, match="of the size that the header says"):
        open_study(tmp_path / "b.dcm")


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
    assert study.named("Does the axial FLAIR show lesions?").sequence == "FLAIR"
    assert study.named("Is this a FLAIR?") is None
    name = next(s.name for s in study.series if s.kind == "ADC map")
    assert open_study(folder, series=[name.removeprefix("series ")]).primary.name == name
    with pytest.raises(ValueError, match="expected series from"):
        open_study(folder, series=["77"])


@pytest.mark.parametrize(
    ("question", "wanted"),
    [("Does the FLAIR show lesions?", "FLAIR"), ("lesions on the axial FLAIR", "FLAIR"), ("on the T2-weighted FLAIR", "FLAIR"),
     ("lesions on the 3D T1", "T1w"), ("on the T1 post contrast", "T1w-Gd"), ("blood on the T2*", "other"), ("on the T2", "T2w"),
     ("using DWI", "other"), ("series #2", "series 2"), ("in the second series", "series 2"), ("on series 3.1", "series 3.1"),
     ("in contrast to the left side, is the right one small?", ""), ("Was a contrast agent used?", ""), ("Write a report.", "")],
)  # fmt: skip
def test_a_question_names_a_series(question, wanted):
    assert Study.asked_for(question) == wanted


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


def test_what_lies_on_an_edge_of_rounding_is_one_volume(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "echo", shuffle=False)
    change(folder, EchoTime=lambda d: 12.25 + 0.0001 * (-1) ** int(d.InstanceNumber))
    assert [v.shape for v in open_study(folder).volumes] == [scan.shape]
    twice = write_dicom(scan, tmp_path / "twice", shuffle=False)
    for path in sorted(twice.iterdir())[:5]:  # a second repetition that was broken off
        d = pydicom.dcmread(path)
        d.SOPInstanceUID, d.InstanceNumber = generate_uid(), int(d.InstanceNumber) + 100
        d.save_as(twice / f"again{path.name}")
    assert "5 images of an incomplete repetition" in " ".join(open_study(twice).warnings)


def test_bits_above_the_stored_ones_are_no_values(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "plain")
    usual = open_study(folder).primary
    overlay = write_dicom(scan, tmp_path / "overlay")
    for path in overlay.iterdir():
        d = pydicom.dcmread(path)
        d.PixelData = (np.frombuffer(d.PixelData, np.uint16) | 0x8000).tobytes()
        d.save_as(path)
    assert torch.equal(open_study(overlay).primary.voxels, usual.voxels)
    signed = write_dicom(scan, tmp_path / "signed", header={"RescaleSlope": 1, "RescaleIntercept": 0})
    for path in signed.iterdir():
        d = pydicom.dcmread(path)
        values = np.frombuffer(d.PixelData, np.uint16) % 2048
        d.PixelRepresentation, d.PixelData = 1, np.where(values < 500, 0x0FFB, values).astype(np.uint16).tobytes()
        d.save_as(path)
        assert pydicom.dcmread(path).pixel_array.min() == -5
    found = open_study(signed).primary.voxels
    assert float(found.min()) == -5
    assert float(found.max()) < 2048


@pytest.mark.parametrize(
    ("header", "sequence"),
    [({"ContrastBolusAgent": "Gadobutrol"}, "T1w-Gd"), ({"ContrastBolusAgent": "NONE"}, "T1w"), ({"ContrastBolusAgent": " no "}, "T1w"),
     ({"ContrastBolusAgentSequence": [Dataset()]}, "T1w-Gd"), ({}, "T1w")],
)  # fmt: skip
def test_contrast_agent_is_recorded_in_several_ways(scan, tmp_path, header, sequence):
    folder = write_dicom(scan, tmp_path / "d", header={"RepetitionTime": 500, "EchoTime": 12, **header})
    assert open_study(folder).primary.sequence == sequence


def test_a_series_of_near_cubic_voxels_is_cited_by_its_own_slices(scan, tmp_path):
    from omnimri.grid import plane_of

    cubic = Volume(torch.rand(1, 40, 40, 40), torch.tensor([[0, 0, 1.0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]).double())
    assert plane_of(cubic) == ("axial", "axial")
    found = open_study(write_dicom(cubic, tmp_path / "sagittal")).primary
    assert len(found.source) == 40
    assert plane_of(found) == ("sagittal", "sagittal")


def test_directions_that_a_header_lacks_are_not_made_up(tmp_path):
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.random.default_rng(0).random((20, 24, 28), np.float32))
    for name in ("a.mha", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert open_study(tmp_path / name).primary.oriented
    bare = re.sub(rb"(TransformMatrix|AnatomicalOrientation) = [^\n]*\n", b"", (tmp_path / "a.mha").read_bytes())
    (tmp_path / "bare.mha").write_bytes(bare)
    scanner = (tmp_path / "a.nrrd").read_bytes().replace(b"space: left-posterior-superior", b"space: 3D-right-handed")
    (tmp_path / "bare.nrrd").write_bytes(scanner)
    for name in ("bare.mha", "bare.nrrd"):
        assert not open_study(tmp_path / name).primary.oriented


def test_gzip_inflates_within_one_limit_for_all(scan, tmp_path, monkeypatch):
    from omnimri.io import intake

    whole = write_dicom(scan, tmp_path / "d")
    (tmp_path / "z").mkdir()
    for path in whole.iterdir():
        (tmp_path / "z" / f"{path.name}.dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(intake, "MAX_TOTAL_BYTES", 3 * next(whole.iterdir()).stat().st_size)
    (tmp_path / "room").mkdir()
    with pytest.raises(ValueError, match="inflates beyond its limit"):
        intake._read_files(sorted((tmp_path / "z").iterdir()), tmp_path / "room", False, None)


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
