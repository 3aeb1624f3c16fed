"""The contract of the command line, on the embedded checkpoint where there is one to ask."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
import torch

from omnimri.checkpoint import EMBEDDED
from omnimri.cli import main
from omnimri.io import open_study
from omnimri.io.kspace import write_kspace
from omnimri.physics import fft2c, gaussian_coils, line_mask
from omnimri.volume import KSpace, Volume

from .conftest import write_dicom
from .test_intake import written
from .test_io import bad_inputs

FINDING = {"number", "name", "label", "side", "location", "volume_ml", "diameter_mm", "box_mm", "slice_index", "sop_instance_uid",
           "confidence"}


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def check_contract(answer: dict, shape) -> None:
    assert {"text", "findings", "study", "scope", "warnings", "model", "notice"} <= set(answer)
    assert answer["notice"] == "Research use only. Not a medical device."
    assert answer["study"]["sequence"] in ("T1w", "T1w-Gd", "T2w", "PDw", "FLAIR", "other")
    assert answer["study"]["sequence_source"] in ("header", "image")
    assert answer["study"]["shape"] == list(shape)
    assert len(answer["model"]["checkpoint_sha256"]) == 64
    for finding in answer["findings"]:
        assert set(finding) == FINDING
        assert finding["volume_ml"] > 0


@pytest.fixture(scope="module")
def mni(tmp_path_factory):
    from nilearn.datasets import load_mni152_template

    path = tmp_path_factory.mktemp("mni") / "mni.nii.gz"
    load_mni152_template(resolution=2).to_filename(path)
    return path


@pytest.fixture(scope="module")
def thick(mni, tmp_path_factory):
    """Every fifth axial slice of the template: looked at in one plane, in a third of the time."""
    path = tmp_path_factory.mktemp("thick") / "thick.nii.gz"
    nibabel.load(mni).slicer[:, :, ::5].to_filename(path)
    return path


@pytest.fixture(scope="module")
def head(thick):
    """`thick` as a volume."""
    return open_study(thick).primary


def test_help_is_fast_and_whole():
    out = subprocess.run([sys.executable, "-m", "omnimri.cli", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("info", "ask", "segment", "report", "reconstruct", "chat"):
        assert re.search(rf"^ +{command}\b", out, re.M), command


def test_info(capsys, scan_file, scan):
    status, out, _ = run(capsys, "info", scan_file, "--json")
    assert status == 0
    told = json.loads(out)
    assert told["series"][0]["shape"] == list(scan.shape)
    assert told["series"][0]["used"] is True


def test_segment_keeps_shape_and_affine_on_a_real_scan(capsys, mni, tmp_path):
    status, out, _ = run(capsys, "segment", mni, "--out", tmp_path / "seg.nii.gz", "--brain", tmp_path / "brain.nii.gz", "--json")
    assert status == 0
    scan, seg = nibabel.load(mni), nibabel.load(tmp_path / "seg.nii.gz")
    assert seg.shape == scan.shape
    assert np.allclose(seg.affine, scan.affine)
    labels = np.asarray(seg.dataobj)
    rows = [line.split("\t") for line in (tmp_path / "seg.tsv").read_text().splitlines()]
    assert rows[0] == ["label", "name", "voxels", "ml"]
    for label, _, voxels, ml in rows[1:]:
        assert int((labels == int(label)).sum()) == int(voxels)
        assert float(ml) == pytest.approx(int(voxels) * 0.008, abs=1e-3)
    assert set(np.unique(labels)) <= {0, *(int(r[0]) for r in rows[1:])}
    check_contract(json.loads(out), scan.shape)
    mask = nibabel.load(tmp_path / "brain.nii.gz")
    assert np.allclose(mask.affine, scan.affine)
    inside, tissue = np.asarray(mask.dataobj) > 0, (labels > 0) & (labels != 24)
    assert inside[tissue].all()
    assert 1.0 < inside.sum() / tissue.sum() < 1.2
    brain = np.asarray(scan.dataobj) > 0.2
    assert ((labels > 0) & brain).sum() / brain.sum() > 0.6
    world = lambda k: (np.argwhere(np.isin(labels, k)) @ scan.affine[:3, :3].T + scan.affine[:3, 3]).mean(0)  # noqa: E731
    assert world([2, 3])[0] < world([41, 42])[0], "left structures lie on the left"


def test_report_on_a_real_scan(capsys, thick, tmp_path):
    status, out, _ = run(capsys, "report", thick, "--out", tmp_path / "r", "--json")
    assert status == 0
    answer = json.loads(out)
    check_contract(answer, nibabel.load(thick).shape)
    assert "<" not in answer["text"]
    assert (tmp_path / "r" / "answer.md").read_text().count("Research use only")
    assert ("lesion in the" in answer["text"]) <= bool(answer["findings"])


def test_sequence_and_plane_of_a_real_scan(capsys, thick):
    status, out, _ = run(capsys, "ask", thick, "What sequence and plane is this?", "--json")
    assert status == 0
    text = json.loads(out)["text"]
    assert "axial" in text
    assert "T1-weighted" in text or "cannot" in text


def test_the_name_decides_the_mask(capsys, thick, tmp_path):
    """An answer's own query outlines the side that was named."""
    for side, label, sign in (("left", 3, -1), ("right", 42, 1)):
        status, out, _ = run(capsys, "ask", thick, f"Segment the {side} cerebral cortex.", "--out", tmp_path / side, "--json")
        assert status == 0
        assert f"{side} cerebral cortex" in json.loads(out)["text"]
        seg = nibabel.load(next((tmp_path / side).glob("*.nii.gz")))
        labels = np.asarray(seg.dataobj)
        assert set(np.unique(labels)) == {0, label}
        where = nibabel.affines.apply_affine(seg.affine, np.argwhere(labels == label))
        assert len(where) * 24 / 1000 > 50
        assert sign * where[:, 0].mean() > 15


