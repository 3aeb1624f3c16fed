"""The four stages on the phantom in minutes; each of them, and reconstruction, left out in turn: what does it bring, or cost?

`python -m stages.ablation --out DIR [--seeds 0 1]` trains, measures on held-out phantoms and writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data_recipes import Phantom
from data_recipes.describe import facts_of
from omnimri.checkpoint import load_model
from omnimri.conversation import Message
from omnimri.examination import likely_sequences
from omnimri.example import Record, prepare

from .__main__ import main as run_stage
from .grounded import DialogueSource, GroundedDialogue
from .release import see

SIZE, SLICES = 64, 2
ASKS = {
    "<segment>": (
        "Segment the {}.", "Outline the {}.", "Can you show me the {}?", "Where is the {}?", "Delineate the {} please.",
        "segment {}", "Please mark the {}.", "Draw the {}.", "How large is the {}?", "What is the volume of the {}?"),
    "<detect>": (
        "Find lesions.", "Are there any lesions?", "Is there anything abnormal?", "Detect lesions.", "Is there a tumour?",
        "Do you see an abnormality?", "Look for lesions please.", "Any pathology?", "Mark all lesions.", "Is this brain normal?",
        "Where is the lesion?", "Locate every lesion."),
    "<report>": (
        "Write a report.", "Report this study.", "Describe this study.", "Summarise the findings.", "Give me a radiology report.",
        "What do you see?", "Please dictate a report.", "Report please.", "Describe the image in detail.", "What does this MRI show?"),
    "<reconstruct>": (
        "Reconstruct this.", "Reconstruct the image.", "Make an image from the k-space.", "Reconstruct the undersampled data.",
        "Run the reconstruction please.", "Turn the raw data into an image."),
}

STAGES = ("vision", "align", "pretrain", "instruct")
ARMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "nothing": (STAGES, {}),
    "reconstruction": (STAGES, {"kspace_size": 0}),
    **{name: (tuple(s for s in STAGES if s != name), {}) for name in STAGES},
}
"""What is left out -> the stages that remain, and the settings of stages 3 and 4."""


def train(name: str, out: Path, *, seed: int, init: Path | None = None, **settings: Any) -> Path:
    """One stage at the size of minutes.

    Raises:
        RuntimeError: it did not end well.
    """
    # In stage 2 both towers stay as they are, as in locked-image tuning: so short a run would only unsettle them.
    locked = {"learning_rate.vision.*": 0, "learning_rate.language.*": 0}
    own: dict[str, Any] = {
        "vision": {"steps": 60, "batch_size": 8, "workers": 2},  # two where a step takes less time than its data
        "align": {"steps": 220, "batch_size": 32, "workers": 2, **locked},
        "pretrain": {"steps": 640, "batch_size": 3, "mask_share": 0.27, "word_share": 0.66, "image_share": 0},
        "instruct": {"steps": 40, "batch_size": 3, "mask_share": 0, "word_share": 0.9, "image_share": 0},
    }[name]
    shared = {"seed": seed, "workers": 1, "num_slices": SLICES, "warmup": 10, "validate_batches": 2, "validate_every": 100000,
              "save_every": 100000} | ({} if init else {"image_size": SIZE})  # fmt: skip
    options = [x for k, v in {**shared, **own, **settings}.items() for x in ("--set", f"{k}={v}")]
    if run_stage([name, "--out", str(out), *options, *(["--init", str(init)] if init else [])]):
        raise RuntimeError(f"stage {name} did not end well")
    return out


def held_out(count: int = 96) -> list[Record]:
    """Phantoms that no stage saw."""
    source = Phantom(image_size=SIZE, num_slices=SLICES)
    return [source.record(999, i) for i in range(count)]


@torch.inference_mode()
def dice_of_queries(folder, records):
    """Mean over held-out studies of the mean Dice of the structures in it, by (the table, the language model's queries)."""
    model, tokenizer, _ = load_model(folder)
    source = DialogueSource(SimpleNamespace(record=records.__getitem__, seed=0), tokenizer, model)
    objective, found = GroundedDialogue(model).eval(), []
    for i in range(len(records)):
        metrics = objective.metrics(source.collate([source.example(i)]))
        found.append([float(metrics[k].sum / metrics[k].count) for k in ("dice_table", "dice_queries")])
    return tuple(sum(values) / len(records) for values in zip(*found, strict=True))


@torch.inference_mode()
def reply(model, tokenizer, record, ask):
    """The greedy answer to a request; what the card tells of the sequence, and the evidence, come from the model's own look."""
    sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}
    look = see(model, tokenizer, record)
    sequence = likely_sequences(model, look.profile())[0][0]
    told = replace(record, sequence=sequence, lesion_places=(), signal=look.signal)
    ids = prepare(told, [Message("user", ask)], tokenizer, answer_prefix="", **sizes).input_ids[None]
    out = model.generate(
        input_ids=ids,
        visual=look.visual,
        evidence=look.evidence,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1]:])


def tasks_chosen(folder: Path, records: Sequence[Record]) -> tuple[int, int]:
    """Of how many requests the task token is right, of how many."""
    model, tokenizer, _ = load_model(folder)
    wanted = [(token, ask) for token, asks in ASKS.items() for ask in asks] * 2
    right = 0
    for k, (record, (token, ask)) in enumerate(zip(records, wanted, strict=False)):
        # What is not in the slices is rightly not outlined: only what is there is asked for.
        there = facts_of(record).visible
        said = re.search("|".join(ASKS), reply(model, tokenizer, record, ask.format(there[k % len(there)])))
        right += said is not None and said[0] == token
    return right, len(wanted)


@torch.inference_mode()
def sequences_named(folder: Path, records: Sequence[Record]) -> float:
    """Share of the studies whose sequence is read off the image."""
    model, tokenizer, _ = load_model(folder)
    named = [likely_sequences(model, see(model, tokenizer, r).profile())[0][0].removesuffix("-Gd") for r in records]
    right = [said == r.sequence.removesuffix("-Gd") for said, r in zip(named, records, strict=True) if r.sequence]
    return sum(right) / len(right)


def main(argv: Sequence[str] | None = None) -> int:
    """Train every arm for every seed and write the table."""
    parser = argparse.ArgumentParser(prog="python -m stages.ablation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args(argv)
    records, rows = held_out(), []
    for seed, arm in product(args.seeds, args.arms):
        stages, settings = ARMS[arm]
        done: Path | None = None
        for k, name in enumerate(stages):
            # Arms that begin alike share what they begin with.
            changed = settings if name in STAGES[2:] else {}
            out = args.out / f"seed-{seed}" / "-".join([*stages[: k + 1], *(f"{a}={b}" for a, b in changed.items())])
            done = train(name, out, seed=seed, init=done, **changed)
        assert done is not None
        table, queries = dice_of_queries(done, records[:32])
        right, asked = tasks_chosen(done, records)
        rows.append({"seed": seed, "arm": arm, "dice by the table": table, "dice by the words' queries": queries,
                     "task token right": right / asked, "sequence named": sequences_named(done, records)})  # fmt: skip
        print(rows[-1], flush=True)
    names = list(rows[0])[2:]
    lines = [f"| left out | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm in args.arms:
        some = [r for r in rows if r["arm"] == arm]
        lines.append(f"| {arm} | {' | '.join(', '.join(f'{r[n]:.2f}' for r in some) for n in names)} |")
    (args.out / "results.json").write_text(json.dumps(rows, indent=1))
    (args.out / "results.md").write_text("\n".join([f"Held-out phantoms; a figure for each of the seeds {args.seeds}.", "", *lines, ""]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
