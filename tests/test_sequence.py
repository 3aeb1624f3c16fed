"""The sequence, read off an image: what the profile of its masks holds, fluid closed in, the head that is fitted, its thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from data_recipes import Phantom
from data_recipes.variation import OTHER_FLUID, VENTRICLES, closed
from omnimri.anatomy import NAMES, SEQUENCES
from omnimri.examination import LOOKS_ALIKE, likely_sequences
from omnimri.measure import PROFILE_SIZE, signal_profile
from omnimri.model.omnimri import SequenceHead
from stages.release import drawn
from stages.sequence import fit_head, learn_sequence, sequence_thresholds, studies

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


def test_a_lesion_and_its_side_do_not_change_what_tissue_looks_like():
    image, classes, lesions = brain()
    plain = signal_profile(image, classes, lesions)
    lesions[:, 38:50, 8:28] = 1
    image[:, 36:54, 4:30] = 2.5  # it reaches further than its mask, into most white matter of the left side
    sick = signal_profile(image, classes, lesions)
    assert plain.shape == sick.shape == (PROFILE_SIZE,)
    changed = (plain - sick).abs() > 0.02
    tissue = 3 * len({n.removeprefix("left ").removeprefix("right ") for n in NAMES})
    assert not changed[:tissue].any()  # every structure's median, spread and presence
    lesion = slice(tissue + 14, tissue + 16)  # after seven numbers each of ventricles and of other fluid
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
    before = torch.isin(record.labels, torch.tensor(FLUID))
    shares = []
    for seed in range(8):
        told = closed(record, torch.Generator().manual_seed(seed))
        after = torch.isin(told.labels, torch.tensor(FLUID))
        assert not (after & ~before).any()
        gone = before & ~after
        assert bool((told.labels[gone] > 0).all())  # it became the tissue beside it
        moved = (told.images[:, 1] - record.images[:, 1]).abs() > 1e-6
        near = torch.nn.functional.max_pool2d(before[:, None].float(), 5, 1, 2)[:, 0] > 0
        assert not (moved & ~near).any()
        assert torch.equal(told.labels[~before], record.labels[~before])
        assert torch.equal(closed(record, torch.Generator().manual_seed(seed)).images, told.images)
        shares.append(float(after.sum() / before.sum()))
    assert min(shares) < 0.3 < 0.75 < max(shares)  # some lose much, some little
    with pytest.raises(ValueError, match="labels of structures"):
        closed(replace(record, labels=None), torch.Generator())


def test_studies_are_those_of_their_seed_and_some_are_closed():
    recipe = Phantom(image_size=64, num_slices=2, kspace_size=0)
    first, second = (list(studies(partial(drawn, recipe, 7), 6, seed=1)) for _ in range(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    same = [torch.equal(a.images, drawn(recipe, 7, i).images) for i, a in enumerate(first)]
    assert {True, False} == set(same)


def test_a_fitted_head_tells_what_its_profiles_tell_and_needs_no_scale():
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(len(SEQUENCES), (600,), generator=g)
    profiles = torch.randn(600, PROFILE_SIZE, generator=g)
    profiles[:, :6] = 40 + 4.0 * torch.nn.functional.one_hot(classes, 6)  # far from 0, as a scale that is not folded in would show
    head = SequenceHead()
    fit_head(head, profiles[:500], classes[:500])
    again = SequenceHead()
    fit_head(again, profiles[:500], classes[:500])
    assert torch.equal(head.out.weight, again.out.weight)
    assert float((head(profiles[500:]).argmax(1) == classes[500:]).float().mean()) > 0.8


def test_a_head_learns_from_what_the_model_makes_of_studies():
    def profile_of(sequence: str) -> torch.Tensor:
        return 3.0 * torch.nn.functional.one_hot(torch.tensor(SEQUENCES.index(sequence)), PROFILE_SIZE)

    @dataclass(frozen=True)
    class Look:
        image: torch.Tensor
        sequence: str

        def profile(self, slices: slice = slice(None)) -> torch.Tensor:
            return profile_of(self.sequence)

    recipe = Phantom(image_size=32, num_slices=2, kspace_size=0)
    model = SimpleNamespace(heads={"sequence": SequenceHead()})
    see = lambda r: Look(r.images[:, 1], r.sequence)  # noqa: E731
    learn_sequence(model, see, partial(drawn, recipe, 7), 64, seed=0)
    seen = {r.sequence for r in (drawn(recipe, 7, i) for i in range(64))}
    assert len(seen) > 2
    for name in seen:
        shares = dict(likely_sequences(model, profile_of(name)))
        assert max(shares, key=lambda s: shares[s]) in (name, name.removesuffix("-Gd"))


def test_a_threshold_keeps_four_in_five_right_and_nine_in_ten_where_an_agent_was_given():
    def model_of(shares):
        return SimpleNamespace(heads={"sequence": lambda x: torch.stack([torch.tensor(shares[int(i)]) for i in x[:, 0]]).log()})

    flair = [[0.01] * len(SEQUENCES) for _ in range(20)]
    for k, row in enumerate(flair):
        row[SEQUENCES.index("FLAIR")] = 0.95 - 0.02 * k
    told = [("FLAIR" if k < 8 or k % 2 else "other", torch.tensor([float(k)])) for k in range(20)]
    found = sequence_thresholds(model_of(flair), told)
    best = found["thresholds"]["FLAIR"]
    assert best["right"] >= 0.8 * best["named"] > 0.8 * 11
    assert found["named_right"] == best["right"]
    assert "other" not in found["thresholds"]

    agent = [[0.01] * len(SEQUENCES) for _ in range(20)]
    for k, row in enumerate(agent):
        row[SEQUENCES.index("T1w-Gd")] = 0.95 - 0.02 * k
    told = [("T1w-Gd" if k % 6 else "T1w", torch.tensor([float(k)])) for k in range(20)]  # 0.83 right
    thresholds = sequence_thresholds(model_of(agent), told)["thresholds"]
    assert "T1w-Gd" not in thresholds  # which tells what a patient was given
    assert thresholds["T1w"]["right"] == 20


def test_flair_read_off_an_image_is_said_to_look_like_diffusion(checkpoint, scan_file, monkeypatch):
    from omnimri import Assistant, examination, open_study

    made = Assistant(checkpoint)
    monkeypatch.setattr(examination, "named_sequence", lambda *_: "FLAIR")
    monkeypatch.setattr(examination, "signal_words", lambda *_: ("grey matter: darker",))
    monkeypatch.setattr(examination, "scope_score", lambda *_: 0.5)
    answer = made.answer(open_study(scan_file), "What sequence is this?")
    assert answer.study["sequence"] == "FLAIR"
    assert LOOKS_ALIKE in answer.warnings
