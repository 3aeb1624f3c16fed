"""A session opens, answers, shows, survives and forgets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from chat_app import export, views
from chat_app.session import REQUESTS, Session
from chat_app.views import FINDING
from chat_app.words import answer_markdown
from omnimri.assistant import Assistant
from omnimri.io.kspace import write_kspace
from omnimri.io.nifti import write_nifti
from omnimri.measure import MAX_INSTANCES
from omnimri.physics import fft2c, gaussian_coils, line_mask
from omnimri.volume import KSpace


@pytest.fixture(scope="module")
def assistant(checkpoint):
    return Assistant(checkpoint)


@pytest.fixture
def session(assistant, tmp_path):
    made = Session(assistant, tmp_path / "session")
    yield made
    made.close()


def test_a_question_needs_a_study(session):
    with pytest.raises(ValueError, match="no study is open"):
        session.ask("Write a report.")
    with pytest.raises(ValueError, match="open study to export"):
        export.write_files(session, session.folder / "export")


@pytest.mark.parametrize("name", ["Report", "Segment", "Find lesions"])
def test_buttons_give_answers_with_masks_in_the_scans_space(session, scan_file, scan, name):
    session.load(scan_file, keep=False)
    question, task = REQUESTS[name]
    told = []
    answer = session.ask(question, task=task, on_text=lambda t: told.append(t) is None)
    assert answer.labels.shape == scan.shape
    assert torch.allclose(answer.affine, scan.affine, atol=1e-4)
    assert told
    assert len(answer.findings) == len(session.assistant.examine(session.study.primary).lesions)
    names = {p.name for p in export.write_files(session, session.folder / "export")}
    assert {"report.json", "report.md"} <= names
    assert json.loads((session.folder / "export" / "report.json").read_text())["notice"].startswith("Research use only")


def test_views_are_square_lettered_and_overlaid(session, scan_file):
    session.load(scan_file, keep=False)
    for plane in ("axial", "coronal", "sagittal"):
        bare = session.key_image(plane)
        assert bare.shape == (512, 512, 3)
        assert bare.std() > 5
    session.labels = torch.zeros(session.shown.shape, dtype=torch.int32)
    session.labels[20:40, 20:40, 4:8] = 17
    assert not np.array_equal(views.draw(session.shown, "axial", 5, labels=session.labels), views.draw(session.shown, "axial", 5))
    assert [s["name"] for s in views.segments(session.drawn())] == ["left hippocampus"]


def test_kspace_is_reconstructed_in_the_conversation(session, tmp_path):
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = ((x**2 + y**2) < 0.7).float() + ((x - 0.2) ** 2 + y**2 < 0.1).float()
    mask = line_mask(64, 2.0, g)[None]
    write_kspace(tmp_path / "k.h5", KSpace(fft2c(image * gaussian_coils(4, 64, 64, g))[None].repeat(4, 1, 1, 1) * mask, mask,
                                          torch.diag(torch.tensor([3.0, 3, 3, 1])).double()))
    session.load(tmp_path / "k.h5")
    answer = session.ask("Reconstruct this.", task="reconstruct")
    made = answer.reconstruction.image.voxels[0]
    assert made.shape == (64, 64, 4)
    assert float(torch.corrcoef(torch.stack([made[:, :, 1].T.flatten(), image.flatten()]))[0, 1]) > 0.9
    before, after = session.before_after(1)
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
    assert np.array_equal(after, views.draw(session.shown, "axial", 1))
    assert answer.task == "reconstruct"
    assert session.shown.shape == (64, 64, 4)
    session.ask("Make it again: reconstruct.", task="reconstruct")
    session.reset()
    assert not session.assistant._seen, "a look at what was forgotten stays in memory"


def test_forgetting_leaves_nothing(assistant, scan_file, tmp_path):
    session = Session(assistant, tmp_path / "session")
    session.load(scan_file, keep=False)
    session.ask("Segment everything.", task="segment")
    export.write_files(session, session.folder / "export")
    folder = session.folder
    session.close()
    assert not folder.exists()
    assert session.study is None
    assert session.history == []
    assert not assistant._seen


def test_history_holds_slots_not_numbers(session, scan_file):
    session.load(scan_file, keep=False)
    session.ask("How large is the left thalamus?")
    session.ask("And on the right?")
    assert len(session.history) == 4
    for message in session.history:
        if message.role == "assistant":
            assert not any(c.isdigit() for c in message.text.replace("T1", "").replace("T2", "").replace("3rd", "").replace("4th", ""))


def test_a_stopped_answer_frees_the_assistant(assistant, scan_file, tmp_path):
    """Nobody listens: the look at the study ends at its next check, nothing is said, and the next question is answered."""
    session = Session(assistant, tmp_path / "stopped")
    session.load(scan_file, keep=False)
    assistant.forget()
    with pytest.raises(ValueError, match="stopped"):
        session.ask("Write a report.", task="report", on_text=lambda text: False)
    assert session.history == []
    assert not assistant._lock.locked()
    assert session.ask("What sequence and plane is this?").text


def test_what_is_forgotten_meanwhile_leaves_nothing(assistant, scan_file, tmp_path):
    session = Session(assistant, tmp_path / "gone")
    session.load(scan_file, keep=False)

    def forget(_: str) -> bool:
        if session.study is not None:
            session.reset()
        return True

    with pytest.raises(ValueError, match="forgotten"):
        session.ask("Write a report.", task="report", on_text=forget)
    assert list(session.folder.iterdir()) == []
    assert session.history == []


def test_the_viewers_files_do_not_pile_up(session, scan_file):
    session.load(scan_file, keep=False)
    first = session.scene()["volumes"][0]["url"]
    session.ask("Find lesions.", task="detect")
    for _ in range(3):
        scene = session.scene()
    assert scene["volumes"][0]["url"] == first
    assert len(list((session.folder / "viewer").iterdir())) == 2
    session.decide(1, "rejected")
    assert int((session.reviewed()[session.ranks == 1] > 0).sum()) == 0
    session.ask("Segment everything.", task="segment")
    under = session.covered[session.ranks == 1]
    assert torch.equal(session.reviewed()[session.ranks == 1], under), "what was rejected gives its voxels back to its structures"
    assert not bool(((under == 25) | (under == 57)).any())


def test_an_answer_on_another_series_does_not_mix(session, scan_file):
    """Its words stay; its masks and findings belong to another lattice."""
    session.load(scan_file, keep=False)
    answer = session.ask("Find lesions.", task="detect")
    before, items = session.labels, dict(session.review.items)
    other = replace(answer, affine=answer.affine + 1.0, labels=torch.ones_like(answer.labels), findings=answer.findings[:1])
    assert not session.is_of_shown(other)
    assert session.is_of_shown(answer)
    assert not session.is_of_shown(replace(answer, study={**answer.study, "used": "series 9"})), "another series on the same lattice"
    session._take(session.study, "And on the other?", other)
    assert torch.equal(session.labels, before)
    assert session.review.items == items
    assert session.history[-1].role == "assistant"
    assert "#finding-" in answer_markdown(answer)
    assert "#finding-" not in answer_markdown(other, linked=False)


def test_slices_and_steps_follow_the_scans_own_axes(assistant, scan, tmp_path):
    """Stored with the slice axis first: slices are counted along it, and a key press moves by its spacing."""
    turned = scan.voxels[0].permute(2, 0, 1).contiguous()
    affine = scan.affine[:, [2, 0, 1, 3]]
    write_nifti(tmp_path / "turned.nii.gz", turned, affine)
    session = Session(assistant, tmp_path / "session")
    session.load(tmp_path / "turned.nii.gz", keep=False)
    assert session.num_slices() == 12
    assert session.scene()["step_mm"] == pytest.approx(scan.spacing_mm, rel=1e-4)
    session.close()


def test_a_reconstruction_is_there_after_a_restart(assistant, tmp_path, monkeypatch):
    session = Session(assistant, tmp_path / "session")
    g = torch.Generator().manual_seed(0)
    image = torch.zeros(64, 64)
    image[16:48, 20:44] = 1
    mask = line_mask(64, 2.0, g)[None]
    data = fft2c(image * gaussian_coils(4, 64, 64, g))[None].repeat(3, 1, 1, 1) * mask
    write_kspace(tmp_path / "k.h5", KSpace(data, mask, torch.eye(4).double()))
    session.load(tmp_path / "k.h5")
    session.ask("Reconstruct this.", task="reconstruct")
    shown = session.before_after(1)
    again = Session(assistant, tmp_path / "session")
    assert all(np.array_equal(a, b) for a, b in zip(shown, again.before_after(1), strict=True))
    assert again.scene()["compare"] == "zero-filled"
    (tmp_path / "session" / "zero_filled.nii").unlink()
    older = Session(assistant, tmp_path / "session")
    assert older.scene()["compare"] == "", "of an earlier version, which kept none"
    older.say("Reconstruct this.", "…")
    monkeypatch.setattr(assistant, "digest", "0" * 64)
    other = Session(assistant, tmp_path / "session")
    other.overview()
    assert other.shown is None, "another model's image"
    other.close()


def test_labels_of_findings_are_no_structures_and_fit_the_viewers_table_of_colours():
    assert max(views.LABEL_NAMES) < FINDING
    assert FINDING + MAX_INSTANCES < 512


def test_why_there_is_no_segmentation_to_export(session, scan):
    session.shown = scan
    assert export.why_no_segmentation(session) == export.NOT_DICOM
    session.shown = replace(scan, source=("1.2",) * scan.shape[2])
    assert export.why_no_segmentation(session) == export.MULTIFRAME
    session.shown = replace(scan, source=tuple(f"1.2.{k}" for k in range(scan.shape[2])))
    assert export.why_no_segmentation(session) == ""
