"""Intervals and tests by resampling. All work on statistics that add up over samples (`metrics.metric`), by patient where known.

Shapes: N samples, G groups (patients), K statistics, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .metrics.metric import Metric

DRAWS, SHUFFLES = 1000, 10_000
LEAST_GROUPS = 5
"""Fewer patients (or reports) give no bootstrap p value: all draws may be alike."""
CHUNK = 1000
"""Draws that are in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.n}"


def grouped(statistics: np.ndarray, patients: Sequence[str] | None) -> np.ndarray:
    """(N, K) -> (G, K): summed over the samples of each patient; as they are where no patients are known."""
    if patients is None:
        return statistics
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    out = np.zeros((int(index.max()) + 1, statistics.shape[1]))
    np.add.at(out, index, statistics)
    return out


def draw(groups: int, draws: int, seed: int) -> np.ndarray:
    """(R, G) how often each group is drawn, with replacement."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(float)


def estimate(
    metric: Metric, statistics: np.ndarray, patients: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """A metric of (N, K) statistics with the percentile interval of a bootstrap over patients (Efron, 1979)."""
    groups = grouped(statistics, patients)
    low, high = float("nan"), float("nan")
    if len(groups) > 1:
        low, high = np.percentile(metric.score(draw(len(groups), draws, seed) @ groups), [2.5, 97.5])
    return Estimate(float(metric.score(statistics.sum(0))), float(low), float(high), len(statistics))


def mean_estimate(values: Sequence[float], patients: Sequence[str] | None = None, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of values with its interval; values that are not defined (nan) are left out, and n counts the others."""
    from .metrics.metric import mean_of, mean_score

    kept = [k for k, v in enumerate(values) if not np.isnan(v)]
    if not kept:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    metric = Metric("mean", "", lambda p, r: np.empty((0, 2)), mean_score)
    return estimate(
        metric, mean_of(np.array([values[k] for k in kept])), [patients[k] for k in kept] if patients else None, draws=draws, seed=seed
    )


def figure_estimate(figure: Callable[[np.ndarray], float], patients: Sequence[str], *, draws: int = 200, seed: int = 0) -> Estimate:
    """Any figure of a set of samples, given as their indices, with a bootstrap over patients; for what does not add up over samples."""
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    groups = [np.flatnonzero(index == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    drawn = [figure(np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])) for _ in range(draws)]
    known = len(groups) > 1 and not np.isnan(drawn).all()
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if known else (float("nan"), float("nan"))
    return Estimate(figure(np.arange(len(patients))), float(low), float(high), len(patients))


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927); the whole range where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z2, p = 1.959964**2, k / n
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), 1.959964 * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5 / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def of(k: int, n: int) -> str:
    """`k of n` with its interval, as tables show it."""
    low, high = wilson(k, n)
    return f"{k} of {n} [{low:.2f}, {high:.2f}]" if n else "0 of 0"


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same samples."""

    difference: Estimate
    """B minus A."""
    p_bootstrap: float
    p_randomisation: float


def compare(
    metric: Metric,
    a: np.ndarray,
    b: np.ndarray,
    patients: Sequence[str] | None = None,
    *,
    draws: int = DRAWS,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap (Koehn, 2004) and approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005), both two-sided."""
    ga, gb = grouped(a, patients), grouped(b, patients)
    counts = draw(len(ga), draws, seed)
    drawn = metric.score(counts @ gb) - metric.score(counts @ ga)
    found = float(metric.score(gb.sum(0)) - metric.score(ga.sum(0)))
    # Shifted to no difference, how often is one as large as the one found?
    p_bootstrap = (1 + int((np.abs(drawn - drawn.mean()) >= abs(found) - 1e-12).sum())) / (draws + 1)
    if len(ga) < LEAST_GROUPS:
        p_bootstrap = float("nan")
    rng = np.random.default_rng(seed)
    larger, left = 0, shuffles
    total_a, total_b, off = ga.sum(0), gb.sum(0), gb - ga
    while left:
        part = min(left, CHUNK)
        moved = rng.integers(0, 2, (part, len(off))).astype(float) @ off
        swapped = metric.score(total_b - moved) - metric.score(total_a + moved)
        larger += int((np.abs(swapped) >= abs(found) - 1e-12).sum())
        left -= part
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Comparison(Estimate(found, float(low), float(high), len(a)), p_bootstrap, (larger + 1) / (shuffles + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for as many tests as there are values (Holm, 1979); nan stays nan and is no test."""
    order = [k for k in np.argsort(p_values) if not np.isnan(p_values[k])]
    adjusted, worst = np.full(len(p_values), np.nan), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[k]))
        adjusted[k] = worst
    return adjusted.tolist()
