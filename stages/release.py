"""python -m stages.release RUN --data DIR --out omnimri/embedded: from a trained run to a checkpoint to ship.

Folds the adapters in, learns what in-scope features look like, chooses the thresholds of lesions and of the sequence on
heads that were never trained on, rounds to bfloat16, and writes the model card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_recipes import Phantom, Synthetic
from data_recipes.phantom import record_volume
from data_recipes.synthetic import CHOOSING_MAPS, TRAINING_MAPS
from eval.suite import commit
from omnimri.anatomy import PLANES
from omnimri.checkpoint import load_model, resolve, save_model
from omnimri.conversation import card, query_messages, render
from omnimri.digests import publish
from omnimri.examination import doubt, examine
from omnimri.example import LESION_CLASS, Record, language_slices, normalise
from omnimri.grounding import pool_evidence
from omnimri.lesions import LESION_EDGE, LesionRule, log_odds
from omnimri.measure import rank_components, signal_profile, signal_words
from omnimri.tasks.reconstruct import fast_bf16

from .sequence import learn_sequence, sequence_thresholds, studies

SCOPE_SLICES = (4, 6, 8, 12)
"""Slices of the studies that tell what lies in scope, in turn: the fewer, the more depends on which of them language sees."""
SCOPE_QUANTILE, SCOPE_MARGIN = 0.98, 1.45
"""Limits of the scope score over this quantile of the held-out ones: real scans and large tumours lie further out than most simulated
heads, and the largest of those lies further out the more of them there are."""
LEAST_DOUBT = 0.01
"""Smallest limit of the share of doubtful pixels."""
FALSE_ALARM_SHARE = 0.1
"""Largest share of normal held-out studies, and of normal whole heads, in which a lesion may be shown."""
LEAST_FURTHER_PRECISION = 0.9
"""Smallest share of right ones among the lesions shown in held-out studies that have a sure one."""
LEAST_NORMAL = 10
"""Fewest normal held-out heads that the rule of lesions may rest on."""
LEAST_LESION_ML = 0.1
LEARNT_SEED, CHOSEN_SEED = 104, 105
"""Of the studies that the head of sequences is fitted to, and of those that its thresholds are chosen on."""
HEAD_SLICES = 24
"""Slices of a whole head for the rule of lesions."""

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998)
"""Lesion probabilities that are tried."""
NEVER = 2.0
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class Seen:
    """One look at a record, as `omnimri.examination` takes it."""

    features: torch.Tensor
    """(D,) mean patch feature of the slices for language."""
    visual: torch.Tensor
    """(1, tokens, E)"""
    lesion: torch.Tensor
    """(S, H/2, W/2) lesion probability at phase 0."""
    evidence: torch.Tensor
    """(1, structures, E) of the model's own masks."""
    doubt: float
    """See `omnimri.examination.doubt`."""
    signal: tuple[str, ...]
    """How bright those masks are, in words."""
    image: torch.Tensor
    """(S, H/2, W/2) normalised intensities at phase 0."""
    classes: torch.Tensor
    """(S, H/2, W/2) structure classes there."""

    @property
    def sick(self) -> torch.Tensor:
        """(S, H/2, W/2) bool, where a lesion is likelier than not."""
        return self.lesion > 0.5

    def profile(self) -> torch.Tensor:
        """How bright those masks are, in numbers (`omnimri.measure.signal_profile`)."""
        return signal_profile(self.image, self.classes, self.sick.long())


