"""Detection: average precision and FROC over cases with boxes in mm. A box is ((x0, y0, z0), (x1, y1, z1))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Box = tuple[tuple[float, ...], tuple[float, ...]]
FALSE_POSITIVES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a scan at which FROC is read."""


@dataclass(frozen=True)
class Detected:
    """One case."""

    boxes: tuple[Box, ...]
    scores: tuple[float, ...]
    truth: tuple[Box, ...]


def box_iou(a: Box, b: Box) -> float:
    """Overlap of two boxes in three dimensions, from 0 to 1."""
    (a0, a1), (b0, b1) = (np.asarray(a, float), np.asarray(b, float))
    common = float(np.clip(np.minimum(a1, b1) - np.maximum(a0, b0), 0, None).prod())
    union = float((a1 - a0).prod() + (b1 - b0).prod()) - common
    return common / union if union > 0 else 0.0


@lru_cache(10_000)
def _matched(case: Detected, least_iou: float) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """Scores of a case's detections, the surest first, and which are right: each takes the best truth still free."""
    free = set(range(len(case.truth)))
    order = np.argsort(-np.asarray(case.scores, float), kind="stable").tolist()
    right = []
    for k in order:
        overlap = {t: box_iou(case.boxes[k], case.truth[t]) for t in free}
        best = max(overlap, key=lambda t: overlap[t], default=None)
        right.append(best is not None and overlap[best] >= least_iou)
        if right[-1]:
            free.remove(best)
    return tuple(case.scores[k] for k in order), tuple(right)


def matched(cases: Sequence[Detected], least_iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all detections, and which of them are right."""
    found = [_matched(case, least_iou) for case in cases]
    return np.array([s for scores, _ in found for s in scores], float), np.array([r for _, right in found for r in right], bool)


def average_precision(cases: Sequence[Detected], least_iou: float) -> float:
    """Area under precision over recall, precision made monotone (PASCAL VOC 2010), from 0 to 1; nan without a truth."""
    total = sum(len(c.truth) for c in cases)
    if not total:
        return float("nan")
    scores, right = matched(cases, least_iou)
    right = right[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(right)
    recall = np.concatenate([[0.0], hits / total])
    precision = np.concatenate([hits / np.arange(1, len(right) + 1), [0.0]])
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * best[: len(right)]).sum())


def froc(cases: Sequence[Detected], least_iou: float) -> dict[float, float]:
    """Sensitivity at `FALSE_POSITIVES` a scan, the best that no more reach (Bunch et al., 1978)."""
    total = sum(len(c.truth) for c in cases)
    scores, right = matched(cases, least_iou)
    out = {}
    for most in FALSE_POSITIVES:
        best = 0.0
        for threshold in sorted(set(scores.tolist()), reverse=True):
            kept = scores >= threshold
            if (~right[kept]).sum() <= most * len(cases):
                best = max(best, right[kept].sum() / total if total else float("nan"))
        out[most] = float(best) if total else float("nan")
    return out
