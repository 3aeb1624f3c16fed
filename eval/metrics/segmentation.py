"""Segmentation of one structure in one case: overlap and distance, each a plain function of two bool masks.

Where both masks are empty nothing is defined (nan, left out of means and of n). Where one is empty, overlap is 0 and a distance is the
diagonal of the image: as far off as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |A n B| / (|A| + |B|), from 0 to 1 (Dice, Ecology 1945)."""
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else float("nan")


def iou(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|A n B| / |A u B|, from 0 to 1 (Jaccard, 1912)."""
    union = int((prediction | reference).sum())
    return int((prediction & reference).sum()) / union if union else float("nan")


def volume_error_ml(prediction: np.ndarray, reference: np.ndarray, voxel_ml: float) -> float:
    """Distance of the predicted from the reference volume, ml; nan where both are empty."""
    said, true = int(prediction.sum()), int(reference.sum())
    return abs(said - true) * voxel_ml if said or true else float("nan")


def _distance(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], measure: Callable) -> float:
    if not prediction.any() and not reference.any():
        return float("nan")
    if not prediction.any() or not reference.any():
        return float(np.linalg.norm([n * s for n, s in zip(prediction.shape, spacing_mm, strict=True)]))
    where = np.argwhere(prediction | reference)
    box = tuple(slice(max(0, a - 1), b + 2) for a, b in zip(where.min(0), where.max(0), strict=True))
    import torch

    said, true = (torch.from_numpy(np.ascontiguousarray(m[box], dtype=np.float32))[None, None] for m in (prediction, reference))
    return float(measure(said, true))


def hausdorff95_mm(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """The larger of both directions' 95th percentile of the distances from one surface to the other, mm (MONAI)."""
    from monai.metrics import compute_hausdorff_distance

    return _distance(
        prediction,
        reference,
        spacing_mm,
        lambda a, b: compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(spacing_mm)),
    )


def surface_distance_mm(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Mean distance between the surfaces, both directions pooled, mm (MONAI's symmetric average surface distance)."""
    from monai.metrics import compute_average_surface_distance

    return _distance(
        prediction,
        reference,
        spacing_mm,
        lambda a, b: compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=list(spacing_mm)),
    )


def pooled_dice(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Dice of all voxels of all pairs together: large structures and cases count more. For comparison with others' tables alone."""
    total = sum(int(p.sum()) + int(r.sum()) for p, r in pairs)
    return 2 * sum(int((p & r).sum()) for p, r in pairs) / total if total else float("nan")


MEASURES = {
    # name: (direction, range)
    "dice": ("higher", (0.0, 1.0)),
    "iou": ("higher", (0.0, 1.0)),
    "hausdorff95_mm": ("lower", (0.0, float("inf"))),
    "surface_distance_mm": ("lower", (0.0, float("inf"))),
    "volume_error_ml": ("lower", (0.0, float("inf"))),
}


def measure_masks(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """All of `MEASURES` for one structure of one case."""
    return {
        "dice": dice(prediction, reference),
        "iou": iou(prediction, reference),
        "hausdorff95_mm": hausdorff95_mm(prediction, reference, spacing_mm),
        "surface_distance_mm": surface_distance_mm(prediction, reference, spacing_mm),
        "volume_error_ml": volume_error_ml(prediction, reference, float(np.prod(spacing_mm)) / 1000),
    }
