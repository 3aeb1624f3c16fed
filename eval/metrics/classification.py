"""Classification of studies: areas under curves, F1 at a threshold tuned elsewhere, balanced accuracy, calibration.

Labels are bool (N,), scores are float (N,), higher for the positive class.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

BINS = 10


def auroc(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """Area under the ROC curve with the 95 % interval of DeLong (1988) from midranks (Sun and Xu, 2014), in [0, 1]; nan with one class."""
    positive, negative = scores[labels], scores[~labels]
    m, n = len(positive), len(negative)
    if not m or not n:
        return float("nan"), float("nan"), float("nan")
    both = stats.rankdata(np.concatenate([positive, negative]))
    area = (both[:m].sum() - m * (m + 1) / 2) / (m * n)
    v10 = (both[:m] - stats.rankdata(positive)) / n
    v01 = 1 - (both[m:] - stats.rankdata(negative)) / m
    variance = (v10.var(ddof=1) / m + v01.var(ddof=1) / n) if min(m, n) > 1 else 0.0
    if min(m, n) < 2:
        return float(area), float("nan"), float("nan")
    half = 1.959964 * variance**0.5
    return float(area), float(max(0.0, area - half)), float(min(1.0, area + half))


def auprc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision (scikit-learn); nan without a positive."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if labels.any() else float("nan")


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score from which on calling positive gives the best F1: to be found on validation data, never on those it is used on."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[int(np.argmax(f1[:-1]))])


def at_threshold(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """F1 and balanced accuracy of `scores >= threshold` (scikit-learn)."""
    from sklearn.metrics import balanced_accuracy_score, f1_score

    said = scores >= threshold
    return {"f1": float(f1_score(labels, said, zero_division=0)), "balanced_accuracy": float(balanced_accuracy_score(labels, said))}


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean probability, share of positives, number) of each bin of equal width that holds something."""
    index = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    return [
        (float(probabilities[index == k].mean()), float(labels[index == k].mean()), int((index == k).sum()))
        for k in range(bins)
        if (index == k).any()
    ]


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of probability and share over the bins, weighted by number (Naeini et al., AAAI 2015), from 0 to 1."""
    rows = reliability(labels, probabilities, bins)
    return sum(abs(p - share) * n for p, share, n in rows) / len(labels) if len(labels) else float("nan")


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, path: Path, title: str) -> None:
    """A PNG of the reliability diagram with the number in each bin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4, 4))
    axis.plot([0, 1], [0, 1], "--", color="grey")
    rows = reliability(labels, probabilities)
    axis.plot([p for p, _, _ in rows], [s for _, s, _ in rows], "o-")
    for p, share, n in rows:
        axis.annotate(str(n), (p, share), textcoords="offset points", xytext=(4, -10), fontsize=8)
    axis.set(xlabel="probability said", ylabel="share true", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"{title}: ECE {expected_calibration_error(labels, probabilities):.3f}, n = {len(labels)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
