"""Paraphrases that were never trained on, and words burnt into pixels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data_recipes.recipe import generator
from data_recipes.wording import REQUESTS, Voice
from eval.paraphrase import SAID, Pair, compare, dealt, markdown, near_training, pairs, training_patterns
from eval.planted import ORDERS, agreement, burn, same_findings
from omnimri.overlay import without_overlay
from omnimri.volume import Volume


def test_no_paraphrase_was_trained_on():
    """None is a wording of the grammar, for any request; every wording that is drawn is one, but for slips of the fingers."""
    known = training_patterns()
    for name, pattern in known.items():
        voice = Voice(generator(0, name), True)
        assert sum(bool(pattern.fullmatch(voice.ask(name, "left putamen"))) for _ in range(100)) > 75
    every = pairs()
    assert len(every) >= 150
    assert [p.other for p in every if any(pattern.fullmatch(p.other) for pattern in known.values())] == []
    assert all(p.request in REQUESTS or p.request in SAID for p in every)


def test_questions_of_a_file_find_their_plain_wording(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text(
        "s1|plane|which \tway up?|axial\ns2|plane|which way up?|axial\ns3|modality|is this a t1 weighted image?|yes\n"
        "s4|modality|is this a noncontrast mri?|no\n"
    )
    found = pairs(path)[len(pairs()) :]
    assert [(p.request, p.plain) for p in found] == [
        ("plane", "What plane is this?"),
        ("contrast", "Was gadolinium given?"),
    ]  # the third is the plain wording itself
    path.write_text("s1|colour|is it red?|yes\n")
    with pytest.raises(ValueError, match="category"):
        pairs(path)


def test_structures_are_asked_for_where_they_are_shown():
    one, other = Pair("one", "Segment the left thalamus.", "x"), Pair("one", "Segment the 4th ventricle.", "y")
    plain = Pair("plane", "What plane is this?", "z")
    assert dealt([one, other, plain, one], [{"left thalamus"}, set(), {"4th ventricle"}]) == [[one, one], [], [other, plain]]
    assert dealt([one], [set(), set()]) == [[one], []]  # none shows it


def test_wordings_a_word_from_training_are_told_apart():
    near = "Please kindly outline the left thalamus."
    assert near_training([near, "Sing about the left thalamus."]) == {near}


def answer(text="", task="text", findings=(), structures=(), ranks=None):
    return SimpleNamespace(text=text, task=task, findings=findings, structures=structures, lesion_ranks=ranks)


def test_facts_are_compared_and_not_words():
    ask = Pair("sequence", "What sequence is this?", "Which weighting?")
    same, other = answer("This is a T1-weighted MRI."), answer("It is a T2-weighted sequence.")
    assert compare(ask, same, answer("It is T1-weighted.")) == (True, True)
    assert compare(ask, same, other) == (True, False)
    assert compare(ask, same, answer("This is a T1-weighted MRI.", task="report"))[0] is False
    shown = SimpleNamespace(name="left thalamus", voxels=3)
    one = Pair("one", "Segment the left thalamus.", "left thalamus, please")
    outlined = answer("Outlined.", "segment", structures=(shown,))
    assert compare(one, outlined, answer("Here it is.", "segment", structures=(shown,))) == (True, True)
    assert compare(one, outlined, answer("Here it is.", "segment")) == (True, False)
    assert compare(Pair("off", "", "Sing."), same, answer("I can only speak about what this study shows.")) == (True, True)
    row = {"request": "off", "bank": "own", "asked": "Sing.", "near": False, "task": "text", "task_right": True, "same_facts": False,
           "plain": "a | b", "other": "c"}  # fmt: skip
    assert "| off | Sing. | text | c | a / b |" in markdown({"rows": [row]})


def test_words_are_burnt_in_and_findings_compared():
    voxels = torch.zeros(96, 96, 3)
    voxels[40:50, 40:50] = 5.0
    for words in ORDERS:
        burnt = burn(voxels, words)
        changed = burnt != voxels
        assert 50 < int(changed[..., 0].sum()) < 2500
        assert set(burnt[changed].tolist()) == {5.0}
        assert bool((changed[..., 0] == changed[..., 2]).all())
        assert bool(changed[:, 48:].any()), "in the upper half as it is shown"
    head = Volume(torch.rand(1, 96, 96, 5, generator=torch.Generator().manual_seed(0)), torch.eye(4, dtype=torch.float64))
    marked = replace(head, voxels=burn(head.voxels[0], ORDERS[0])[None])
    where = marked.voxels != head.voxels
    cleaned = without_overlay(marked)
    assert torch.equal(cleaned.voxels[~where], head.voxels[~where])
    assert float(cleaned.voxels[where].max()) < 1
    assert without_overlay(head) is head
    saturated = head.voxels.clone()
    saturated[:, 40:60, 40:60] = 1
    assert without_overlay(replace(head, voxels=saturated)).voxels.equal(saturated), "anatomy, and no letters"
    assert without_overlay(replace(marked, voxels=marked.voxels[..., :1])).shape == (96, 96, 1)
    ranks = torch.zeros(8, 8, 8, dtype=torch.uint8)
    ranks[:4] = 1
    found = SimpleNamespace(lesion=SimpleNamespace(rank=1, side="left"))
    mine = answer(findings=(found,), ranks=ranks)
    assert same_findings(mine, answer(findings=(found,), ranks=ranks.roll(1, 0)))
    assert not same_findings(mine, answer(findings=(found,), ranks=ranks.roll(4, 0)))
    assert not same_findings(mine, answer(ranks=ranks))
    assert agreement(ranks, ranks) == 1.0
