"""The sequence, read off an image: what the profile of its masks holds, fluid closed in, the head that is fitted, its thresholds."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from data_recipes import Phantom
from data_recipes.variation import OTHER_FLUID, VENTRICLES, closed
from omnimri.anatomy import NAMES, SEQUENCES, WHITE_CLASSES
from omnimri.examination import LOOKS_ALIKE, likely_sequences
from omnimri.measure import PROFILE_SIZE, signal_profile
from omnimri.model.omnimri import SequenceHead
from stages.release import drawn
from stages.sequence import fit_head, learn_sequence, sequence_thresholds, spoilt, studies

FLUID = VENTRICLES + OTHER_FLUID
CLASS = {name: 1 + NAMES.index(name) for name in NAMES}


def brain(fluid: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, classes and lesions (2, 64, 64) of a brain of blocks: white matter 1.0, cortex 0.7, ventricles on both sides."""
    image, classes = torch.zeros(2, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    for side, where in (("left", slice(4, 32)), ("right", slice(32, 60))):
        classes[:, 8:56, where] = CLASS[f"{side} cerebral white matter"]
        classes[:, 8:16, where] = CLASS[f"{side} cerebral cortex"]
        classes[:, 28:34, where.start + 10 : where.start + 18] = CLASS[f"{side} lateral ventricle"]
    for k, value in ((CLASS[n], {"white matter": 1.0, "cortex": 0.7}.get(n.split("cerebral ")[-1], fluid)) for n in NAMES):
        image[classes == k] = value
    return image, classes, torch.zeros(2, 64, 64, dtype=torch.long)


TISSUE = 3 * len({n.removeprefix("left ").removeprefix("right ") for n in NAMES})
"""Numbers of structures in a profile; those of fluid and of lesions follow."""


@pytest.mark.parametrize("sides", [("left",), ("right",), ("left", "right")])
def test_a_lesion_its_rim_and_its_side_do_not_change_what_tissue_looks_like(sides):
    """Of one side all white matter is changed, far from the lesion too; of both what lies within four pixels of lesions of one size."""
    image, classes, lesions = brain()
    plain = signal_profile(image, classes, lesions)
    for side in sides:
        first = 14 if side == "left" else 42
        lesions[:, 42:50, first : first + 8] = 1
        image[:, 39:53, first - 3 : first + 11] = 2.5
        if len(sides) == 1:
            image[classes == CLASS[f"{side} cerebral white matter"]] = 2.5
    sick = signal_profile(image, classes, lesions)
    assert plain.shape == sick.shape == (PROFILE_SIZE,)
    assert float((plain - sick)[:TISSUE].abs().max()) < 0.02  # every structure's median, spread and presence
    lesion = slice(TISSUE + 14, TISSUE + 16)  # after seven numbers each of ventricles and of other fluid
    assert plain[lesion].tolist() == [0.0, 0.0]
    assert sick[lesion].tolist() == pytest.approx([math.log(2.55 / 1.05), 1.0], abs=0.01)


def test_dark_fluid_is_seen_where_masks_of_ventricles_spill_over():
    """Slits: a tenth of the mask of the ventricles is fluid; by the median it is tissue."""
    profiles = []
    for fluid in (0.1, 3.0):
        image, classes, lesions = brain(fluid)
        spilt = torch.isin(classes, torch.tensor(VENTRICLES))
        slit = torch.zeros_like(spilt)
        slit[:, 30:31] = True
        image[spilt & ~slit] = 1.0
        profiles.append(signal_profile(image, classes, lesions))
    assert float((profiles[0] - profiles[1]).abs().max()) > 1.5
    ventricle_median = 3 * sorted({n.removeprefix("left ").removeprefix("right ") for n in NAMES}).index("lateral ventricle")
    assert float(profiles[0][ventricle_median]) == pytest.approx(float(profiles[1][ventricle_median]), abs=0.05)


@pytest.mark.parametrize("classes", [0, 1])
def test_a_profile_of_nothing_is_finite(classes):
    profile = signal_profile(torch.zeros(1, 8, 8), torch.full((1, 8, 8), classes), torch.zeros(1, 8, 8, dtype=torch.long))
    assert bool(torch.isfinite(profile).all())


def test_fluid_closes_in_and_nothing_else_changes():
    record = Phantom(image_size=96, num_slices=4, kspace_size=0).record(3, 1)
    image, labels = record.images[:, 1], record.labels
    before = torch.isin(labels, torch.tensor(FLUID))
    near = F.max_pool2d(before[:, None].float(), 5, 1, 2)[:, 0] > 0
    shares = []
    for seed in range(12):
        filled, told = closed(image, labels, torch.Generator().manual_seed(seed))
        after = torch.isin(told, torch.tensor(FLUID))
        gone = before & ~after
        assert not (after & ~before).any()
        assert bool((told[gone] > 0).all())  # it became the tissue beside it
        assert not (((filled - image).abs() > 1e-6) & ~near).any()
        assert torch.equal(told[~before], labels[~before])
        assert torch.equal(closed(image, labels, torch.Generator().manual_seed(seed))[0], filled)
        shares.append(float(after.sum() / before.sum()))
    assert min(shares) < 0.3 < 0.75 < max(shares)  # some lose much, some little


def test_closed_fluid_looks_like_tissue():
    image, classes, _ = brain(0.1)
    for seed in range(20):
        filled, told = closed(image, classes, torch.Generator().manual_seed(seed))
        gone = torch.isin(classes, torch.tensor(VENTRICLES)) & ~torch.isin(told, torch.tensor(VENTRICLES))
        if gone.any():
            assert bool((filled[gone] > 0.9).all())  # white matter is 1.0, the fluid was 0.1
            assert bool(torch.isin(told[gone], torch.tensor(WHITE_CLASSES)).all())
            return
    raise AssertionError("no ventricle was closed in twenty tries")


def test_spoilt_masks_are_of_their_generator_and_keep_what_they_are():
    image, classes, lesions = brain()
    lesions[:, 38:44, 8:20] = 1
    told = [spoilt(image, classes.int(), lesions > 0, torch.Generator().manual_seed(s)) for s in (*range(30), 0)]
    for x, labels, sick in told:
        assert x.shape == labels.shape == sick.shape
        assert 1 <= len(x) <= len(image)
        assert sick.dtype == torch.bool
        assert 0 <= int(labels.min()) <= int(labels.max()) <= len(NAMES)
        assert bool(torch.isfinite(signal_profile(x, labels, sick.long())).all())
    assert all(torch.equal(a, b) for a, b in zip(told[0], told[-1], strict=True))
    assert {len(x) for x, *_ in told} == {1, 2}
    assert any(not sick.any() for *_, sick in told)  # a lesion that is missed
    assert any(len(x) == 2 and bool((sick & (lesions == 0)).any()) for x, _, sick in told)  # one that is too wide
    whole = [(x, labels) for x, labels, _ in told if len(x) == 2]
    assert any(torch.equal(labels, classes.int()) and not torch.equal(x, image) for x, labels in whole)  # masks that do not know


def test_a_fitted_head_tells_what_its_profiles_tell_and_needs_no_scale():
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(len(SEQUENCES), (600,), generator=g)
    profiles = torch.randn(600, PROFILE_SIZE, generator=g)
    profiles[:, :6] += 4.0 * F.one_hot(classes, 6)
    profiles *= torch.tensor([30.0, 0.2]).repeat(PROFILE_SIZE // 2)
    profiles += 40.0  # far from 0, and of other scales: both are folded into the weights
    head = SequenceHead()
    fit_head(head, profiles[:500], classes[:500])
    again = SequenceHead()
    fit_head(again, profiles[:500], classes[:500])
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert torch.allclose(head(profiles).exp().sum(1), torch.full((600,), 4.0))  # the probabilities of four networks
    assert float((head(profiles[500:]).argmax(1) == classes[500:]).float().mean()) > 0.8


def test_a_head_learns_from_what_the_model_makes_of_studies(monkeypatch):
    """A look in which white matter is 1 and cortex as bright as the sequence has a number."""

    def look(record):
        image, classes, lesions = brain()
        cortex = torch.isin(classes, torch.tensor([CLASS["left cerebral cortex"], CLASS["right cerebral cortex"]]))
        image[cortex] = 0.1 * 2.2 ** SEQUENCES.index(record.sequence)
        return SimpleNamespace(image=image, classes=classes.int(), sick=lesions > 0)

    monkeypatch.setattr("stages.sequence.EPOCHS", 60)  # of so few studies
    recipe = Phantom(image_size=32, num_slices=2, kspace_size=0)
    model = SimpleNamespace(heads={"sequence": SequenceHead()})
    records = list(studies(partial(drawn, recipe, 7), 40))
    assert all(torch.equal(a.images, drawn(recipe, 7, i).images) for i, a in enumerate(records))
    learn_sequence(model, look, iter(records), seed=0)
    often = [name for name, number in Counter(r.sequence for r in records).items() if number > 3]
    assert len(often) > 3
    for name in often:
        record = next(r for r in records if r.sequence == name)
        own = look(record)
        assert likely_sequences(model, signal_profile(own.image, own.classes, own.sick.long()))[-1][0] == name.removesuffix("-Gd")


def test_a_threshold_keeps_four_in_five_right_and_nine_in_ten_where_an_agent_was_given():
    def model_of(shares):
        return SimpleNamespace(heads={"sequence": lambda x: torch.tensor([shares[int(x[0, 0])]]).log()})

    flair = [[0.01] * len(SEQUENCES) for _ in range(20)]
    for k, row in enumerate(flair):
        row[SEQUENCES.index("FLAIR")] = 0.95 - 0.02 * k
    told = [("FLAIR" if k < 8 or k % 2 else "other", torch.tensor([float(k)])) for k in range(20)]
    found = sequence_thresholds(model_of(flair), told)
    best = found["thresholds"]["FLAIR"]
    assert best["right"] >= 0.8 * best["named"] > 0.8 * 11
    assert found["named_right"] == best["right"]
    assert "other" not in found["thresholds"]

    agent = [[0.01] * len(SEQUENCES) for _ in range(60)]
    for k, row in enumerate(agent):
        row[SEQUENCES.index("T1w-Gd")] = 0.95 - 0.01 * k
    for every, number, named in ((6, 60, False), (20, 60, True), (100, 20, False)):  # 0.83 right, 0.95, and all of too few
        told = [("T1w-Gd" if k % every != 1 else "T1w", torch.tensor([float(k)])) for k in range(number)]
        thresholds = sequence_thresholds(model_of(agent), told)["thresholds"]
        assert ("T1w-Gd" in thresholds) == named  # which tells what a patient was given
        if not named:
            assert thresholds["T1w"]["right"] == number


def test_flair_read_off_an_image_is_said_to_look_like_diffusion(checkpoint, scan_file, monkeypatch):
    from omnimri import Assistant, examination, open_study

    made = Assistant(checkpoint)
    monkeypatch.setattr(examination, "named_sequence", lambda *_: "FLAIR")
    monkeypatch.setattr(examination, "signal_words", lambda *_: ("grey matter: darker",))
    monkeypatch.setattr(examination, "scope_score", lambda *_: 0.5)
    answer = made.answer(open_study(scan_file), "What sequence is this?")
    assert answer.study["sequence"] == "FLAIR"
    assert LOOKS_ALIKE in answer.warnings
