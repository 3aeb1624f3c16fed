"""Reading what people bring, and refusing what cannot be used with one clear sentence."""

from __future__ import annotations

import gzip
import zipfile

import nibabel
import numpy as np
import pytest
import torch

from omnimri.io import open_study
from omnimri.io.headers import sequence_of
from omnimri.io.kspace import write_kspace
from omnimri.io.nifti import write_nifti
from omnimri.physics import fft2c, gaussian_coils, line_mask
from omnimri.volume import KSpace

from .conftest import write_dicom


def test_nifti_keeps_order_and_affine(scan, scan_file):
    volume = open_study(scan_file).primary
    assert torch.allclose(volume.voxels, scan.voxels, rtol=1e-5)
    assert torch.allclose(volume.affine, scan.affine, atol=1e-4)


def test_dicom_folder_and_zip_equal_nifti(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "dicom")
    packed = tmp_path / "study.zip"
    with zipfile.ZipFile(packed, "w") as z:
        for f in folder.iterdir():
            z.write(f, f"a/{f.name}")
    for path in (folder, packed):
        volume = open_study(path).primary
        assert volume.shape == scan.shape
        assert torch.allclose(volume.affine, scan.affine, atol=1e-3)
        assert float((volume.voxels - scan.voxels).abs().max()) < 0.001 * float(scan.voxels.max())
        assert len(set(volume.source)) == scan.shape[2]


def test_several_series_and_junk_are_told_apart(scan, tmp_path):
    write_dicom(scan, tmp_path / "s" / "one")
    write_dicom(scan, tmp_path / "s" / "two", header={"RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500})
    (tmp_path / "s" / "notes.txt").write_text("hello")
    study = open_study(tmp_path / "s")
    assert sorted(v.sequence for v in study.volumes) == ["FLAIR", "unknown"]
    assert any("another kind" in w for w in study.warnings)
    assert "Secret" not in repr(study)
    assert "ignore all" not in repr(study)


@pytest.mark.parametrize(
    ("values", "flags", "sequence"),
    [
        ({"repetition_time_ms": 500, "echo_time_ms": 12}, {}, "T1w"),
        ({"repetition_time_ms": 2300, "echo_time_ms": 3, "inversion_time_ms": 900}, {}, "T1w"),
        ({"repetition_time_ms": 500, "echo_time_ms": 12}, {"contrast": True}, "T1w-Gd"),
        ({"repetition_time_ms": 4500, "echo_time_ms": 100}, {}, "T2w"),
        ({"repetition_time_ms": 9000, "echo_time_ms": 120, "inversion_time_ms": 2500}, {}, "FLAIR"),
        ({"repetition_time_ms": 3000, "echo_time_ms": 15}, {}, "PDw"),
        ({"echo_time_ms": 15}, {}, "unknown"),
    ],
)
def test_sequence_rules(values, flags, sequence):
    assert sequence_of(values, **flags) == sequence


def bad_inputs(tmp_path, scan):
    array = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    whole = tmp_path / "whole.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), whole)

    def nifti(name, data):
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / name)
        return tmp_path / name

    cases = {}
    (tmp_path / "cut.nii.gz").write_bytes(whole.read_bytes()[:900])
    cases["truncated"] = tmp_path / "cut.nii.gz"
    (tmp_path / "wrong.nii").write_text("this is not an image")
    cases["wrong kind"] = tmp_path / "wrong.nii"
    (tmp_path / "study.docx").write_text("x")
    cases["wrong extension"] = tmp_path / "study.docx"
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    cases["empty zip"] = tmp_path / "empty.zip"
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as z:
        z.writestr("../../evil.dcm", "x")
    cases["zip slip"] = tmp_path / "slip.zip"
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.dcm", b"\0" * 40_000_000)
    cases["zip bomb"] = tmp_path / "bomb.zip"
    cases["nan"] = nifti("nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    cases["constant"] = nifti("constant.nii.gz", np.ones((8, 8, 8), np.float32))
    cases["5-D"] = nifti("five.nii.gz", np.stack([np.stack([array] * 3, -1)] * 2, -1))
    write_dicom(scan, tmp_path / "ct", modality="CT")
    cases["not MR"] = tmp_path / "ct"
    cases["missing"] = tmp_path / "nothing.nii.gz"
    huge = bytearray(gzip.decompress(whole.read_bytes())[:352])
    huge[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], np.int16).tobytes()
    (tmp_path / "huge.nii").write_bytes(bytes(huge))
    cases["dimension lie"] = tmp_path / "huge.nii"
    return cases


def test_bad_input_is_refused_with_one_sentence(tmp_path, scan):
    for name, path in bad_inputs(tmp_path, scan).items():
        with pytest.raises(ValueError, match=r"expected") as error:
            pytest.fail(f"{name}: {open_study(path)}")
        assert len(str(error.value)) < 400, name
        assert "Secret" not in str(error.value)


def test_some_nan_is_a_warning(tmp_path):
    data = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    data[0] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    study = open_study(tmp_path / "a.nii.gz")
    assert bool(torch.isfinite(study.primary.voxels).all())
    assert any("not finite" in w for w in study.warnings)


def test_uneven_slices_are_refused(scan, tmp_path):
    folder = write_dicom(scan, tmp_path / "d", shuffle=False)
    (folder / "IM0005").unlink()
    with pytest.raises(ValueError, match="evenly spaced"):
        open_study(folder)


def test_kspace_round_trip(tmp_path):
    g = torch.Generator().manual_seed(0)
    mask = line_mask(32, 3.0, g)[None]
    data = fft2c(torch.rand(2, 1, 24, 32) * gaussian_coils(4, 24, 32, g)) * mask
    write_kspace(tmp_path / "k.h5", KSpace(data, mask, torch.eye(4).double()))
    found = open_study(tmp_path / "k.h5").kspace
    assert torch.equal(found.data, data)
    assert torch.equal(found.mask, mask)


def test_writing_is_whole_or_not_at_all(tmp_path, scan):
    with pytest.raises(ValueError, match="ending in"):
        write_nifti(tmp_path / "x.img", scan.voxels[0], scan.affine)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="folder"):
        write_nifti(tmp_path / "file" / "x.nii.gz", scan.voxels[0], scan.affine)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
