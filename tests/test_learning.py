"""All four stages learn on the phantom, against random initialisation; one seed (OMNIMRI_SEEDS for more)."""

from __future__ import annotations

import os
import re

import pytest
import torch

from data_recipes import Phantom
from omnimri.assistant import Assistant
from omnimri.checkpoint import load_model
from omnimri.conversation import Message, card, render
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
    """The four stages, one after the other, and random weights of the same shape."""
    home, seed = tmp_path_factory.mktemp("runs"), request.param
    shared = {"seed": seed}
    stage("vision", home / "random", image_size=SIZE, steps=1, batch_size=1, warmup=1, num_slices=2, **shared)
    stage("vision", home / "vision", image_size=SIZE, steps=80, batch_size=8, warmup=10, **shared)
    stage("align", home / "align", init=home / "vision", steps=60, batch_size=16, warmup=10, **shared)
    stage("pretrain", home / "pretrain", init=home / "align", steps=350, batch_size=4, warmup=20, **shared)
    stage("instruct", home / "instruct", init=home / "pretrain", steps=120, batch_size=4, warmup=10, **shared)
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


@torch.inference_mode()
def test_stage_3_speaks_of_what_it_is_shown(runs, held_out):
    """Next-token loss on unseen reports is far below that of the stage before, and names drive distinct queries."""
    losses = {}
    for name in ("align", "pretrain"):
        model, tokenizer, _ = load_model(runs / name)
        sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
        total = count = 0.0
        for record in held_out[:8]:
            example = prepare(record, record.conversations[0], tokenizer, **sizes)
            batch = batch_of(model, tokenizer, [record])
            visual = model.look(model.encode(batch["images"], batch["positions_mm"], batch["plane"]), batch["chosen"])
            empty = torch.zeros(1, len(example.evidence_places), model.config.text_config.hidden_size)
            labels = example.text_labels[None]
            loss = model(input_ids=example.input_ids[None], visual=visual, evidence=empty, labels=labels).loss
            total, count = total + float(loss), count + 1
        losses[name] = total / count
    assert losses["pretrain"] < 1.5 < losses["align"]


def test_stage_4_picks_the_task_and_looks_at_the_image(runs, held_out):
    assistant = Assistant(runs / "instruct")
    model, tokenizer = assistant.model, assistant.tokenizer
    wanted = {"report": "<report>", "detect": "<detect>", "reconstruct": "<reconstruct>", "segment": "<segment>"}
    right = asked = 0
    for record in held_out[:30]:
        for chat in record.conversations:
            truth = next((t for t in wanted.values() if t in chat[1].text), None)
            batch = batch_of(model, tokenizer, [record])
            with torch.inference_mode():
                visual = model.look(model.encode(batch["images"], batch["positions_mm"], batch["plane"]), batch["chosen"])
                ids = render([Message("user", chat[0].text)], tokenizer, study=card(record.plane, record.sequence),
                             num_image_tokens=visual.shape[1], answer_prefix="").ids
                out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), visual=visual,
                                     max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                     eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
            text = tokenizer.decode(out[0, len(ids) :])
            said = next((t for t in ("<report>", "<detect>", "<reconstruct>") if text.strip().startswith(t)), None)
            said = said or ("<segment>" if "<segment>" in text else None)
            if truth is not None and "not visible" not in chat[1].text:
                asked, right = asked + 1, right + (said == truth)
    assert asked >= 30
    assert right / asked >= 0.9, f"{right} of {asked}"


def test_blanking_the_image_changes_what_is_said_of_the_sequence(runs, held_out):
    model, tokenizer, _ = load_model(runs / "instruct")
    changed = 0
    for record in held_out[:12]:
        batch = batch_of(model, tokenizer, [record])
        logits = []
        for images in (batch["images"], torch.zeros_like(batch["images"])):
            with torch.inference_mode():
                visual = model.look(model.encode(images, batch["positions_mm"], batch["plane"]), batch["chosen"])
                ids = render([Message("user", "What sequence is this?")], tokenizer, study=card(record.plane),
                             num_image_tokens=visual.shape[1], answer_prefix="This is a ").ids
                logits.append(model(input_ids=torch.tensor([ids]), visual=visual).logits[0, -1].softmax(-1))
        changed += float((logits[0] - logits[1]).abs().sum()) > 0.2
    assert changed >= 6


def test_runs_print_what_they_loaded(runs, tmp_path, capsys):
    stage("align", tmp_path / "again", init=runs / "vision", steps=1, batch_size=2, warmup=1)
    assert re.search(r"init .*: \d+ weights loaded, 0 new, 0 unused", capsys.readouterr().out)
