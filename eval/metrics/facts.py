"""MRI fact score: what a report says of sequence, plane, anatomy and findings, against a reference, fact by fact.

A fact is one attribute of one finding or structure (`atoms`). Findings of two reports are paired first, then their attributes counted.
Shapes: N samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from .extraction import Facts, Finding, Structure, extract
from .metric import Metric, ratio

KINDS = (
    "sequence",
    "plane",
    "structure",
    "finding",
    "negation",
    "certainty",
    "side",
    "location",
    "size",
    "volume",
    "number",
    "signal",
    "severity",
)
SAME_SIZE = 0.2
"""Sizes that differ by no more than this share of the reference agree."""
GENERAL = {"lesion", "mass"}
"""What a more specific finding may be called."""
FOCAL = {
    "lesion",
    "mass",
    "glioma",
    "meningioma",
    "metastasis",
    "abscess",
    "demyelination",
    "infarct",
    "haemorrhage",
    "microbleed",
    "white-matter hyperintensity",
    "cyst",
    "gliosis",
    "lymphoma",
    "schwannoma",
    "adenoma",
    "vascular malformation",
}
Atom = tuple[str, Any]


def atoms(x: Finding | Structure) -> list[Atom]:
    """The facts of one finding or structure, as (kind, value)."""
    if isinstance(x, Structure):
        told: list[Atom] = [("structure", (x.name, x.state, x.signal))]
        return [*told, ("side", x.side)] if x.side else told
    told = [("finding", x.type), ("negation", x.negated), ("certainty", x.certainty)]
    told += [("side", x.side)] if x.side else []
    told += [("location", name) for name in x.location]
    told += [("size", x.size_mm)] if x.size_mm else []
    told += [("volume", x.volume_ml)] if x.volume_ml is not None else []
    told += [("number", x.number)] if x.number is not None else []
    told += [("signal", s) for s in x.signal]
    told += [("severity", x.severity)] if x.severity else []
    told += [("side", ("worse", x.worse))] if x.worse else []
    return told + [("sequence", s) for s in x.seen_on]


def agree(a: Atom, b: Atom) -> bool:
    """Whether two facts say the same; sizes may differ by `SAME_SIZE`."""
    if a[0] != b[0]:
        return False
    if a[0] == "size":
        return len(a[1]) == len(b[1]) and all(abs(x - y) <= SAME_SIZE * y for x, y in zip(a[1], b[1], strict=True))
    if a[0] == "volume":
        return abs(a[1] - b[1]) <= SAME_SIZE * abs(b[1])
    return a[1] == b[1]


def shared(said: Sequence[Atom], true: Sequence[Atom]) -> Counter:
    """How many facts of each kind are in both lists."""
    left, found = list(true), Counter()
    for atom in said:
        match = next((b for b in left if agree(atom, b)), None)
        if match is not None:
            left.remove(match)
            found[atom[0]] += 1
    return found


def _same_thing(a: Finding, b: Finding) -> float:
    """How well two findings may be one: 0 where they cannot."""
    if a.type == b.type:
        score = 4.0
    elif {a.type, b.type} <= FOCAL and {a.type, b.type} & GENERAL and not (a.negated or b.negated):
        score = 2.0
    else:
        return 0.0
    return score + 3 * (a.negated == b.negated) + sum(shared(atoms(a), atoms(b)).values()) / 4 + len(set(a.location) & set(b.location))


def _same_structure(a: Structure, b: Structure) -> float:
    return float(a.name == b.name) * (2 + (a.side == b.side) + (a.state == b.state))


def pair(said: Sequence, true: Sequence, likeness: Callable[[Any, Any], float]) -> list[tuple[int, int]]:
    """The best one-to-one pairing by likeness; what is not alike at all stays alone."""
    if not said or not true:
        return []
    table = np.array([[likeness(a, b) for b in true] for a in said])
    rows, columns = linear_sum_assignment(-table)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if table[i, j] > 0]


def count(said: Facts, true: Facts, *, pairing: Callable[[Any, Any], float] = _same_thing) -> tuple[Counter, Counter, Counter]:
    """Facts of each kind that agree, that are said, that are true."""
    right, all_said, all_true = Counter(), Counter(), Counter()
    for kind, a, b in (("sequence", said.sequences, true.sequences), ("plane", said.planes, true.planes)):
        right[kind] += len(set(a) & set(b))
        all_said[kind] += len(set(a))
        all_true[kind] += len(set(b))
    for a, b, likeness in ((said.findings, true.findings, pairing), (said.structures, true.structures, _same_structure)):
        for i, j in pair(a, b, likeness):
            right += shared(atoms(a[i]), atoms(b[j]))
        all_said.update(k for x in a for k, _ in atoms(x))
        all_true.update(k for x in b for k, _ in atoms(x))
    return right, all_said, all_true


def contradictions(said: Facts, true: Facts) -> tuple[int, int]:
    """How many facts contradict the reference (negation, side, size, sequence), and how many asserted findings it does not have."""
    pairs = pair(said.findings, true.findings, _same_thing)
    # "T1-weighted" is true of a contrast-enhanced T1-weighted image, if not all of the truth.
    fits = {*true.sequences, *("T1w" for x in true.sequences if x == "T1w-Gd")}
    wrong = len(set(said.sequences) - fits) if true.sequences else 0
    for i, j in pairs:
        a, b = said.findings[i], true.findings[j]
        wrong += a.negated != b.negated
        wrong += {a.side, b.side} == {"left", "right"}
        wrong += bool(a.size_mm and b.size_mm) and abs(a.size_mm[0] - b.size_mm[0]) > SAME_SIZE * b.size_mm[0]
    alone = set(range(len(said.findings))) - {i for i, _ in pairs}
    return wrong, sum(not said.findings[i].negated for i in alone)


def plainly(facts: Facts) -> Facts:
    """The same facts with a denied abnormality of a structure told as the structure's being normal."""
    normal = [f for f in facts.findings if f.negated and f.type == "lesion" and f.location]
    structures = tuple(Structure(name, f.side) for f in normal for name in f.location)
    return replace(facts, findings=tuple(f for f in facts.findings if f not in normal), structures=facts.structures + structures)


