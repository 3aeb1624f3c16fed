"""Suites on an untrained model: every table, controls, interruption, a failing case, scoring without the model, cases and their truth."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_recipes import Phantom
from data_recipes.phantom import record_volume
from data_recipes.recipe import generator
from data_recipes.wording import Voice
from eval import cases as case_list
from eval import findings, predict, scoring, suite
from eval.__main__ import main
from eval.cases import Case, Truth
from eval.metrics.report import METRICS
from omnimri.anatomy import LESION_LABEL, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.io import study_of
from omnimri.io.nifti import write_nifti
from omnimri.lesions import Lesion
from omnimri.measure import measure
from omnimri.volume import KSpace, Study

TABLE = torch.tensor([0, *(s.label for s in STRUCTURES)])


def phantom_case(index):
    record = Phantom(image_size=64, num_slices=6).record(9, index)
    labels, lesions = (x.permute(2, 1, 0).numpy() for x in (TABLE[record.labels.long()], record.lesions))
    kspace = KSpace(record.kspace["kspace"][None], record.kspace["mask"], torch.eye(4, dtype=torch.float64))
    truth = Truth(
        record.sequence,
        record.plane,
        bool(record.lesion_places),
        labels=labels,
        lesions=(lesions > 0) & (lesions < 255),
        report=f"{record.plane} MRI of the brain. No focal lesion.",
        image=record.kspace["image"][None].numpy(),
    )
    return Study(volumes=(record_volume(record),), kspace=kspace), truth


def broken():
    raise RuntimeError("disk on fire")


def unreadable():
    raise ValueError("expected an image, got a poem")


@pytest.fixture
def cases():
    made = [Case(f"head {k}", "synthetic", f"p{k}", lambda k=k: phantom_case(k)) for k in range(4)]
    noise = np.random.default_rng(0).normal(size=(32, 32, 8)).astype(np.float32)
    other = Case("noise", "refused", "noise", lambda: (study_of(noise, np.diag([2.0, 2, 4, 1]), oriented=True), Truth()))
    return [*made, Case("broken", "synthetic", "p9", broken), other, Case("poem", "refused", "poem", unreadable)]


def test_a_suite_is_predicted_scored_interrupted_and_scored_again(cases, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    asked = []
    plain = predict.ask
    whole = Assistant.answer
    # An untrained model never ends an answer: it is stopped after its first word.
    monkeypatch.setattr(predict, "wavelet_reconstruction", lambda *_: None)  # its threads add in any order
    monkeypatch.setattr(Assistant, "answer", lambda *a, **k: whole(*a, **k, on_text=lambda _: False))

    def interrupted(assistant, study):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(study)
        return plain(assistant, study)

    monkeypatch.setattr(predict, "ask", interrupted)
    settings = {"checkpoint": str(checkpoint), "controls": True, "pooled": True}
    with pytest.raises(KeyboardInterrupt):
        suite.run(cases, out, score_only=False, **settings)
    kept = {p.parent.name: p.stat().st_mtime_ns for p in (out / "predictions" / "model").glob("head*/answer.json")}
    assert len(kept) == 2
    monkeypatch.setattr(predict, "ask", plain)
    first = suite.run(cases, out, score_only=False, **settings)
    assert all((out / "predictions" / "model" / name / "answer.json").stat().st_mtime_ns == t for name, t in kept.items())
    assert not list((out / "predictions").rglob("*.partial"))
    assert any(f == "broken: model: RuntimeError: disk on fire" for f in first["failures"])
    titles = {t["title"].split(" (")[0].split(",")[0] for t in first["tables"]}
    assert titles == {
        "Tissue and brain mask",
        "Structures",
        "Lesions",
        "Reports against the reference",
        "Reconstruction of undersampled k-space",
        "Grounding and honesty",
    }
    assert {"suite_version", "commit", "checkpoint_sha256", "libraries"} <= set(first)
    structures = next(t for t in first["tables"] if t["title"].startswith("Structures"))
    assert {"model", "random weights", "three Gaussians"} <= set(structures["rows"][0]["values"])
    assert structures["rows"][0]["values"]["model"]["n"] == 4
    assert any("pooled" in r["metric"] for r in structures["rows"])
    text = (out / "results.md").read_text()
    assert "Research use only" in text
    assert "poem: refused when read: expected an image, got a poem" in text
    assert (out / "figures" / "synthetic.png").stat().st_size > 5000
    monkeypatch.setattr(suite, "Assistant", lambda *_: pytest.fail("a model was loaded"))
    again = suite.run(cases, out, score_only=True, **settings)
    assert json.dumps(again["tables"]) == json.dumps(json.loads(json.dumps(first["tables"])))
    other = Case("head 0", "synthetic", "p0", lambda: phantom_case(7))
    listed = suite.run([other], out, score_only=True, **settings)["failures"]
    assert listed == ["head 0: expected the study that was predicted, got other voxels; predict it again"]
    kept = (out / "results.json").read_bytes()
    with pytest.raises(ValueError, match="a prediction of 'new'"):
        suite.run([*cases, Case("new", "synthetic", "p", lambda: phantom_case(8))], out, score_only=True, **settings)
    assert (out / "results.json").read_bytes() == kept
    with pytest.raises(ValueError, match="without --score-only"):
        suite.run(cases, tmp_path / "none", score_only=True, **settings)


def test_without_controls_no_column_stands_for_them(cases, checkpoint, tmp_path, monkeypatch):
    whole = Assistant.answer
    monkeypatch.setattr(Assistant, "answer", lambda *a, **k: whole(*a, **k, on_text=lambda _: False))
    results = suite.run(cases[:2], tmp_path, checkpoint=str(checkpoint), score_only=False, controls=False, pooled=False)
    assert not any(predict.RANDOM in r["values"] for t in results["tables"] for r in t["rows"])
    assert any(t["title"].startswith("Reports") for t in results["tables"])


def test_a_report_by_rule_says_what_the_masks_show():
    recipe = Phantom(image_size=64, num_slices=6)
    record = next(r for r in (recipe.record(9, k) for k in range(40)) if r.lesion_places and r.sequence == "FLAIR")
    volume = record_volume(record)
    structures, ranks = (x.permute(2, 1, 0) for x in (TABLE[record.labels.long()], record.lesions))
    sides = [p.split()[0] for p in record.lesion_places]
    said = structures.numpy().copy()
    for rank, side in enumerate(sides, 1):
        said[(ranks == rank).numpy()] = LESION_LABEL[side]
    known = list(enumerate(zip(sides, record.lesion_places, strict=True), 1))
    findings = [{"number": k, "side": side, "location": place} for k, (side, place) in known]
    told = {"findings": findings, "text": "It abstains.", "scope": {"in_scope": True}}
    told["study"] = {"plane": record.plane, "sequence": "FLAIR"}
    seen = scoring.Scored(Case("one", "synthetic", "p", None), Study(volumes=(volume,)), Truth(), {predict.MODEL: {"report": told}},
                          {predict.MODEL: said})  # fmt: skip
    true = [Lesion(k, side, place, measure(ranks == k, volume, slice_axis=2), 1.0, 1.0) for k, (side, place) in known]
    reference = case_list.written(Voice(generator(1), wide=False), record, true, volume)
    metric = METRICS["fact F1"]
    assert metric([scoring.by_rule(seen)], [[reference]]) > 0.95  # the brain-stem lies under the lesion, of which a map tells no more
    said[said == LESION_LABEL[sides[0]]] = 2
    told["findings"] = []
    assert metric([scoring.by_rule(seen)], [[reference]]) < 0.9
    told["scope"]["in_scope"] = False
    assert scoring.by_rule(seen) == "It abstains."


def seen_as(truth_labels, said_labels, *, suite_name="synthetic", **truth):
    """A `Scored` of a small volume without any model."""
    voxels = np.random.default_rng(0).random(truth_labels.shape).astype(np.float32)
    study = study_of(voxels, np.diag([1.0, 1.0, 2.0, 1.0]), oriented=True)
    told = {
        "detect": {"findings": []},
        "report": {"findings": [], "text": "No lesion is found.", "scope": {"score": 0.1, "in_scope": True}},
        "what": {"study": {"plane": "axial", "sequence": "other", "sequence_source": "image"}},
        "seconds": {"segment": 1.0, "report": 1.0},
        "peak_memory_gib": 1.0,
    }
    case = Case("one", suite_name, "one", None)
    return scoring.Scored(case, study, Truth(labels=truth_labels, **truth), {predict.MODEL: told}, {predict.MODEL: said_labels})


def test_perfect_masks_score_one_and_a_lesion_counts_as_white_matter():
    rng = np.random.default_rng(1)
    truth = rng.choice([0, 2, 3, 41, 42, 4, 43], size=(20, 20, 10))
    said = truth.copy()
    said[(truth == 2) & (rng.random(truth.shape) < 0.2)] = 25
    table = scoring.Structures("synthetic", pooled=False)
    table.see(seen_as(truth, said))
    rows = {(r["what"], r["metric"]): r["values"][predict.MODEL] for r in table.table().rows}
    assert rows["left cerebral white matter", "dice"]["value"] == 1.0
    assert rows["mean of the structures of a case", "hausdorff95_mm"]["value"] == 0.0
    assert np.isnan(rows["brain-stem", "dice"]["value"])
    assert rows["brain-stem", "dice"]["n"] == 0


def test_what_the_reference_draws_only_in_part_has_a_mean_without_it():
    truth = np.zeros((20, 20, 10), np.int32)
    truth[:5], truth[5:10], truth[10, 0, 0] = 2, 41, 24
    said = truth.copy()
    said[12:], said[5] = 24, 2  # all the fluid, and a slice of white matter on the other side
    table = scoring.Structures("freesurfer", pooled=False)
    table.see(seen_as(truth, said, partial=(24,)))
    told = table.table()
    rows = {r["what"]: r["values"][predict.MODEL]["value"] for r in told.rows if r["metric"] == "dice"}
    assert rows["CSF"] < 0.01
    assert rows["mean of the structures of a case"] < 0.65
    assert 0.85 < rows["mean of those that are wholly drawn"] < 1
    assert rows["mean of those that are wholly drawn, sides as one"] == 1
    assert told.notes == ["drawn only in part by the reference: CSF"]


def test_honesty_counts_what_is_denied_and_numbers_that_are_no_masks():
    lesions = np.zeros((20, 20, 10), bool)
    lesions[5:10, 5:10, 4:6] = True
    said = np.where(lesions, 25, 0)
    s = seen_as(np.zeros(lesions.shape, np.int32), said, lesions=lesions, lesion=True, plane="axial", sequence="T1w")
    honesty = findings.Honesty(predict.MODEL)
    honesty.see(s)
    assert honesty.denied == [1, 1]
    assert honesty.facts["plane"] == [1, 1]
    assert honesty.facts["sequence read off the image, where one is named"] == [0, 0]
    finding = {"volume_ml": 0.1, "diameter_mm": 7.07, "confidence": 0.9, "box_mm": [[4.5, 4.5, 7.0], [9.5, 9.5, 11.0]], "side": "left"}
    told = {"text": "There is a lesion of 7 mm and 0.1 ml.", "findings": [finding]}
    assert findings.numbers_agree(told, said, s) == (3, 3)
    assert findings.numbers_agree({**told, "text": "A lesion of 9 mm."}, said, s) == (1, 2)
    assert findings.numbers_agree({**told, "findings": [{**finding, "volume_ml": 5.0}]}, said, s)[0] < 3


def test_boxes_are_in_millimetres_at_voxel_edges():
    mask = np.zeros((20, 20, 10), bool)
    mask[2:6, 3:9, 1:4] = True
    mask[15, 15, 8] = True  # 0.002 ml: too small
    s = seen_as(mask.astype(np.int32), mask.astype(np.int32))
    boxes, volumes = findings.boxes_of(mask, s)
    assert boxes == (((1.5, 2.5, 1.0), (5.5, 8.5, 7.0)),)
    assert volumes == pytest.approx((4 * 6 * 3 * 2 / 1000,))


def test_baselines():
    rng = np.random.default_rng(0)
    image = np.zeros((30, 30, 10), np.float32)
    image[5:25, 5:25] = rng.choice([30.0, 60.0, 100.0], size=(20, 20, 10)) + rng.normal(0, 2, (20, 20, 10))
    labels = predict.mixture_labels(image, "T1w")
    assert set(np.unique(labels)) == {0, 2, 3, 24}
    assert (labels[(image > 85)] == 2).all()
    image[10:12, 10:12, 3:5] = 300
    assert predict.bright_lesions(image)[10:12, 10:12, 3:5].all()
    assert predict.bright_lesions(image).mean() < 0.05


def test_cases_and_their_truth(tmp_path, capsys):
    rows = {c.name: c for c in case_list.cases_of("brats")}
    assert len(rows) == 8
    assert len({c.patient for c in rows.values()}) == 4
    assert {c.suite for c in case_list.cases_of("refused")} == {"refused"}
    for arguments, said in ((["nothing"], "a suite from"), (["synthetic"], "--maps"), (["colin", "--score-only"], "without --score-only")):
        assert main(["suite", *arguments, "--out", str(tmp_path / "o")]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="in one of the folders"):
        rows["brats3_flair"].source()
    array = np.zeros((8, 9, 10), np.float32)
    array[2:5] = 1
    study = study_of(array, np.diag([1.0, 2, 3, 1]), oriented=True)
    write_nifti(tmp_path / "mask.nii.gz", torch.from_numpy(array), study.primary.affine)
    assert case_list.load_mask(tmp_path / "mask.nii.gz", study).sum() == array.sum()
    moved = study_of(array, np.diag([1.0, 2, 4, 1]), oriented=True)
    with pytest.raises(ValueError, match="on the scan's own lattice"):
        case_list.load_mask(tmp_path / "mask.nii.gz", moved)


def test_freesurfer_labels_become_the_structures():
    labels = np.zeros((5, 5, 5), int)
    labels[0], labels[1], labels[2, 0], labels[2, 1], labels[3], labels[4] = 11101, 2, 251, 77, 41, 12175
    found = case_list.to_structures(labels)
    assert (found[0] == 3).all()
    assert (found[4] == 42).all()
    assert set(np.unique(found[2, :2])) <= {2, 41}
    labels[2] = 1
    assert (case_list.to_structures(labels)[2] == 0).all()


def test_the_pictures_sides_are_radiological():
    """What lies on the patient's left is drawn on the right of an axial picture."""
    shown = []
    axes = [
        SimpleNamespace(
            imshow=lambda x, **_: shown.append(np.asarray(x)),
            contour=lambda *_, **__: None,
            text=lambda *_, **__: None,
            axis=lambda *_: None,
            transAxes=None,
        )
        for _ in range(3)
    ]
    image = np.zeros((30, 40, 20), np.float32)
    image[2:10, 15:25, 5:15] = 1.0  # low x in RAS+: left
    study = study_of(image, np.diag([1.0, 1, 1, 1]), oriented=True)
    suite.draw_planes(axes, study.primary, np.where(image > 0, 2, 0), None)
    axial = shown[0]
    assert axial.shape == (40, 30)
    assert axial[:, 15:].sum() > 0
    assert axial[:, :15].sum() == 0
