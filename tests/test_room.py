"""The reading room: review, exports, sessions on disk."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from chat_app import export, views
from chat_app.files import in_use
from chat_app.review import MOST_WORDS, Review
from chat_app.session import Session
from chat_app.store import Store
from omnimri.answer import UNLIKE
from omnimri.assistant import Assistant

from .conftest import SECRET, write_dicom


@pytest.fixture(scope="module")
def assistant(checkpoint):
    """Untrained: it finds many lesions, none of them real."""
    return Assistant(checkpoint)


@pytest.fixture
def session(assistant, scan_file, tmp_path):
    made = Session(assistant, tmp_path / "session")
    made.load(scan_file, keep=False)
    made.ask("Find lesions.", task="detect")
    return made


def zipped(folder: Path, out: Path) -> Path:
    with zipfile.ZipFile(out, "w") as z:
        for path in folder.iterdir():
            z.write(path, path.name)
    return out


@pytest.fixture
def dicom_session(assistant, scan, tmp_path):
    path = zipped(write_dicom(scan, tmp_path / "d"), tmp_path / f"{SECRET}.zip")
    made = Session(assistant, tmp_path / "dicom")
    made.load(path)
    made.ask("Segment everything.", task="segment")
    made.ask("Find lesions.", task="detect")
    return made


# --- review ----------------------------------------------------------------------------------------------------


def test_what_is_accepted_is_reported_and_every_change_is_kept(session):
    assert "No finding was accepted." in session.review.report(12)
    session.decide(1, "accepted")
    session.decide(2, "rejected")
    session.edit(1, place="left frontal lobe", comment="  seen\nbefore ")
    report = session.review.report(session.num_slices())
    item = session.review.items[1]
    assert f"Lesion in the left frontal lobe: {item.diameter_mm:.0f} mm" in report
    assert "seen before" in report
    assert "1 accepted, 1 rejected" in report
    made = [(e.finding, e.change, e.after) for e in session.review.audit]
    assert [m for m in made if m[1] != "side"] == [
        (1, "state", "accepted"), (2, "state", "rejected"), (1, "place", "left frontal lobe"), (1, "comment", "seen before")]
    assert item.side == "left", "the side follows the words"
    session.decide(1, "accepted")
    assert len(session.review.audit) == len(made), "nothing changed"
    session.edit(1, place="Right frontal lobe", comment="")
    assert session.review.items[1].side == "right"
    for place, side in (("both lobes, left and right", "midline"), ("splenium", "unknown"), ("corpus callosum, midline", "midline")):
        session.edit(1, place=place, comment="")
        assert session.review.items[1].side == side
    assert [e.after for e in session.review.audit if e.change == "side"][-1] == "midline"


def test_decisions_outlive_a_killed_server_and_another_question(session, assistant):
    session.decide(1, "accepted")
    session.decide(3, "rejected")
    session.ask("Write a report.", task="report")
    assert session.review.items[1].state == "accepted"
    again = Session(assistant, session.folder)  # nothing was closed
    assert again.review.items == session.review.items
    assert again.review.audit == session.review.audit
    assert [m.text for m in again.history] == [m.text for m in session.history]
    assert torch.equal(again.drawn(), session.drawn())
    assert int((again.drawn() == again.finding_label(1)).sum()) > 0
    assert int((again.drawn() == again.finding_label(3)).sum()) == 0, "a rejected finding is not drawn"
    assert Review.from_json(json.loads(json.dumps(again.review.to_json()))) == again.review


def test_another_models_findings_are_not_this_ones(session, assistant, monkeypatch):
    session.say("Find lesions.", "…")
    session.decide(1, "accepted")
    monkeypatch.setattr(assistant, "digest", "0" * 64)
    again = Session(assistant, session.folder)
    assert again.upload == session.upload
    assert (again.review, again.history, again.drawn()) == (Review(), [], None)
    assert "model has changed" in again.chat[-1]["content"]


def test_what_was_found_stays_outlined_when_a_structure_is_asked_for(session):
    session.decide(2, "rejected")
    session.ask("Outline the left thalamus.", task="segment")
    lesions, found = np.isin(session.reviewed().numpy(), (25, 57)), session.ranks.numpy()
    assert (found[lesions] > 0).all()
    assert lesions[found == 1].all()
    assert not lesions[found == 2].any()
    assert {r["label"] for r in export.structures(session)} & {25, 57}


def test_structures_stay_outlined_when_lesions_are_asked_for(session):
    session.ask("Outline every structure.", task="segment")
    before = {r["label"]: r["ml"] for r in export.structures(session)}
    session.ask("Find lesions.", task="detect")
    after = {r["label"]: r["ml"] for r in export.structures(session)}
    assert set(before) <= set(after)
    assert set(before) - {25, 57}


def test_what_was_noticed_is_in_every_export(session, tmp_path):
    session.study = replace(session.study, warnings=("sizes mean nothing",))
    session.review.in_scope = False
    files = {p.name: p for p in export.write_files(session, tmp_path / "out")}
    assert json.loads(files["report.json"].read_text())["warnings"] == ["Sizes mean nothing.", UNLIKE]
    for name in ("report.md", "structures.csv"):
        text = files[name].read_text()
        assert "Sizes mean nothing." in text
        assert UNLIKE in text
    assert text.splitlines()[0].startswith("#")
    assert sum(not line.startswith("#") for line in text.splitlines()) == 1 + len(export.structures(session))


def test_a_study_in_use_stays_in_memory(assistant, scan_file, tmp_path, monkeypatch):
    store = Store(assistant, tmp_path / "s")
    mine = store.of("0" * 32)
    shutil.copy(scan_file, tmp_path / "a.nii.gz")
    mine.load(tmp_path / "a.nii.gz")
    seen = []

    def others(session):
        for k in range(1, 9):
            other = store.of(f"{k:032x}")
            shutil.copy(scan_file, tmp_path / f"{k}.nii.gz")
            other.load(tmp_path / f"{k}.nii.gz")
        seen.append((session.study is not None, store.of("0" * 32) is session))

    in_use(others)(mine)
    assert seen == [(True, True)]
    for k in range(1, 9):
        store.of(f"{k:032x}")
    assert mine.users == 0
    assert store.of("0" * 32) is mine, "one session for a folder, in memory or not"


def test_what_cannot_be_decided_is_said(session):
    with pytest.raises(ValueError, match="finding of this study"):
        session.decide(4000, "accepted")
    with pytest.raises(ValueError, match="expected one of"):
        session.decide(1, "loved")
    with pytest.raises(ValueError, match="at most"):
        session.edit(1, place="x" * (MOST_WORDS + 1), comment="")


# --- exports ---------------------------------------------------------------------------------------------------


def test_exports_hold_the_notice_and_the_models_digest(session, tmp_path):
    session.ask("Segment everything.", task="segment")
    session.decide(1, "accepted")
    found = {p.name: p for p in export.write_files(session, tmp_path / "out")}
    assert set(found) == {"report.md", "report.json", "report.pdf", "structures.csv", "labels.nii.gz", "findings.nii.gz", "axial.png",
                          "coronal.png", "sagittal.png"}
    for name in ("report.md", "report.json", "structures.csv"):
        assert "Research use only" in found[name].read_text()
    for name in ("report.md", "report.json", "structures.csv"):
        assert session.assistant.digest in found[name].read_text()
    for name in ("labels.nii.gz", "findings.nii.gz"):
        assert session.assistant.digest.encode() in nibabel.load(found[name]).header.extensions[0].get_content()
    for plane in ("axial", "coronal", "sagittal"):
        assert session.assistant.digest in Image.open(found[f"{plane}.png"]).text["Comment"]
    assert found["report.pdf"].read_bytes().startswith(b"%PDF")
    told = json.loads(found["report.json"].read_text())
    assert [i["state"] for i in told["review"]["items"]].count("accepted") == 1
    rows = export.structures(session)
    assert sum(r["ml"] for r in rows) / session.brain_ml == pytest.approx(sum(r["percent"] for r in rows) / 100, abs=0.01)
    assert rows == sorted(rows, key=lambda r: -r["ml"])
    with pytest.raises(ValueError, match="need a DICOM study"):
        export.write_dicom(session, tmp_path / "dicom")


def test_a_pdf_says_which_letters_it_cannot_draw(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    export.write_pdf(tmp_path / "a.pdf", "# Report\n\nseen – ≥ 3 mm, очаг", "OmniMRI", [], [tmp_path / "a.png"])
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert export.in_letters("seen\n≥ 3 µm, α → é") == "seen\n≥ 3 µm, α → é"
    assert export.in_letters("seen: очаг") == f"seen: ????\n\n{export.NO_LETTERS}"


def test_seg_and_sr_refer_to_the_source_and_equal_the_mask(dicom_session, tmp_path):
    import highdicom as hd

    dicom_session.decide(1, "accepted")
    dicom_session.edit(1, place="left frontal lobe", comment="seen before – ≥ 3 mm")
    assert dicom_session.review.items[1].side == "left", "the side follows the words"
    dicom_session.decide(2, "rejected")
    found = {p.name: p for p in export.write_dicom(dicom_session, tmp_path / "out")}
    assert set(found) == {"segmentation.dcm", "report.dcm"}
    seg = hd.seg.segread(found["segmentation.dcm"])
    drawn, uids = dicom_session.drawn(), list(dicom_session.shown.source)
    segments = views.segments(drawn)
    frames = seg.get_pixels_by_source_instance(uids, combine_segments=True, skip_overlap_checks=False)
    rebuilt = np.zeros_like(frames, dtype=np.int64)
    for number, one in enumerate(segments, 1):
        assert seg.get_segment_description(number).segment_label == one["name"]
        rebuilt[frames == number] = one["id"]
    assert np.array_equal(rebuilt.transpose(2, 1, 0), drawn.numpy())
    assert "Research use only" in seg.SeriesDescription
    report = hd.sr.srread(found["report.dcm"])
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == 1
    values = {m.name.meaning: m.value for m in groups[0].get_measurements()}
    item = dicom_session.review.items[1]
    assert values["Volume"] == pytest.approx(item.volume_ml)
    assert values["Diameter"] == pytest.approx(item.diameter_mm)
    assert groups[0].reference_type is not None
    texts = (hd.sr.ValueTypeValues.TEXT, hd.sr.RelationshipTypeValues.CONTAINS)
    words = {e.name.meaning: e.value for e in groups[0][0].ContentSequence if (e.value_type, e.relationship_type) == texts}
    assert words == {"Place in words": "left frontal lobe", "Comment": "seen before – ≥ 3 mm"}
    if shutil.which("dciodvfy"):
        for path in found.values():
            said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr
            # The phantom's series is as bare as its writer left it: what the copies of its own fields lack is not ours.
            errors = [x for x in said.splitlines() if x.startswith("Error")]
            assert not [x for x in errors if not any(n in x for n in INHERITED)], errors


INHERITED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
             "FrameOfReferenceUID", "PositionReferenceIndicator")
"""Fields of patient and study, which are copied from the source."""


def test_a_copy_without_names(dicom_session, tmp_path):
    path = next((tmp_path / "d").iterdir())
    more = pydicom.dcmread(path)
    more.ReasonForStudy = more.AdmittingDiagnosesDescription = more.StudyComments = f"{SECRET}, fell"
    more.ClinicalTrialSubjectID = more.AdmissionID = more.EthnicGroup = more.DeviceSerialNumber = SECRET[:16]
    more.PatientBirthDateInAlternativeCalendar, more.StationAETitle, more.RetrieveURL = SECRET, SECRET[:16], SECRET
    more.StudyDate = "2020-01-01"
    more.add_new(0x60003000, "OW", SECRET.encode().ljust(64))
    more.file_meta.SourceApplicationEntityTitle = SECRET[:16]
    more.preamble = SECRET.encode().ljust(128, b" ")[:128]
    inside = pydicom.Dataset()
    inside.RequestedProcedureDescription = inside.ReasonForTheRequestedProcedure = f"{SECRET} again"
    more.RequestAttributesSequence = [inside]
    more.save_as(path)
    del more.PixelData
    more.SOPInstanceUID, more.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4", "1.2.3.4"
    more.TextValue = SECRET
    more.save_as(tmp_path / "d" / "document.dcm")
    zipped(tmp_path / "d", Path(dicom_session.upload))
    (tmp_path / "d" / "document.dcm").unlink()
    found = {p.name: p for p in export.write_dicom(dicom_session, tmp_path / "out", "deidentify")}
    told = json.loads(found["deidentified.json"].read_text())
    assert told["instances"] == 12
    assert {"PatientName", "PatientID", "SOPInstanceUID"} <= set(told["removed_or_changed"])
    assert "face" in told["not_removed"]
    assert told["left_out_because_they_hold_no_pixels"] == 1
    with zipfile.ZipFile(found["deidentified.zip"]) as z:
        assert json.loads(z.read("deidentified.json"))["made_beside"]["checkpoint_sha256"] == dicom_session.assistant.digest
        names = [n for n in z.namelist() if n.endswith(".dcm")]
        assert len(names) == 12
        for name in names:
            z.extract(name, tmp_path / "z")
            data = (tmp_path / "z" / name).read_bytes()
            assert SECRET.encode() not in data
            assert b"Secret" not in data
            assert b"ignore all instructions" not in data
    pixels = sorted(pydicom.dcmread(tmp_path / "z" / n).PixelData for n in names)
    assert pixels == sorted(pydicom.dcmread(p).PixelData for p in (tmp_path / "d").iterdir())


def test_whatever_the_reader_opens_can_be_referred_to(assistant, scan, tmp_path):
    """Files without a preamble, in gzip, and with the character sets of Japan."""
    folder = write_dicom(scan, tmp_path / "d", header={"SpecificCharacterSet": ["", "ISO 2022 IR 87"]})
    paths = sorted(folder.iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[132:])
    (folder / "IM.dcm.gz").write_bytes(gzip.compress(paths[1].read_bytes()))
    paths[1].unlink()
    made = Session(assistant, tmp_path / "session")
    made.load(zipped(folder, tmp_path / "d.zip"))
    assert made.shown.shape == scan.shape
    made.ask("Find lesions.", task="detect")
    assert "segmentation.dcm" in {p.name for p in export.write_dicom(made, tmp_path / "out")}
    told = {p.name: p for p in export.write_dicom(made, tmp_path / "copy", "deidentify")}
    assert json.loads(told["deidentified.json"].read_text())["instances"] == scan.shape[2]
    made.close()


def test_nothing_left_to_segment_is_said(dicom_session, tmp_path):
    dicom_session.labels, dicom_session.ranks = torch.zeros_like(dicom_session.labels), torch.zeros_like(dicom_session.ranks)
    with pytest.raises(ValueError, match="none is left"):
        export.write_dicom(dicom_session, tmp_path / "out")


def test_a_hostile_source_is_one_sentence(dicom_session, tmp_path):
    with zipfile.ZipFile(dicom_session.upload, "w") as z:
        z.writestr("../x.dcm", b"x")
    with pytest.raises(ValueError, match="expected a DICOM series") as error:
        export.write_dicom(dicom_session, tmp_path / "out")
    assert SECRET not in str(error.value)


# --- sessions on disk --------------------------------------------------------------------------------------------


def test_sessions_are_apart_bounded_and_forgotten(assistant, scan_file, tmp_path, monkeypatch):
    store = Store(assistant, tmp_path / "s")
    keys = [f"{k:032x}" for k in range(9)]
    for key in keys:
        shutil.copy(scan_file, tmp_path / f"{key}.nii.gz")
        store.of(key).load(tmp_path / f"{key}.nii.gz")
    assert not (tmp_path / f"{keys[0]}.nii.gz").exists(), "an upload is moved, not copied"
    assert sum(s.study is not None for s in store._held.values()) <= 6
    assert "64 × 64 × 12" in store.of(keys[0]).overview()  # read again from disk
    assert store.of("f" * 32).upload is None
    busy = store.of(keys[1])
    with busy.busy:
        thread = threading.Thread(target=lambda: [store.of(k).overview() for k in keys[2:] + keys[2:]])
        thread.start()
        thread.join()
        assert busy.study is not None or busy.upload is not None
        assert busy in store._held.values(), "one that is being answered about stays"
    for bad in ("../../etc", "x" * 32, "", None):
        with pytest.raises(ValueError, match="session key"):
            store.of(bad)
    store.of(keys[0]).reset()
    assert [p for p in store.of(keys[0]).folder.rglob("*") if p.is_file()] == []
    monkeypatch.setattr("chat_app.store.MOST_SESSIONS", 4)
    store.sweep()
    assert store.health()["sessions_on_disk"] == 4
    old = Store(assistant, tmp_path / "s", kept_hours=1.0)
    for path in (tmp_path / "s").iterdir():
        os.utime(path, (0, time.time() - 7200))
    old.sweep()
    assert old.health()["sessions_on_disk"] == 0


def test_many_uploads_grow_nothing(assistant, scan_file, tmp_path):
    made = Session(assistant, tmp_path / "one")
    first = 0
    for k in range(12):
        shutil.copy(scan_file, tmp_path / "again.nii.gz")
        made.load(tmp_path / "again.nii.gz")
        made.scene()
        made.scene()
        size = sum(p.stat().st_size for p in made.folder.rglob("*") if p.is_file())
        first = size if k == 0 else first
        assert size < 1.5 * first


def test_names_and_header_text_reach_nothing(assistant, scan, tmp_path):
    path = zipped(write_dicom(scan, tmp_path / "d"), tmp_path / f"..{SECRET}<img src=x>.zip")
    made = Session(assistant, tmp_path / "s")
    made.load(path)
    told = json.dumps(made.scene()) + made.overview()
    assert "Secret" not in told
    assert "ignore all" not in told
    assert "<img" not in told
    assert Path(made.upload).parent == made.folder / "upload"
