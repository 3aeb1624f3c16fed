"""Dice overlap of label maps: a pure function and an `evaluate.Metric`."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |A n B| / (|A| + |B|) of two bool arrays, in [0, 1], higher is better; nan when both are empty.

    Source: Dice, Ecology 1945.
    """
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else float("nan")


class StructureDice(evaluate.Metric):
    """Dice of every label, over pairs of flattened label maps."""

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description="Dice overlap per label, pooled over the pairs; higher is better, range 0 to 1.",
            citation="Dice, Ecology 1945",
            inputs_description="predictions, references: flattened integer label maps of equal length",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(self, predictions: list, references: list, labels: list[int]) -> dict[str, float]:
        """Dice of each of `labels`, and their mean."""
        said, true = (np.concatenate([np.asarray(m, dtype=np.int32) for m in maps]) for maps in (predictions, references))
        found = {str(k): dice(said == k, true == k) for k in labels}
        return {**found, "mean": float(np.nanmean(list(found.values())))}
