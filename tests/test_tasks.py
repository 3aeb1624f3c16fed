"""Each task: truth in, truth out."""

from __future__ import annotations

import torch

from omnimri.example import collate, prepare
from omnimri.grid import Grid
from omnimri.measure import FLUID_LABEL, brain_mask, measure, rank_components, side_of
from omnimri.tasks import TASKS, Detect, Segment
from omnimri.tasks.detect import STRIDE
from omnimri.volume import Volume


def batch_of(phantom, tokenizer, indices):
    sizes = {"max_slices": 8, "tokens_per_slice": 16}
    return collate([prepare(r, r.conversations[0], tokenizer, **sizes) for r in (phantom.record(2, i) for i in indices)],
                   pad_id=tokenizer.pad_token_id)


def test_every_task_has_its_token():
    assert {t.token for t in TASKS.values()} == {"<reconstruct>", "<segment>", "<detect>", "<report>"}


def test_perfect_masks_cost_nothing_and_wrong_ones_cost(phantom, tokenizer):
    batch = batch_of(phantom, tokenizer, range(3))
    target = Segment().target(batch, 3)
    logits = 20 * torch.nn.functional.one_hot(target.labels, 33).movedim(-1, 1).float()
    lesion = 40 * (target.lesion == 1).float() - 20
    good = Segment().loss((logits, lesion), target)
    # The Dice term's smoothing costs structures of a few pixels a little.
    assert all(float(s / n.clamp(min=1)) < (0.15 if k == "dice" else 0.01) for k, (s, n) in good.items())
    bad = Segment().loss((logits.roll(1, 1), -lesion), target)
    assert float(bad["segment"][0] / bad["segment"][1]) > 5
    assert float(bad["dice"][0] / bad["dice"][1]) > 0.9


def test_boxes_survive_the_heatmap():
    """Targets read back as predictions give the lesions' own centres and sizes."""
    lesions = torch.zeros(1, 12, 64, 64, dtype=torch.uint8)
    lesions[0, 2:6, 10:20, 30:42] = 1
    lesions[0, 8:10, 44:50, 8:12] = 2
    spacing = torch.tensor([[3.0, 1.0, 1.0]])
    target = Detect().target({"lesions": lesions, "spacing_mm": spacing})
    heat = torch.where(target.centre, 0.999, target.heat.clamp(1e-4, 0.9))
    predicted = torch.cat([torch.logit(heat)[:, :, None], target.regression], 2)
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0]).double())
    grid = Grid("axial", (2, 1, 0), (0, 0, 0), (1, 1, 1), (12, 64, 64), (64, 64, 12), (3.0, 1.0, 1.0))
    boxes = sorted(Detect().read(predicted[0], grid, threshold=0.95), key=lambda b: -b.size_mm[1])
    assert len(boxes) == 2
    for box, centre, size in zip(boxes, ((3.5, 14.5, 35.5), (8.5, 46.5, 9.5)), ((12, 10, 12), (6, 6, 4)), strict=True):
        assert all(abs(a - b) <= STRIDE / 4 for a, b in zip(box.centre, centre, strict=True))
        assert all(abs(a - b) < 0.1 for a, b in zip(box.size_mm, size, strict=True))
    assert torch.allclose(grid.world_mm(torch.tensor([boxes[0].centre]), affine)[0, 2], torch.tensor(10.5).double(), atol=1)
    perfect = Detect().loss(predicted, target)
    assert float(perfect["detect"][0]) < 1
    assert float(perfect["box"][0]) == 0


def test_no_lesion_is_a_legal_batch(phantom, tokenizer):
    empty = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    target = Detect().target({"lesions": empty, "spacing_mm": torch.ones(1, 3)})
    loss = Detect().loss(torch.zeros(1, 4, 7, 16, 16) - 4, target)
    assert float(loss["box"][0]) == 0
    assert torch.isfinite(loss["detect"][0])


def test_measures_of_a_known_box():
    mask = torch.zeros(20, 20, 10, dtype=torch.bool)
    mask[5:10, 5:15, 2:6] = True
    affine = torch.diag(torch.tensor([-2.0, 1.0, 3.0, 1.0]).double())
    affine[:3, 3] = torch.tensor([10.0, -5.0, 0.0])
    m = measure(mask, Volume(mask[None].float(), affine), slice_axis=2)
    assert abs(m.volume_ml - 5 * 10 * 4 * 6 / 1000) < 1e-9
    assert m.slice_index == 2
    assert m.box_mm == ((-9.0, -0.5, 4.5), (1.0, 9.5, 16.5))
    assert abs(m.diameter_mm - ((8**2 + 9**2) ** 0.5 + 1.5)) < 1e-6
    mask[0, 0, 0] = True
    ranks, sizes = rank_components(mask, least=2)
    assert sizes == [200]
    assert int(ranks[0, 0, 0]) == 255
    assert side_of(torch.tensor([True, False])) == "midline"
    mask[15:17, 15:17] = True
    seeds = torch.zeros_like(mask)
    seeds[15, 15, 0] = True
    ranks, sizes = rank_components(mask, seeds=seeds)
    assert sizes == [4 * mask.shape[2]]
    assert set(ranks[5:10].unique().tolist()) == {0}


def test_a_brain_mask_closes_sulci_and_leaves_the_fluid_around():
    labels = torch.zeros(40, 30, 12, dtype=torch.int32)
    labels[2:38, 2:28] = FLUID_LABEL
    labels[5:35, 5:25] = 2
    labels[5:30, 14:16] = FLUID_LABEL  # a sulcus of 2 mm, open to the outside
    labels[31:33, 18:20] = 0  # a hole
    mask = brain_mask(labels, (1.0, 1.0, 4.0))
    inside = torch.zeros_like(mask)
    inside[5:35, 5:25] = True
    assert bool(mask[12:30, 14:16].all())
    assert bool(mask[31:33, 18:20].all())
    assert not bool((mask & ~inside).any())
    assert bool(mask[labels == 2].all())
    wide = labels.clone()
    wide[5:30, 9:21] = FLUID_LABEL  # 12 mm: no sulcus
    assert not bool(brain_mask(wide, (1.0, 1.0, 4.0))[5:15, 13:17].any())
    assert not bool(brain_mask(torch.zeros_like(labels), (1.0, 1.0, 4.0)).any())
    fine = labels.repeat_interleave(2, 0).repeat_interleave(2, 1)
    again = brain_mask(fine, (0.5, 0.5, 4.0))
    assert float((again != mask.repeat_interleave(2, 0).repeat_interleave(2, 1)).float().mean()) < 0.01
