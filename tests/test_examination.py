"""What is seen in a volume before any words: planes, lesions and their rule, sequence, scope, sides."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from omnimri.anatomy import SEQUENCES
from omnimri.assistant import Assistant
from omnimri.cli import write_answer
from omnimri.examination import examine, likely_sequences, more_planes, named_sequence, scope_score
from omnimri.example import LESION_CLASS, language_slices
from omnimri.grounding import pool_evidence
from omnimri.lesions import LesionRule, lesion_ranks
from omnimri.tasks import Segment
from omnimri.volume import Volume
from stages.release import choose_rule, mean_of


def test_a_lesion_is_seen_in_other_planes_too_and_reaches_to_its_edge(checkpoint, monkeypatch):
    """Cubes in three views: one that only the first plane sees, one that all see, with a rim that they half see."""
    voxels = torch.rand(1, 72, 72, 72, generator=torch.Generator().manual_seed(0))
    cube = Volume(voxels, torch.diag(torch.tensor([1.5, 1.5, 1.5, 1]).double()))
    seen_by_all, rim, alone = torch.zeros(3, 72, 72, 72, dtype=torch.bool)
    seen_by_all[20:30, 20:30, 20:30] = rim[19:31, 20:30, 20:30] = alone[50:60, 50:60, 50:60] = True
    asked = []

    def probability(self, predicted, grid):
        asked.append(grid.plane)
        return torch.where(seen_by_all, 0.99, torch.where(rim, 0.4, torch.where(alone, 0.99 if len(asked) == 1 else 0.0, 0.0)))

    monkeypatch.setattr(Segment, "read_lesion", probability)
    monkeypatch.setattr(Segment, "read", lambda self, *views: torch.full((72, 72, 72), 2, dtype=torch.int32))
    made = Assistant(checkpoint)
    seen = examine(made.model, made.tokenizer, cube, rule=LesionRule(sure=0.9))
    assert len(set(asked)) == 3
    assert len(seen.lesions) == 1
    assert torch.equal(seen.lesion_ranks == 1, rim)


@pytest.mark.parametrize(("level", "shown"), [(2.0, 1), (0.1, 2)])
def test_in_bright_fluid_nothing_is_a_lesion(checkpoint, monkeypatch, level, shown):
    labels = torch.full((72, 72, 72), 2, dtype=torch.int32)
    labels[30:50, 30:50, 30:50] = 4
    voxels = torch.rand(1, 72, 72, 72) + 0.5
    voxels[0, labels == 4] = level
    found = torch.zeros(72, 72, 72)
    found[10:20, 10:20, 10:20] = found[32:38, 32:38, 32:38] = 0.95
    monkeypatch.setattr(Segment, "read_lesion", lambda self, predicted, grid: found)
    monkeypatch.setattr(Segment, "read", lambda self, *views: labels.clone())
    made = Assistant(checkpoint)
    cube = Volume(voxels, torch.diag(torch.tensor([1.5, 1.5, 1.5, 1]).double()))
    seen = examine(made.model, made.tokenizer, cube, rule=LesionRule(sure=0.9))
    assert len(seen.lesions) == shown
    assert int((seen.lesion_ranks == 1).sum()) == 1000


def test_where_one_lesion_is_sure_others_are_shown_from_a_lower_probability_on():
    probability = torch.zeros(30, 30, 10)
    brain = torch.ones_like(probability, dtype=torch.bool)
    probability[2:8, 2:8, 2:8] = 0.7
    probability[12:15, 12:15, 2:5] = 0.65
    probability[20:22, 20:22, 2:4] = 0.45  # no seed
    rule = LesionRule(sure=0.9, sure_alone=0.6, further=0.5, least_ml=0.008, weights=(1.0, 0.5, 0.0))
    assert lesion_ranks(probability, brain, 0.001, rule)[1] == []
    assert lesion_ranks(probability, brain, 0.001, rule.alone())[1] == pytest.approx([0.7, 0.65])
    assert lesion_ranks(probability, brain, 0.001, replace(rule, sure_alone=0.68).alone())[1] == pytest.approx([0.7])
    probability[13, 13, 3] = 0.95
    ranks, peaks = lesion_ranks(probability, brain, 0.001, rule)
    assert peaks == pytest.approx([0.7, 0.95])
    assert int((ranks == 1).sum()) == 216
    assert int((ranks == 2).sum()) == 27
    assert lesion_ranks(probability, brain, 1.0, replace(rule, least_ml=30.0))[1] == []  # the sure one is too small
    assert rule.confidence(0.95, 0.95, 0.1) > rule.confidence(0.7, 0.95, 0.1) > rule.confidence(0.7, 0.8, 0.9)
    assert LesionRule().confidence(0.9, 0.9, 0.4) == rule.alone().confidence(0.9, 0.9, 0.4) == 0.4
    assert LesionRule.of(SimpleNamespace(lesion_rule={"sure": 0.7, "weights": [1, 0, 0]})).confidence(0.8, 0.9, 0.0) == pytest.approx(0.8)
    for other in (None, {"unsure": 1}, {"sure": "0.5"}, {"weights": [1.0]}, {"further": []}):
        with pytest.raises(ValueError, match="lesion_rule"):
            LesionRule.of(SimpleNamespace(lesion_rule=other))


def test_the_rule_of_lesions_is_chosen_on_held_out_studies():
    config = SimpleNamespace()
    sick = [[(0.99, True), (0.75, True), (0.55, False), (0.62, None)]] * 20 + [[(0.6, True)]] * 4
    normal = [[(0.93, False)]] * 1 + [[(0.7, False), (0.85, False)]] * 9 + [[]] * 20
    told = choose_rule(config, sick + normal, [False] * 24 + [True] * 30, alone=0.98)
    # One of 30 normal studies may be called sick; a third of the further lesions from 0.5 on would be wrong.
    assert config.lesion_rule["sure"] == 0.9
    assert config.lesion_rule["further"] == 0.6
    assert (told["normal_with_a_finding"], told["shown"], told["seen"]) == (1, 41, 20)
    assert told["precision"] == pytest.approx(40 / 41)
    rule = LesionRule.of(config)
    assert rule.sure_alone == 0.98
    assert rule.confidence(0.99, 0.99, 0.0) > 0.9 > 0.6 > rule.confidence(0.93, 0.93, 0.0)
    for studies in ([[(0.9999, False)]] * 10, [[]] * 9):
        choose_rule(config, studies, [True] * len(studies), alone=0.9)
        assert config.lesion_rule["sure"] > 1  # nothing is ever shown: all would be false; too few to tell
        assert "weights" not in config.lesion_rule
    choose_rule(config, [[(0.99, False)]] * 5 + [[]] * 10, [False] * 5 + [True] * 10, alone=0.9)
    assert config.lesion_rule["sure"] == 0.5  # lower ones were not looked at
    assert config.lesion_sensitivity == 0  # what is shown in sick studies is false


@pytest.mark.parametrize(
    ("shape", "spacing", "more"),
    [((192, 192, 30), (1.0, 1.0, 5.0), 2), ((192, 192, 20), (1.0, 1.0, 5.0), 0), ((192, 192, 16), (1.0, 1.0, 9.0), 0),
     ((100, 100, 100), (1.0, 1.0, 1.0), 2), ((192, 192, 1), (1.0, 1.0, 5.0), 0), ((60, 60, 60), (1.0, 1.0, 1.0), 0)],
)  # fmt: skip
def test_all_but_slabs_are_looked_at_in_three_planes(shape, spacing, more):
    volume = Volume(torch.zeros(1, *shape), torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))
    assert len(set(more_planes(volume, "axial")) - {"axial"}) == more


@pytest.mark.parametrize(
    ("limits", "told"),
    [({"T1w": 0.8, "T1w-Gd": 0.5}, "T1w-Gd"), ({"T1w": 0.8, "T1w-Gd": 0.9}, "T1w"), ({"T1w": 0.8}, "T1w"), ({"T1w": 0.99}, "other")],
)
def test_t1_weighted_is_said_where_contrast_agent_cannot_be(limits, told):
    share = dict.fromkeys(SEQUENCES, 0.01) | {"T1w-Gd": 0.6, "T1w": 0.3}
    heads = {"sequence": lambda _: torch.tensor([[share[s] for s in SEQUENCES]]).log()}
    model = SimpleNamespace(heads=heads, config=SimpleNamespace(sequence_thresholds=limits))
    assert named_sequence(model, likely_sequences(model, torch.zeros(1))) == told


def test_what_is_out_of_scope_has_no_sequence(checkpoint, scan_file, monkeypatch):
    from omnimri import Assistant, examination, open_study

    made = Assistant(checkpoint)
    made.model.config.sequence_thresholds = {"T2w": 0.9}
    monkeypatch.setattr(examination, "likely_sequences", lambda *_: [("T2w", 1.0)])
    monkeypatch.setattr(examination, "signal_words", lambda *_: ("grey matter: darker",))
    for score, told in ((0.5, "T2w"), (2.0, "other")):
        monkeypatch.setattr(examination, "scope_score", lambda *_, score=score: score)
        made.forget()
        assert made.answer(open_study(scan_file), "What sequence is this?").study["sequence"] == told


def test_a_mean_of_weights_needs_one_form():
    one, two = {"a": torch.zeros(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(3)}
    assert torch.equal(mean_of(one, two)["a"], torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="one form, got 1 weights"):
        mean_of(one, two | {"b": torch.ones(4)})


def test_slices_for_language_lie_alike_from_both_ends():
    """Of eight slices neither the first nor the last is one of four."""
    for n in range(1, 60):
        chosen = language_slices(n, 4)
        assert torch.equal(chosen, n - 1 - chosen.flip(0))
        assert len(chosen.unique()) == min(n, 4)
    assert language_slices(8, 4).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize(("far", "doubtful", "out"), [(0.3, 0.9, False), (0.8, 0.1, False), (0.8, 0.9, True), (1.1, 0.0, True)])
def test_doubt_alone_is_no_reason_to_refuse(far, doubtful, out):
    """A large tumour makes masks doubtful; what is no head makes them so, and is unlike heads too."""
    claimed, contested = torch.tensor([0.0, 5.0, 0.0]), torch.tensor([0.0, 0.1, 0.0])
    share = torch.arange(100).view(1, 1, 10, 10) < 100 * doubtful
    structures = torch.where(share, contested.view(1, 3, 1, 1), claimed.view(1, 3, 1, 1))
    head = SimpleNamespace(logits=lambda *_: (structures, torch.zeros(1, 10, 10)))
    model = SimpleNamespace(scope_limit=torch.tensor(1.0), scope_mean=torch.zeros(2), scope_whiten=torch.eye(2), heads={"segment": head},
                            config=SimpleNamespace(scope_together=1.5, doubt_limit=1.0))
    assert (scope_score(model, torch.tensor([[[far, 0.0]]]), torch.zeros(1, 2, 3), torch.zeros(1, 8, 10, 10)) > 1) == out


def test_a_file_without_orientation_has_no_sides(checkpoint, scan_file, monkeypatch, tmp_path):
    """In no place of a lesion and in no sentence about one; tables say that sides are unknown."""
    from omnimri import Assistant, examination, open_study

    made, study = Assistant(checkpoint), open_study(scan_file)
    study = replace(study, volumes=(replace(study.primary, oriented=False),))
    monkeypatch.setattr(examination, "scope_score", lambda *_: 0.0)
    monkeypatch.setattr(examination, "lesion_ranks", lambda p, brain, *_: (brain.to(torch.uint8), [0.99]))
    answer = made.answer(study, "Find lesions.", task="detect")
    assert answer.findings
    assert not any(w in f"{answer.text} {answer.findings[0].lesion.place}" for w in ("left", "right"))
    assert "sides are unknown" in " ".join(answer.warnings)
    write_answer(answer, tmp_path)
    assert (tmp_path / "labels.tsv").read_text().endswith("# sides are unknown: the file gives no orientation\n")
    numbers = np.unique(nibabel.load(tmp_path / "findings.nii.gz").dataobj)
    assert {f["number"] for f in json.loads((tmp_path / "answer.json").read_text())["findings"]} == {*numbers.tolist()} - {0}
    assert answer.to_json()["findings"][0]["label"] is None


def test_slices_decoded_in_parts_are_those_of_the_whole(checkpoint, monkeypatch):
    """In parts of eight, whose neighbours lie in the parts beside them, as in one."""
    from omnimri import examination

    made = Assistant(checkpoint)
    voxels = torch.rand(1, 72, 72, 40, generator=torch.Generator().manual_seed(0))
    volume = Volume(voxels, torch.diag(torch.tensor([1.5, 1.5, 2.0, 1]).double()))
    with torch.no_grad():
        for parameter in made.model.heads["pixels"].depth.out.parameters():
            parameter.normal_(0, 0.1)  # an untrained one mixes nothing
    found = []
    for chunk in (2, 100):
        monkeypatch.setattr(examination, "CHUNK", chunk)
        view = examine(made.model, made.tokenizer, volume, rule=LesionRule()).views[0]
        found.append(view.fine)
    assert len(found[0]) == 40
    assert float((found[0].float() - found[1].float()).abs().max()) < 0.01 * float(found[1].float().abs().max())


def test_evidence_is_the_mean_over_each_mask():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2 * 3, 4, 8, 8, generator=g, requires_grad=True)
    classes = torch.randint(0, 6, (2, 3, 8, 8), generator=g)
    classes[0, 0, 0, 0] = 255
    lesions = torch.randint(0, 3, (2, 3, 8, 8), generator=g)
    positions = torch.tensor([[0.0, 5.0, 10.0], [-4.0, 0.0, 7.0]])
    pooled = pool_evidence(features, classes, lesions, positions)
    by_study = features.view(2, 3, 4, 8, 8).transpose(1, 2)
    for b in range(2):
        for k, where in [*((k, classes[b] == k) for k in range(1, 6)), *((LESION_CLASS + r - 1, lesions[b] == r) for r in (1, 2))]:
            row = pooled[b, k]
            assert torch.allclose(row[:4], by_study[b][:, where].mean(1), atol=1e-5)
            assert float(row[4]) == 1.0
            assert float(row[5]) == pytest.approx(float(torch.log10(where.float().mean() + 1e-6)) / 6, abs=1e-5)
            s, y, x = (v.float() for v in torch.nonzero(where).T)
            assert row[6:9].tolist() == pytest.approx(
                [float(positions[b][s.long()].mean()) / 100, float(y.mean()) / 3.5 - 1, float(x.mean()) / 3.5 - 1], abs=1e-5
            )
    assert not pooled[:, 7:LESION_CLASS, 4].any()  # what no mask has
    pooled[..., :4].sum().backward()
    assert bool(torch.isfinite(features.grad).all())
