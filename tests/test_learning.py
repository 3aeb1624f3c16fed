"""The stages learn on the phantom, against random initialisation; one seed (OMNIMRI_SEEDS for more)."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch

from data_recipes import Phantom
from omnimri.anatomy import NAMES
from omnimri.checkpoint import load_model
from omnimri.example import collate, normalise, prepare
from stages.ablation import SIZE, SLICES, dice_of_queries, reply, sequences_named, tasks_chosen, train
from stages.ablation import held_out as held_out_records
from stages.stage2_align import image_vector, text_vector

pytestmark = pytest.mark.timeout(1800)
SEEDS = range(int(os.environ.get("OMNIMRI_SEEDS", "1")))


@pytest.fixture(scope="module", params=SEEDS)
def runs(request, tmp_path_factory):
    """The four stages, and random weights of the same shape."""
    home, seed, done = tmp_path_factory.mktemp("runs"), request.param, None
    train("vision", home / "random", seed=seed, steps=1, batch_size=1)
    for name in ("vision", "align", "pretrain", "instruct"):
        done = train(name, home / name, seed=seed, init=done)
    return home


@pytest.fixture(scope="module")
def held_out():
    return held_out_records()


def batch_of(model, tokenizer, records):
    sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
    return collate([prepare(r, (), tokenizer, **sizes) for r in records], pad_id=tokenizer.pad_token_id)


@torch.inference_mode()
def probe_dice(folder, records):
    """Mean soft Dice of a ridge probe from frozen patch features to the share of each patch that each kind of tissue covers.

    A patch of 16 pixels holds several tissues, so that their shares say more than the commonest one; and sides are merged,
    which look alike.
    """
    model, _, _ = load_model(folder)
    kinds = [n.removeprefix("left ").removeprefix("right ") for n in NAMES]
    kind = torch.tensor([0, *(1 + sorted(set(kinds)).index(n) for n in kinds)])
    features, targets = [], []
    for record in records:
        patches = model.vision.backbone(normalise(record.images)).last_hidden_state[:, model.vision.num_prefix :]
        shares = torch.nn.functional.one_hot(kind[record.labels.long()], len(set(kinds)) + 1).double().permute(0, 3, 1, 2)
        features.append(patches.flatten(0, 1).double())
        shares = torch.nn.functional.avg_pool2d(shares, model.config.vision_config.patch_size)
        targets.append(shares.flatten(2).transpose(1, 2).flatten(0, 1))
    half = 2 * len(features) // 3
    x, z, y, truth = (torch.cat(part) for part in (features[:half], features[half:], targets[:half], targets[half:]))
    x, z = (torch.cat([(f - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(f), 1)], 1) for f in (x, z))
    said = (z @ torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)).clamp(0, 1)
    dice = 2 * torch.minimum(said, truth).sum(0) / (said.sum(0) + truth.sum(0)).clamp(min=1e-6)
    return float(dice[1:][truth.sum(0)[1:] > 0.002 * truth.sum()].mean())


def test_stage_1_raises_the_linear_probe(runs):
    source = Phantom(image_size=SIZE, num_slices=SLICES, kspace_size=0)
    records = [source.record(999, i) for i in range(288)]
    assert probe_dice(runs / "vision", records) > probe_dice(runs / "random", records) + 0.01


@torch.inference_mode()
def test_stage_2_retrieves_captions(runs, held_out):
    model, tokenizer, _ = load_model(runs / "align")
    batch = batch_of(model, tokenizer, held_out)
    image, text = image_vector(model, batch), text_vector(model, batch["caption_ids"], batch["caption_mask"])
    same = batch["facts"][:, None] == batch["facts"][None]
    hits = float(same[torch.arange(len(image)), (image @ text.T).argmax(1)].float().mean())
    # Five times by chance and more, or hardly less as a processor rounds; seven standard deviations above chance is asked for.
    assert hits >= 4 * float(same.float().mean()), (hits, float(same.float().mean()))


def test_stage_3_outlines_what_is_named(runs, held_out):
    before, after = (dice_of_queries(runs / k, held_out[:32]) for k in ("align", "pretrain"))
    assert max(before) < 0.1
    assert min(after) >= 0.7, after


def test_stage_4_chooses_the_task(runs, held_out):
    right, asked = tasks_chosen(runs / "instruct", held_out)
    assert right >= 0.95 * asked, (right, asked)


@torch.inference_mode()
def test_stage_4_needs_the_image(runs, held_out):
    """Noise in the image's place changes the words, and masks fall back on where structures usually lie."""
    model, tokenizer, _ = load_model(runs / "instruct")
    blank = [replace(r, images=torch.rand(r.images.shape)) for r in held_out]
    # Noise is called one sequence, whichever: of as many studies of each, most must be called another.
    asked = [i for s in ("T1w", "T2w", "FLAIR") for i in [k for k, r in enumerate(held_out) if r.sequence.startswith(s)][:8]]
    # In these minutes not every wording is learnt: after one run or another "What sequence is this?" is answered with the plane.
    changed = {}
    for ask in ("What sequence is this?", "Which sequence was used?", "Is this T1, T2 or FLAIR?", "What weighting has this MR image?"):
        said = [[reply(model, tokenizer, records[i], ask) for i in asked] for records in (held_out, blank)]
        changed[ask] = sum(a != b for a, b in zip(*said, strict=True))
        if changed[ask] >= 12:
            break
    assert max(changed.values()) >= 12, (changed, said)
    told = [sequences_named(runs / "instruct", records) for records in (held_out, blank)]
    assert told[0] >= 0.6, told
    assert told[0] >= told[1] + 0.15, told
    own, none = (dice_of_queries(runs / "instruct", records[:16])[1] for records in (held_out, blank))
    assert own >= 0.6
    assert none <= own - 0.2, (own, none)


def test_runs_print_what_they_loaded(runs, tmp_path, capsys):
    train("align", tmp_path / "again", seed=0, init=runs / "vision", steps=1, batch_size=2, warmup=1)
    assert re.search(r"init .*: \d+ weights loaded, 0 new, 0 unused", capsys.readouterr().out)
