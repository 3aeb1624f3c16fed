"""Lesions: from probability to shown, measured lesions with a confidence.

Shapes: X Y Z the scan's own voxels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .anatomy import STRUCTURES
from .grid import Grid
from .measure import Measured, lobe_of, location, measure, rank_components, right_of_midline, side_of
from .volume import Volume

LESION_EDGE = 0.35
"""A lesion reaches as far as this mean probability of all planes, from voxels over the threshold on."""


@dataclass(frozen=True)
class LesionRule:
    """Which lesions are shown. Probabilities are means over the planes that were looked at (`stages.release` chooses)."""

    sure: float = 0.5
    """A study with no lesion that reaches this anywhere has none: of one that has, the others are likelier too."""
    sure_alone: float | None = None
    """What every lesion reaches where one plane was looked at; `sure` where None."""
    further: float | None = None
    """What every shown lesion reaches somewhere, where three planes were; `sure` where None."""
    least_ml: float = 0.05
    weights: tuple[float, float, float] | None = None
    """Of the log odds of a lesion's peak, of those of the study's surest, and 1: the log odds that it touches a true lesion, where
    three planes were looked at. Otherwise, and where None, a lesion's confidence is its mean probability."""

    @classmethod
    def of(cls, config: Any) -> LesionRule:
        """The rule of a checkpoint; this one's defaults where it has none.

        Raises:
            ValueError: it has another form.
        """
        told = getattr(config, "lesion_rule", {})
        try:
            rule = cls(**told)
            rule.confidence(0.5, 0.5, sum(v for v in (rule.sure, rule.sure_alone, rule.further, rule.least_ml) if v is not None))
        except (TypeError, ValueError):
            names = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"expected a lesion_rule of {names} in the checkpoint, got another; release it again") from None
        return rule

    def alone(self) -> LesionRule:
        """The rule where one plane was looked at."""
        sure = self.sure if self.sure_alone is None else self.sure_alone
        return replace(self, sure=sure, further=None, weights=None)

    def confidence(self, peak: float, surest: float, mean: float) -> float:
        """How likely a lesion touches a true one, by its peak, that of the study's surest, and its mean probability."""
        if self.weights is None:
            return mean
        a, b, c = self.weights
        return 1 / (1 + math.exp(-(a * log_odds(peak) + b * log_odds(surest) + c)))


def log_odds(p: float) -> float:
    """Log odds, of probabilities from 0.001 to 0.999."""
    p = min(max(p, 0.001), 0.999)
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class Lesion:
    """One connected lesion mask with its measures."""

    rank: int
    """From 1, by falling volume."""
    side: str
    place: str
    """Structure it mostly lies in."""
    measured: Measured
    confidence: float
    """How likely it touches a true lesion (`LesionRule.confidence`)."""
    detected: float
    """Best score of a detection whose centre lies in the lesion's box; 0 without one."""
    lobe: str = ""
    """Such as `left frontal lobe`; empty where it lies in none, near a border, or the brain is not whole."""
    signal: str = ""
    """`hyperintense` or `hypointense` to white matter, as measured; or neither."""

    @property
    def told_place(self) -> str:
        """Its structure as people are told: of no side where it lies on both."""
        return without_sides(self.place) if self.side == "midline" else self.place


_STEMS = "|".join(sorted({s.name.removeprefix(f"{s.side} ") for s in STRUCTURES if s.side != "midline"}))
_SIDED = re.compile(rf"\b(?:left|right) (?={_STEMS})")


def without_sides(text: str) -> str:
    """A text with structures' names without their sides."""
    return _SIDED.sub("", text)


def lesion_ranks(probability: Tensor, brain: Tensor, voxel_ml: float, rule: LesionRule) -> tuple[Tensor, list[float]]:
    """Lesions (X, Y, Z) uint8 by falling volume, 0 elsewhere, and the highest probability in each; none where none is sure.

    Args:
        probability: (X, Y, Z) mean over the planes.
        brain: (X, Y, Z) bool, where lesions may be.
    """
    seeds = (probability > (rule.sure if rule.further is None else rule.further)) & brain
    least = max(1, round(rule.least_ml / voxel_ml))
    ranks, sizes = rank_components(((probability > LESION_EDGE) | seeds) & brain, least=least, seeds=seeds)
    ranks = torch.where(ranks == 255, 0, ranks).to(torch.uint8)
    peaks = torch.zeros(len(sizes) + 1).scatter_reduce_(0, ranks.flatten().long(), probability.flatten(), "amax").tolist()[1:]
    return (ranks, peaks) if max(peaks, default=0.0) > rule.sure else (torch.zeros_like(ranks), [])


def measured_lesion(rank: int, ranks: Tensor, labels: Tensor, confidence: float, volume: Volume, grid: Grid, boxes: list,
                    brain: tuple[Tensor, Tensor] | None = None) -> Lesion:  # fmt: skip
    """Measure one lesion.

    Args:
        brain: `omnimri.measure.brain_box`, by which its lobe is told.
    """
    mask = ranks == rank
    measured = measure(mask, volume, slice_axis=grid.axes[0])
    low, high = (torch.tensor(c) for c in measured.box_mm)
    detected = 0.0
    for box in boxes:
        centre = grid.world_mm(torch.tensor([box.centre]), volume.affine)[0]
        if bool((centre >= low).all() and (centre <= high).all()):
            detected = max(detected, box.score)
    side = side_of(right_of_midline(torch.nonzero(mask), labels, volume.affine)) if volume.oriented else "unknown"
    place, lobe = location(mask, labels), ""
    if brain is not None and volume.oriented:
        lobe = lobe_of(place, (torch.tensor(measured.centre_mm, dtype=torch.float64) - brain[0]) / (brain[1] - brain[0]))
    return Lesion(rank, side, place, measured, confidence, detected, lobe)