def test_every_format_of_one_scan_gives_the_same_answer(capsys, head, tmp_path):
    answers = {}
    for path in written(head, tmp_path):
        if path.name in ("b.nii.gz", "e.nrrd", "f.mha", "dicom"):
            status, out, _ = run(capsys, "ask", path, "Write a report.", "--json")
            assert status == 0
            answers[path.name] = json.loads(out)
    first, dicom = answers["b.nii.gz"], answers["dicom"]
    assert first["scope"]["in_scope"]
    for name, other in answers.items():
        assert other["text"] == first["text"], name
        assert other["study"] == first["study"], name
        assert [f["slice_index"] for f in other["findings"]] == [f["slice_index"] for f in first["findings"]], name
    assert all(f["sop_instance_uid"].startswith("1.2.826") for f in dicom["findings"])
    assert all(f["sop_instance_uid"] is None for f in first["findings"])


@pytest.mark.parametrize("kind", ["noise", "stripes"])
def test_what_is_no_head_gets_an_abstention(capsys, tmp_path, kind):
    g = np.random.default_rng(0)
    x = g.normal(100, 25, (72, 72, 24)) if kind == "noise" else 100 + 50 * np.sin(np.indices((72, 72, 24)).sum(0) / 3)
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(x.astype(np.float32), np.diag([2.5, 2.5, 5, 1])), path)
    status, out, _ = run(capsys, "ask", path, "Write a report.", "--json")
    told = json.loads(out)
    assert status == 0
    assert not told["scope"]["in_scope"]
    assert told["text"].startswith("I cannot judge this study")
    assert not told["findings"]
    assert not any(s["voxels"] for s in told.get("structures", []))
    status, out, err = run(capsys, "segment", path, "--out", tmp_path / "seg.nii.gz", "--brain", tmp_path / "brain.nii.gz")
    assert status == 0
    assert "I cannot judge this study" in out
    assert "nothing is outlined" in err
    assert not np.asarray(nibabel.load(tmp_path / "brain.nii.gz").dataobj).any()


def test_turning_the_array_with_its_affine_changes_no_mask(capsys, head, thick, tmp_path):
    turned = head.voxels[0].permute(1, 2, 0).flip(0, 2).contiguous()
    affine = head.affine[:, [1, 2, 0, 3]].clone()
    for axis in (0, 2):
        affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
        affine[:3, axis] *= -1
    nibabel.save(nibabel.Nifti1Image(turned.numpy(), affine.numpy()), tmp_path / "turned.nii.gz")
    labels = []
    for path in (thick, tmp_path / "turned.nii.gz"):
        assert run(capsys, "segment", path, "--out", tmp_path / "seg.nii.gz")[0] == 0
        labels.append(np.asarray(nibabel.load(tmp_path / "seg.nii.gz").dataobj))
    back = labels[1][::-1, :, ::-1].transpose(2, 0, 1)
    assert len(np.unique(labels[0])) > 4
    assert (back == labels[0]).mean() > 0.999