def fact_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, 5): facts right, said and true, contradictions, unsupported findings; of several references the one with the best F1."""
    rows = []
    for text, refs in zip(predictions, references, strict=True):
        said, best = plainly(extract(text)), None
        for reference in refs:
            true = plainly(extract(reference))
            right, a, b = (sum(c.values()) for c in count(said, true))
            row = (right, a, b, *contradictions(said, true))
            f1 = 2 * right / (a + b) if a + b else 1.0
            if best is None or f1 > best[0]:
                best = f1, row
        assert best is not None
        rows.append(best[1])
    return np.array(rows, dtype=float).reshape(len(predictions), 5)


def fact_f1(s: np.ndarray) -> np.ndarray:
    """F1 from summed facts right, said and true (..., 3 or more)."""
    return ratio(2 * s[..., 0], s[..., 1] + s[..., 2], otherwise=1.0)


FACT_METRICS: tuple[Metric, ...] = (
    Metric("fact F1", "facts of a report by rules, pooled: F1", fact_statistics, fact_f1),
    Metric(
        "fact precision",
        "share of the facts said that the reference has",
        fact_statistics,
        lambda s: np.where(s[..., 1] > 0, ratio(s[..., 0], s[..., 1]), s[..., 2] == 0),
    ),
    Metric(
        "fact recall", "share of the reference's facts that are said", fact_statistics, lambda s: ratio(s[..., 0], s[..., 2], otherwise=1.0)
    ),
    Metric(
        "contradictions",
        "contradicting negations, sides, sizes (20 %) and sequences (T1w for T1w-Gd is none) for each fact said",
        fact_statistics,
        lambda s: ratio(s[..., 3], s[..., 1]),
        higher_is_better=False,
    ),
    Metric(
        "unsupported",
        "asserted findings that the reference lacks for each fact said",
        fact_statistics,
        lambda s: ratio(s[..., 4], s[..., 1]),
        higher_is_better=False,
    ),
)


def by_kind(counts: Iterable[tuple[Counter, Counter, Counter]]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each kind of fact, and of all, from counts that are summed."""
    right, said, true = Counter(), Counter(), Counter()
    for a, b, c in counts:
        right, said, true = right + a, said + b, true + c
    out = {}
    for kind in (*KINDS, "all"):
        r, s, t = (c[kind] if kind != "all" else sum(c.values()) for c in (right, said, true))
        if s or t:
            out[kind] = {
                "precision": r / s if s else float("nan"),
                "recall": r / t if t else float("nan"),
                "f1": 2 * r / (s + t),
                "said": s,
                "true": t,
            }
    return out


def facts_of_gold(row: dict[str, Any]) -> Facts:
    """Facts of one annotated sentence (`tests/golden/facts.md`)."""
    return Facts(
        tuple(row["sequences"]),
        tuple(row["planes"]),
        tuple(Structure(s["name"], s["side"], s["state"], s.get("signal")) for s in row["structures"]),
        tuple(
            Finding(
                f["type"],
                f["negated"],
                f["certainty"],
                f["side"],
                tuple(f["location"]),
                tuple(map(float, f["size_mm"])),
                f["volume_ml"],
                f["number"],
                tuple((s["contrast"], s["value"]) for s in f["signal"]),
            )
            for f in row["findings"]
        ),
    )


def _same_type(a: Finding, b: Finding) -> float:
    return _same_thing(a, b) if a.type == b.type else 0.0


def score_gold(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The extractor against annotated sentences, by kind.

    What the annotation does not hold (severity, the worse side, sequences of a finding) is left out.

    Raises:
        ValueError: a row lacks a field.
    """
    counts = []
    for k, row in enumerate(rows, 1):
        if not {"text", "sequences", "planes", "structures", "findings"} <= set(row):
            raise ValueError(f"expected text, sequences, planes, structures and findings in every row, got row {k} without")
        said = extract(row["text"])
        said = replace(said, findings=tuple(replace(f, severity=None, worse=None, seen_on=()) for f in said.findings))
        counts.append(count(said, facts_of_gold(row), pairing=_same_type))
    return by_kind(counts)