def mean_of(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean of two models' weights.

    Raises:
        ValueError: they have not the same names and shapes.
    """
    odd = sorted(k for k in first.keys() | second.keys() if k not in first or k not in second or first[k].shape != second[k].shape)
    if odd:
        raise ValueError(f"expected two checkpoints of one form, got {len(odd)} weights that differ in name or shape, the first {odd[0]}")
    return {k: torch.lerp(v.float(), second[k].float(), 0.5) for k, v in first.items()}


def of_slices(recipe: Any, number: int) -> Any:
    """The same recipe with studies of so many slices."""
    other = copy(recipe)
    other.num_slices = number
    return other


def drawn(recipe: Any, seed: int, index: int) -> Record:
    """A study of it, of as many slices as its turn has."""
    return of_slices(recipe, SCOPE_SLICES[index % len(SCOPE_SLICES)]).record(seed, index)


def features(model: Any, record: Record) -> torch.Tensor:
    """(D,) mean patch feature of the slices for language."""
    chosen = language_slices(record.images.shape[0], model.config.max_slices)
    images, positions = normalise(record.images)[None, chosen], record.positions_mm[None, chosen]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=fast_bf16(images.device)):
        return model.encode(images, positions, torch.tensor([PLANES.index(record.plane)])).float().mean((0, 1))


def see(model: Any, tokenizer: Any, record: Record) -> Seen:
    """Masks and evidence of a record by the standing queries."""
    images, positions, plane = normalise(record.images)[None], record.positions_mm[None], torch.tensor([PLANES.index(record.plane)])
    with torch.autocast(images.device.type, torch.bfloat16, enabled=fast_bf16(images.device)):  # as `omnimri.examination` does
        patches = model.encode(images, positions, plane).float()
        pixels = model.pixels(images, patches, positions)
    chosen = language_slices(images.shape[1], model.config.max_slices)
    visual = model.look(patches, chosen[None])
    ids = torch.tensor([render(query_messages(), tokenizer, study=card(record.plane), num_image_tokens=visual.shape[1]).ids])
    _, states = model.hidden_at(ids, model(input_ids=ids, visual=visual).hidden_states[0], "<segment>")
    feature = pixels.phase(0).float()
    structures, lesion = model.heads["segment"].logits(model.heads["segment"].queries(states[None]), feature)
    masks = structures.argmax(1), torch.zeros_like(lesion)
    pooled = pool_evidence(feature, masks[0][None], masks[1][None], positions)[:, 1:LESION_CLASS]
    evidence = model.evidence(pooled, torch.arange(1, LESION_CLASS)[None])
    image = images[0, :, 1, ::2, ::2]
    words = signal_words(image, *masks)
    return Seen(patches[chosen].mean((0, 1)), visual, lesion.sigmoid(), evidence, doubt(structures.softmax(1)), words, image, masks[0])


@torch.inference_mode()
def lesion_rule(model: Any, tokenizer: Any, heads: Any, *, count: int, alone: float) -> dict[str, Any]:
    """Choose which lesions are shown, and how sure of them to be, on whole heads as a person would upload them.

    Args:
        alone: `LesionRule.sure_alone`, chosen on more studies that were looked at in one plane.
    """
    every = LesionRule(least_ml=LEAST_LESION_ML, weights=(1.0, 0.0, 0.0))  # its confidence is the peak
    studies: list[list[tuple[float, bool | None]]] = []
    normal: list[bool] = []
    for i in range(count):
        record = heads.record(103, i)
        seen = examine(model, tokenizer, replace(record_volume(record), sequence="unknown"), rule=every)
        if len(seen.views) == 1 or not seen.in_scope:
            continue
        truth = record.lesions.permute(2, 1, 0)
        normal.append(not record.lesion_places)
        studies.append([])
        for lesion in seen.lesions:
            inside = truth[seen.lesion_ranks == lesion.rank]
            true = bool(((inside > 0) & (inside < 255)).any())
            studies[-1].append((lesion.confidence, True if true else None if bool((inside == 255).any()) else False))
    return choose_rule(model.config, studies, normal, alone=alone)


def choose_rule(config: Any, studies: list[list[tuple[float, bool | None]]], normal: list[bool], *, alone: float) -> dict[str, Any]:
    """Set the rule of lesions, and tell what it does.

    Args:
        studies: Of each the peak of every candidate, and whether it touches a true lesion; None where it cannot be said.
        normal: Whether a study has none.
    """
    surest = [max((p for p, _ in s), default=0.0) for s in studies]

    def alarms(sure: float) -> float:
        return sum(n and top > sure for n, top in zip(normal, surest, strict=True)) / max(1, sum(normal))

    def shown(sure: float, further: float) -> list[tuple[float, float, bool]]:
        seen = zip(studies, surest, strict=True)
        return [(p, top, ok) for s, top in seen if top > sure for p, ok in s if p > further and ok is not None]

    def precision(found: list[tuple[float, float, bool]]) -> float:
        return sum(ok for *_, ok in found) / max(1, len(found))

    tried = [t for t in THRESHOLDS if t >= LesionRule.sure] if sum(normal) >= LEAST_NORMAL else []
    quiet = [t for t in tried if alarms(t) <= FALSE_ALARM_SHARE]
    pairs = [(sum(ok for *_, ok in shown(s, t)), -s, -t) for s in quiet for t in tried
             if t <= s and precision(shown(s, t)) >= LEAST_FURTHER_PRECISION]
    least = min(quiet, default=NEVER)
    sure, further = (-x for x in max(pairs)[1:]) if pairs else (least, least)
    found = shown(sure, further)
    config.lesion_rule = {"sure": sure, "sure_alone": alone, "further": further, "least_ml": LEAST_LESION_ML}
    if {ok for *_, ok in found} == {True, False}:
        config.lesion_rule["weights"] = log_odds_weights(found)
    sick = [s for s, n in zip(studies, normal, strict=True) if not n]
    hit = [any(p > sure for p, _ in s) and any(ok and p > further for p, ok in s) for s in sick]
    config.lesion_sensitivity = sum(hit) / max(1, len(sick))
    by_surest = {str(t): [round(alarms(t) * sum(normal)), sum(max((p for p, _ in s), default=0) > t for s in sick)] for t in tried}
    by_further = {str(t): [len(shown(sure, t)), round(precision(shown(sure, t)), 3)] for t in tried if t <= sure}
    told = {"normal": sum(normal), "normal_with_a_finding": round(alarms(sure) * sum(normal)), "with_lesions": len(sick), "seen": sum(hit),
            "shown": len(found), "precision": precision(found), "by_surest": by_surest, "by_further": by_further}  # fmt: skip
    return config.lesion_rule | told


def log_odds_weights(found: list[tuple[float, float, bool]]) -> list[float]:
    """Weights of the log odds of the peak, of the surest, and 1, by logistic regression with a little shrinkage."""
    x = torch.tensor([[log_odds(p), log_odds(top), 1.0] for p, top, _ in found], dtype=torch.float64)
    y = torch.tensor([float(ok) for *_, ok in found], dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64)
    shrink = torch.diag(torch.tensor([0.1, 0.1, 0.0], dtype=torch.float64))
    for _ in range(50):  # Newton
        p = (x @ w).sigmoid()
        w = w - torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + shrink + 1e-6 * torch.eye(3), x.T @ (p - y) + shrink @ w)
    return [round(v, 4) for v in w.tolist()]


@torch.inference_mode()
def calibrate(model: Any, tokenizer: Any, training: Any, held_out: Any, *, count: int, heads: int) -> dict[str, Any]:
    """Set the scope's mean, whitening and limit, and choose the rule of lesions and the thresholds of the sequence.

    Args:
        training: Recipe of the studies that were trained on.
        held_out: Recipe of studies that were not.
        count: Studies of each.
        heads: Whole held-out heads for the rule of lesions.
    """
    inside = torch.stack([features(model, drawn(training, 101, i)) for i in range(count)])
    model.scope_mean.copy_(inside.mean(0))
    off = inside - inside.mean(0)
    covariance = off.T @ off / (count - 1)
    values, vectors = torch.linalg.eigh(covariance + 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance)))
    model.scope_whiten.copy_(vectors @ torch.diag(values.clamp(min=1e-8).rsqrt()) @ vectors.T)
    records = [drawn(held_out, 102, i) for i in range(count)]
    looks = [see(model, tokenizer, r) for r in records]
    far = torch.stack([torch.linalg.vector_norm(model.scope_whiten @ (look.features - model.scope_mean)) for look in looks])
    doubts = torch.tensor([look.doubt for look in looks])
    model.scope_limit.copy_(SCOPE_MARGIN * far.quantile(SCOPE_QUANTILE))
    model.config.doubt_limit = max(LEAST_DOUBT, SCOPE_MARGIN * float(doubts.quantile(SCOPE_QUANTILE)))
    far, doubts = far / model.scope_limit, doubts / model.config.doubt_limit
    model.config.scope_together = SCOPE_MARGIN * float((far + doubts).quantile(SCOPE_QUANTILE))
    scores = torch.maximum(far, (far + doubts) / model.config.scope_together)
    tried: dict[float, tuple[float, float]] = {}
    for threshold in THRESHOLDS:
        normal = alarms = diseased = found = 0
        for record, look in zip(records, looks, strict=True):
            seeds = look.lesion > threshold
            said = rank_components(seeds | (look.lesion > LESION_EDGE), least=6, seeds=seeds)[0]
            said = (said > 0) & (said < 255)
            truth = (record.lesions > 0) & (record.lesions < 255)
            if not record.lesion_places:
                normal, alarms = normal + 1, alarms + int(bool(said.any()))
            else:
                diseased, found = diseased + 1, found + int(bool((said & truth[:, ::2, ::2]).any()))
        tried[threshold] = (alarms / max(normal, 1), found / max(diseased, 1))
    alone = min((t for t, (alarm, _) in tried.items() if alarm <= FALSE_ALARM_SHARE), default=NEVER)
    sequence = sequence_thresholds(model, [(r.sequence, look.profile()) for r, look in zip(records, looks, strict=True)])
    model.config.sequence_thresholds = {k: v["threshold"] for k, v in sequence["thresholds"].items()}
    lesions = lesion_rule(model, tokenizer, of_slices(held_out, HEAD_SLICES), count=heads, alone=alone)
    model.config.lesion_sensitivity = min(model.config.lesion_sensitivity, tried.get(alone, (0.0, 0.0))[1])
    return {
        "scope_limit": float(model.scope_limit),
        "doubt_limit": model.config.doubt_limit,
        "scope_together": model.config.scope_together,
        "scope_scores_held_out": {"median": float(scores.median()), "largest": float(scores.max()), "refused": int((scores > 1).sum())},
        "lesions": lesions,
        "threshold_false_alarm_and_sensitivity": {str(k): [round(a, 3), round(b, 3)] for k, (a, b) in tried.items()},
        "sequence": sequence,
        "studies": count,
    }


def read_sequence(model: Any, tokenizer: Any, training: Any, held_out: Any, *, count: int) -> dict[str, Any]:
    """Fit the head of sequences to the model's own masks of `count` studies that were trained on, and choose thresholds on half as many
    that were not.
    """
    look = partial(see, model, tokenizer)
    learn_sequence(model, look, studies(partial(drawn, training, LEARNT_SEED), count), seed=LEARNT_SEED)
    head = model.heads["sequence"]
    head.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in head.state_dict().items()})
    with torch.inference_mode():
        told = [(r.sequence, look(r).profile()) for r in studies(partial(drawn, held_out, CHOSEN_SEED), max(1, count // 2))]
        found = sequence_thresholds(model, told)
    model.config.sequence_thresholds = {k: v["threshold"] for k, v in found["thresholds"].items()}
    return found


def main(argv: list[str] | None = None) -> int:
    """Write a checkpoint to ship."""
    parser = argparse.ArgumentParser(prog="python -m stages.release", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder of label maps; the phantom calibrates where it is not given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--heads", type=int, default=75, help="whole held-out heads that the rule of lesions is chosen on")
    parser.add_argument("--profiles", type=int, default=0, metavar="N", help="fit the head of sequences anew to the model's own masks of N "
                        "studies, and choose its thresholds on N / 2")
    parser.add_argument("--mean-with", type=Path, metavar="CHECKPOINT", help="release the mean of both weights, such as of a run and what "
                        "it began with (arXiv 2203.05482)")
    parser.add_argument("--keep-calibration", action="store_true", help="thresholds and scope as they were calibrated last: where nothing "
                        "has moved since that they depend on")
    args = parser.parse_args(argv)
    try:
        source = resolve(args.run)
        model, tokenizer, _ = load_model(source)
        if not model.config.base:
            model.merge_lora()
        size = {"image_size": model.config.image_size, "kspace_size": 0}
        if args.data:
            training: Any = Synthetic(args.data, numbers=TRAINING_MAPS, **size)
            held_out: Any = Synthetic(args.data, numbers=CHOOSING_MAPS, **size)
        else:
            training = held_out = Phantom(**size)
        provenance = json.loads((source / "provenance.json").read_text())
        state = model.state_dict()
        if args.mean_with:
            other, _, digest = load_model(resolve(args.mean_with))
            state = mean_of(state, other.state_dict())
            provenance |= {"mean_with_sha256": digest}
        rounded = {k: v.to(torch.bfloat16) for k, v in state.items()}
        model.load_state_dict({k: v.float() for k, v in rounded.items()})
        if args.keep_calibration:
            told = next((p["calibration"] for p in (provenance, *reversed(provenance.get("before", ()))) if "calibration" in p), None)
            if told is None or not all(hasattr(model.config, k) for k in ("lesion_rule", "scope_together")):
                raise ValueError("expected a calibrated checkpoint or a run that began with one, got neither; leave --keep-calibration out")
        else:
            told = calibrate(model, tokenizer, training, held_out, count=args.count, heads=args.heads)
        if args.profiles:
            told = told | {"sequence": read_sequence(model, tokenizer, training, held_out, count=args.profiles)}
            provenance |= {"sequence_head": {"studies": args.profiles, "seeds": [LEARNT_SEED, CHOSEN_SEED], "commit": commit()}}
            rounded |= {k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k.startswith("heads.sequence.")}
        rounded |= {k: getattr(model, k).to(torch.bfloat16) for k in ("scope_mean", "scope_whiten", "scope_limit")}
        for tied in model._tied_weights_keys:
            rounded.pop(tied)
        provenance |= {"calibration": told, "weights_dtype": "bfloat16"}
        partial = args.out.with_name(f".{args.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(model, tokenizer, partial, provenance=provenance, state=rounded)
        (partial / "README.md").write_text((Path(__file__).parent / "model_card.md").read_text().format(**told["lesions"]))
        publish(partial, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