def test_a_question_may_name_its_series(capsys, scan, tmp_path):
    """Two series of one study, of unlike geometry: the answer is about the one that is named, in that one's space, and says so."""
    thin = Volume(scan.voxels[:, :, :, ::2].contiguous(), scan.affine @ torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0]).double()))
    write_dicom(scan, tmp_path / "t1", header={"RepetitionTime": 500, "EchoTime": 12})
    write_dicom(thin, tmp_path / "flair", header={"RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500})
    told = {}
    for question in ("Segment the left thalamus.", "Segment the left thalamus on the FLAIR."):
        status, out, _ = run(capsys, "ask", tmp_path, question, "--json")
        assert status == 0
        told[question] = json.loads(out)
        check_contract(told[question], (scan if "FLAIR" not in question else thin).shape)
    first, second = told.values()
    assert (first["study"]["sequence"], second["study"]["sequence"]) == ("T1w", "FLAIR")
    assert any("answered on series 1 (T1w) of 2 series" in w for w in first["warnings"] + second["warnings"])
    assert any("(FLAIR) of 2 series" in w for w in second["warnings"])


@pytest.mark.parametrize(
    ("looks", "sure", "told"), [("T2w", 0.95, True), ("T2w", 0.8, False), ("T1w", 0.95, False), ("other", 0.95, False)]
)
def test_a_header_that_the_image_contradicts_is_told(capsys, head, tmp_path, monkeypatch, looks, sure, told):
    monkeypatch.setattr("omnimri.examination.named_sequence", lambda *_: looks)
    monkeypatch.setattr("omnimri.examination.likely_sequences", lambda *_: [(looks, sure)])
    folder = write_dicom(head, tmp_path / "d", header={"RepetitionTime": 500, "EchoTime": 12})
    answer = json.loads(run(capsys, "ask", folder, "What sequence is this?", "--json")[1])
    assert answer["study"]["sequence"] == "T1w"
    assert answer["study"]["sequence_source"] == "header"
    assert any("the header says T1-weighted, the image looks T2-weighted" in w for w in answer["warnings"]) == told


def test_reconstruct_simulated_kspace(capsys, tmp_path):
    from data_recipes import Phantom

    record = Phantom(image_size=96, num_slices=4).record(0, 3)
    k = record.kspace
    affine = torch.diag(torch.tensor([2.0, 2, 5, 1])).double()
    write_kspace(tmp_path / "k.h5", KSpace(k["kspace"][None], k["mask"], affine))
    status, _, _ = run(capsys, "reconstruct", tmp_path / "k.h5", "--out", tmp_path / "recon.nii.gz")
    assert status == 0
    image = nibabel.load(tmp_path / "recon.nii.gz")
    assert image.shape == (96, 96, 1)
    assert np.allclose(image.affine, affine)
    said, truth = np.asarray(image.dataobj)[:, :, 0].T, k["image"].numpy()
    assert np.corrcoef(said.ravel(), truth.ravel())[0, 1] > 0.9


def test_full_sampling_survives_the_command(capsys, tmp_path):
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 40), indexing="ij")
    image = ((x**2 + y**2) < 0.6).float() + 0.1
    data = fft2c(image * gaussian_coils(4, 48, 40, g))[None]
    write_kspace(tmp_path / "k.h5", KSpace(data, torch.ones(1, 40, dtype=torch.bool), torch.eye(4).double()))
    assert run(capsys, "reconstruct", tmp_path / "k.h5", "--out", tmp_path / "r.nii")[0] == 0
    said = np.asarray(nibabel.load(tmp_path / "r.nii").dataobj)[:, :, 0].T
    # Coil maps are estimated from the data here: their product with their conjugates is one only where there is signal.
    assert np.abs(said - image.numpy()).max() < 0.04
    assert line_mask(40, 2, g).sum() == 20


def test_bad_input_exits_2_with_one_sentence_and_writes_nothing(capsys, tmp_path, scan):
    (tmp_path / "bad").mkdir()
    for name, path in bad_inputs(tmp_path / "bad", scan).items():
        status, out, err = run(capsys, "segment", path, "--out", tmp_path / "seg.nii.gz")
        assert status == 2, name
        assert out == ""
        assert err.count("omnimri: ") == 1, (name, err)
        assert "Traceback" not in err
    assert not (tmp_path / "seg.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment", "SCAN", "--out", "x.nii.gz", "--structures", "left flux capacitor"], "unknown structure"),
        (["segment", "SCAN", "--out", "x.jpg"], "ending in"),
        (["segment", "SCAN", "--out", "x.nii.gz", "--brain", "x.nii.gz"], "two names"),
        (["ask", "SCAN", "  "], "expected a question"),
        (["ask", "SCAN", "why " * 2500], "at most"),
        (["ask", "SCAN", "Report.", "--checkpoint", "/nowhere"], "found none"),
        (["ask", "SCAN", "Report.", "--device", "tpu"], "device"),
        (["reconstruct", "SCAN", "--out", "x.nii.gz"], "k-space"),
    ],
)
def test_bad_requests_exit_2(capsys, scan_file, arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *[scan_file if a == "SCAN" else a for a in arguments])
    assert status == 2
    assert told in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_matches_no_weight_exits_2(capsys, scan_file, tmp_path, checkpoint):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "digests.json").unlink()
    save_file({"foreign": torch.zeros(2)}, tmp_path / "c" / "model.safetensors")
    status, _, err = run(capsys, "ask", scan_file, "Report.", "--checkpoint", tmp_path / "c")
    assert status == 2
    assert "none matches" in err


def test_the_embedded_checkpoint_is_small_whole_and_says_where_it_comes_from():
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) <= 45 * 10**6
    told = json.loads((EMBEDDED / "provenance.json").read_text())
    assert told["recipe"] == "synthetic"
    assert told["data_licence"] == "Apache-2.0"
    assert [s["stage"] for s in told["before"]][:2] == ["vision", "align"]
    assert "Research use only" in (EMBEDDED / "README.md").read_text()


def test_zip_and_folder_are_one(scan, tmp_path, capsys):
    folder = write_dicom(scan, tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for f in folder.iterdir():
            z.write(f, f.name)
    a, b = (json.loads(run(capsys, "info", p, "--json")[1]) for p in (folder, tmp_path / "d.zip"))
    assert a == b
