"""Metric: a figure as a function of statistics that add up over samples, so that resampling costs one matrix product.

Shapes: N samples, K statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistics = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
"""(predictions, references of each) -> (N, K) float64."""


@dataclass(frozen=True)
class Metric:
    """One figure with what a table must say of it."""

    name: str
    definition: str
    statistics: Statistics
    score: Callable[[np.ndarray], np.ndarray]
    """Summed statistics (..., K) -> (...)."""
    range: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool = True

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The figure of a corpus."""
        return float(self.score(self.statistics(predictions, references).sum(0)))

    @property
    def direction(self) -> str:
        """`higher` or `lower`, whichever is better."""
        return "higher" if self.higher_is_better else "lower"


def ratio(numerator: np.ndarray, denominator: np.ndarray, *, otherwise: float = 0.0) -> np.ndarray:
    """Element-wise quotient; `otherwise` where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator != 0)


def mean_of(values: np.ndarray) -> np.ndarray:
    """(N,) values of samples -> the (N, 2) statistics of their mean (`mean_score`)."""
    return np.stack([np.asarray(values, float), np.ones(len(values))], 1)


def mean_score(sums: np.ndarray) -> np.ndarray:
    """The mean from summed statistics of `mean_of`."""
    return ratio(sums[..., 0], sums[..., 1])
