"""Stages 1 and 2 learn on the phantom, against random initialisation; one seed (OMNIMRI_SEEDS for more)."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch
from transformers import StoppingCriteria

from data_recipes import Phantom
from omnimri.anatomy import NAMES
from omnimri.checkpoint import load_model
from omnimri.conversation import Message
from omnimri.example import LESION_CLASS, collate, normalise, prepare
from omnimri.grounding import pool_evidence
from omnimri.tasks import TASKS
from stages.__main__ import main
from stages.grounded import DialogueSource, GroundedDialogue
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


@torch.inference_mode()
def dice_of_queries(folder, records):
    """Mean Dice of the structures pooled over held-out studies, by (the table, the language model's queries)."""
    model, tokenizer, _ = load_model(folder)
    source = DialogueSource(None, tokenizer, model)
    source.record = records.__getitem__
    batch = source.collate([source.example(i) for i in range(len(records))])
    found = GroundedDialogue(model).eval().metrics(batch)
    return tuple(float(found[k].sum / found[k].count) for k in ("dice_table", "dice_queries"))


class UntilTask(StoppingCriteria):
    """Stop at the first task token."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **_):
        return torch.isin(input_ids[:, -1], self.tokens)


@torch.inference_mode()
def reply(model, tokenizer, record, ask, *, only_task=False):
    """The greedy answer to a request, with the evidence of the true masks; to its first task token when `only_task`."""
    sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
    example = prepare(record, [Message("user", ask)], tokenizer, answer_prefix="", show_sequence=False, **sizes)
    batch = collate([example], pad_id=tokenizer.pad_token_id)
    patches = model.encode(batch["images"], batch["positions_mm"], batch["plane"])
    pixels = model.pixels(batch["images"], patches, batch["positions_mm"]).phase(0)
    cut = (..., slice(None, None, 2), slice(None, None, 2))
    pooled = pool_evidence(pixels, batch["labels"][cut], batch["lesions"][cut], batch["positions_mm"])
    rows = batch["evidence_places"]
    tasks = torch.tensor([model.token_ids[t.token] for t in TASKS.values()])
    ids = batch["input_ids"]
    out = model.generate(
        input_ids=ids,
        visual=model.look(patches, batch["chosen"]),
        evidence=model.evidence(pooled[:, rows[0]], rows.clamp(max=LESION_CLASS)),
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[UntilTask(tasks)] if only_task else None,
    )
    return tokenizer.decode(out[0, ids.shape[1]:])


REQUESTS = {
    "<segment>": ("Segment everything.", "Outline every structure.", "Segment the {}.", "Outline the {}.", "Where is the {}?",
                  "What is the volume of the {}?"),
    "<detect>": ("Find lesions.", "Are there any lesions?", "Do you see an abnormality?", "Is this brain normal?",
                 "Mark all lesions.", "Any pathology?"),
    "<report>": ("Write a report.", "Report this study.", "Summarise the findings.", "What do you see?", "Describe this study.",
                 "Report please."),
    "<reconstruct>": ("Reconstruct this.", "Reconstruct the image.", "Make an image from the k-space.", "Run the reconstruction please.",
                      "Reconstruct the undersampled data.", "Turn the raw data into an image."),
}


def task_accuracy(folder, records):
    """Share of requests whose answer's first task token is the one asked for."""
    model, tokenizer, _ = load_model(folder)
    right, wrong = 0, []
    for k, (token, asks) in enumerate(REQUESTS.items()):
        for j, ask in enumerate(asks):
            for record in records[6 * k + j :: 24]:
                names = [n for i, n in enumerate(NAMES, 1) if int((record.labels == i).sum()) >= 40]
                answer = reply(model, tokenizer, record, ask.format(names[j % len(names)]), only_task=True)
                if answer.endswith(token):
                    right += 1
                else:
                    wrong.append((ask, answer))
    return right / (right + len(wrong)), wrong


def share_changed_by_blanking(folder, records):
    """Share of answers that differ when noise stands for the image, and every mask is empty."""
    model, tokenizer, _ = load_model(folder)
    asks = ("What sequence is this?", "Find lesions.", "Describe the signal.", "Which anatomy is shown?")
    changed = []
    for record, ask in zip(records, asks * len(records), strict=False):
        blank = replace(record, images=torch.rand(record.images.shape), labels=torch.zeros_like(record.labels),
                        lesions=torch.zeros_like(record.lesions), lesion_places=())
        changed.append(reply(model, tokenizer, record, ask) != reply(model, tokenizer, blank, ask))
    return sum(changed) / len(changed)


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
