"""Stages 1 and 2 learn on the phantom, against random initialisation; one seed (OMNIMRI_SEEDS for more)."""

from __future__ import annotations

import os
import re

import pytest
import torch

from data_recipes import Phantom
from omnimri.checkpoint import load_model
from omnimri.example import normalise, prepare
from stages.__main__ import main
from stages.stage2_align import image_vector, text_vector

SEEDS = range(int(os.environ.get("OMNIMRI_SEEDS", "1")))
SIZE = 64


def stage(name, out, *, init=None, **settings):
    options = [x for k, v in {"validate_every": 100000, "save_every": 100000, **settings}.items() for x in ("--set", f"{k}={v}")]
    arguments = [name, "--out", str(out), *options] + (["--init", str(init)] if init else [])
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module", params=SEEDS)
def runs(request, tmp_path_factory):
    """Stages 1 and 2, and random weights of the same shape."""
    home, seed = tmp_path_factory.mktemp("runs"), request.param
    shared = {"seed": seed}
    stage("vision", home / "random", image_size=SIZE, steps=1, batch_size=1, warmup=1, num_slices=2, **shared)
    stage("vision", home / "vision", image_size=SIZE, steps=60, batch_size=8, warmup=10, **shared)
    stage("align", home / "align", init=home / "vision", steps=50, batch_size=16, warmup=10, **shared)
    return home


@pytest.fixture(scope="module")
def held_out():
    source = Phantom(image_size=SIZE, num_slices=4, with_kspace=False)
    return [source.record(999, i) for i in range(48)]


def batch_of(model, tokenizer, records):
    from omnimri.example import collate

    sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
    return collate([prepare(r, (), tokenizer, **sizes) for r in records], pad_id=tokenizer.pad_token_id)


@torch.inference_mode()
def probe_accuracy(folder, records):
    """Balanced accuracy of a ridge probe from frozen patch features to the commonest tissue of each patch."""
    model, _, _ = load_model(folder)
    features, targets = [], []
    patch = model.config.vision_config.patch_size
    for record in records:
        patches = model.vision.backbone(normalise(record.images)).last_hidden_state[:, model.vision.num_prefix :]
        labels = torch.nn.functional.one_hot(record.labels.long(), 33).float().permute(0, 3, 1, 2)
        features.append(patches.flatten(0, 1))
        targets.append(torch.nn.functional.avg_pool2d(labels, patch).flatten(2).transpose(1, 2).flatten(0, 1))
    half = len(features) // 2
    x, y = torch.cat(features[:half]).double(), torch.cat(targets[:half]).double()
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1)
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]).double(), x.T @ y)
    z = torch.cat([(torch.cat(features[half:]).double() - mean) / std, torch.ones(len(torch.cat(features[half:])), 1)], 1)
    said, truth = (z @ weights).argmax(1), torch.cat(targets[half:]).argmax(1)
    scores = [2 * ((said == k) & (truth == k)).sum() / ((said == k).sum() + (truth == k).sum()) for k in truth.unique().tolist() if k]
    return float(torch.stack(scores).mean())


def test_stage_1_raises_the_linear_probe(runs, held_out):
    assert probe_accuracy(runs / "vision", held_out) > probe_accuracy(runs / "random", held_out)


@torch.inference_mode()
def test_stage_2_retrieves_captions(runs, held_out):
    def retrieval(folder):
        model, tokenizer, _ = load_model(folder)
        batch = batch_of(model, tokenizer, held_out)
        image, text = image_vector(model, batch), text_vector(model, batch["caption_ids"], batch["caption_mask"])
        same = batch["facts"][:, None] == batch["facts"][None]
        hits = same[torch.arange(len(image)), (image @ text.T).argmax(1)].float().mean()
        return float(hits), float(same.float().mean())

    hits, chance = retrieval(runs / "align")
    assert hits >= 3 * chance, (hits, chance)


def test_runs_print_what_they_loaded(runs, tmp_path, capsys):
    stage("align", tmp_path / "again", init=runs / "vision", steps=1, batch_size=2, warmup=1)
    assert re.search(r"init .*: \d+ weights loaded, 0 new, 0 unused", capsys.readouterr().out)
