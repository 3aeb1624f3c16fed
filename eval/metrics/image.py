"""Segmentation metrics as one `evaluate.Metric`.

`evaluate.load("eval/metrics/image.py", "hausdorff95_mm")` works in a checkout, without the hub.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from eval.metrics.segmentation import MEASURES, measure_masks


class ImageMetric(evaluate.Metric):
    """Any of `segmentation.MEASURES` for every label, over cases given as flattened label maps; its configuration name says which."""

    def _info(self) -> evaluate.MetricInfo:
        name = self.config_name if self.config_name != "default" else "dice"
        if name not in MEASURES:
            raise ValueError(f"expected a metric from {', '.join(MEASURES)}, got {name!r}")
        direction, (low, high) = MEASURES[name]
        maps = datasets.Sequence(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=f"{name}: {direction} is better, range {low:g} to {high:g}; mean over the cases in which it is defined.",
            citation="",
            inputs_description="predictions, references: flattened label maps; labels: which; shape and spacing_mm: of every case",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        labels: list[int],
        shape: tuple[int, int, int] | None = None,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> dict[str, float]:
        """The mean over cases for each label, and over labels; nan where it is nowhere defined."""
        name = self.config_name if self.config_name != "default" else "dice"
        found: dict[str, float] = {}
        for label in labels:
            values = []
            for p, r in zip(predictions, references, strict=True):
                said, true = (np.asarray(x, dtype=np.int32).reshape(shape or (-1, 1, 1)) == label for x in (p, r))
                values.append(measure_masks(said, true, spacing_mm)[name])
            defined = [v for v in values if not np.isnan(v)]
            found[str(label)] = float(np.mean(defined)) if defined else float("nan")
        defined = [v for v in found.values() if not np.isnan(v)]
        return {**found, "mean": float(np.mean(defined)) if defined else float("nan")}
