"""Image metrics: equal to the libraries that define them, and defined where masks are empty."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import ndimage

from eval.metrics import classification, detection, reconstruction, segmentation
from eval.metrics.detection import Detected

SHAPE, SPACING = (24, 30, 18), (1.0, 0.8, 3.0)


def blob(seed, shape=SHAPE):
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3) > 0.02


def surface(mask):
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * SPACING


def test_overlap_is_monais_and_by_hand():
    import torch
    from monai.metrics import compute_dice, compute_iou

    p, r = blob(0), blob(1)
    a, b = (torch.from_numpy(x[None, None].astype(np.float32)) for x in (p, r))
    assert segmentation.dice(p, r) == pytest.approx(float(compute_dice(a, b)), abs=1e-6)
    assert segmentation.iou(p, r) == pytest.approx(float(compute_iou(a, b)), abs=1e-6)
    square = np.zeros((4, 4, 1), bool)
    square[:2], half = True, np.zeros((4, 4, 1), bool)
    half[1:3] = True
    assert segmentation.dice(half, square) == 0.5
    assert segmentation.iou(half, square) == pytest.approx(1 / 3)
    assert segmentation.volume_error_ml(square, half[:, :2], 0.5) == segmentation.volume_error_ml(half[:, :2], square, 0.5) == 2.0
    assert segmentation.pooled_dice([(square, square), (half, square)]) == pytest.approx(0.75)


def test_distances_agree_with_nearest_neighbours():
    p, r = blob(2), blob(3)
    from scipy.spatial import cKDTree

    there, back = cKDTree(surface(r)).query(surface(p))[0], cKDTree(surface(p)).query(surface(r))[0]
    found = segmentation.measure_masks(p, r, SPACING)
    assert found["hausdorff95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=0.3)
    assert found["surface_distance_mm"] == pytest.approx(np.concatenate([there, back]).mean(), abs=0.15)
    assert found["volume_error_ml"] == pytest.approx(abs(int(p.sum()) - int(r.sum())) * 2.4 / 1000)
    moved = np.zeros((40, 20, 20), bool)
    moved[5:15, 5:15, 5:15] = True
    assert segmentation.hausdorff95_mm(np.roll(moved, 6, 0), moved, (0.5, 1.0, 1.0)) == pytest.approx(3.0)
    assert segmentation.surface_distance_mm(moved, moved, SPACING) == 0.0


def test_empty_masks():
    p, none = blob(4), np.zeros(SHAPE, bool)
    diagonal = float(np.linalg.norm(np.multiply(SHAPE, SPACING)))
    both = segmentation.measure_masks(none, none, SPACING)
    assert all(np.isnan(v) for v in both.values())
    for said, true in ((p, none), (none, p)):
        found = segmentation.measure_masks(said, true, SPACING)
        assert (found["dice"], found["iou"]) == (0.0, 0.0)
        assert found["hausdorff95_mm"] == found["surface_distance_mm"] == pytest.approx(diagonal)
        assert found["volume_error_ml"] == pytest.approx(abs(int(said.sum()) - int(true.sum())) * 2.4 / 1000)


def test_the_metric_of_evaluate_loads_without_the_hub(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    p, r = blob(5).astype(np.int32), blob(6).astype(np.int32)
    for name in segmentation.MEASURES:
        metric = evaluate.load("eval/metrics/image.py", name, keep_in_memory=True)
        found = metric.compute(predictions=[p.ravel()], references=[r.ravel()], labels=[1, 2], shape=SHAPE, spacing_mm=SPACING)
        assert found["1"] == pytest.approx(segmentation.measure_masks(p == 1, r == 1, SPACING)[name])
        assert np.isnan(found["2"])
        assert found["mean"] == found["1"]


def cube(x, size=10.0):
    return (x, 0.0, 0.0), (x + size, size, size)


def test_detection_by_hand():
    assert detection.box_iou(cube(0), cube(5)) == pytest.approx(1 / 3)
    assert detection.box_iou(cube(0), cube(20)) == 0.0
    cases = [
        Detected((cube(0), cube(50), cube(100)), (0.9, 0.8, 0.3), (cube(1), cube(101))),
        Detected((cube(0),), (0.6,), ()),
        Detected((), (), (cube(0),)),
    ]
    # By falling score: right (1/1), wrong, wrong, right (2/4), of three.
    assert detection.average_precision(cases, 0.3) == pytest.approx((1.0 + 0.5) / 3)
    found = detection.froc(cases, 0.3)
    assert found[0.125] == pytest.approx(1 / 3)
    assert found[1.0] == pytest.approx(2 / 3)
    doubled = [Detected((cube(0), cube(0)), (0.9, 0.8), (cube(0),))]
    assert detection.matched(doubled, 0.5)[1].tolist() == [True, False]
    assert detection.average_precision(doubled, 0.5) == 1.0
    assert np.isnan(detection.average_precision([Detected((cube(0),), (1.0,), ())], 0.1))


def test_reconstruction_by_the_fastmri_definitions():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    rng = np.random.default_rng(0)
    reference = np.abs(ndimage.gaussian_filter(rng.normal(size=(3, 40, 36)), 2)) * 7
    said = reference + 0.1 * rng.normal(size=reference.shape)
    found = reconstruction.measure_images(said, reference)
    assert found["psnr_db"] == pytest.approx(peak_signal_noise_ratio(reference, said, data_range=reference.max()))
    assert found["psnr_db"] == pytest.approx(10 * np.log10(reference.max() ** 2 / np.mean((reference - said) ** 2)))
    assert found["ssim"] == pytest.approx(
        np.mean([structural_similarity(r, p, data_range=reference.max()) for r, p in zip(reference, said, strict=True)])
    )
    assert found["nmse"] == pytest.approx(((reference - said) ** 2).sum() / (reference**2).sum())
    assert reconstruction.measure_images(reference, reference) == {
        "psnr_db": float("inf"),
        "ssim": 1.0,
        "nmse": 0.0,
        "high_frequency_error": 0.0,
    }
    smooth = np.stack([ndimage.gaussian_filter(s, 2) for s in reference])
    assert reconstruction.high_frequency_error(smooth, reference) > reconstruction.high_frequency_error(reference * 0.95, reference)
    with pytest.raises(ValueError, match="of one shape"):
        reconstruction.measure_images(said[:2], reference)
    with pytest.raises(ValueError, match="with signal"):
        reconstruction.measure_images(said, reference * 0)


def test_classification_as_scikit_learn():
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    scores = np.round(rng.normal(labels * 1.0, 1.0), 1)  # with ties
    area, low, high = classification.auroc(labels, scores)
    assert area == pytest.approx(roc_auc_score(labels, scores))
    drawn = []
    for _ in range(400):
        k = rng.integers(0, 300, 300)
        drawn.append(roc_auc_score(labels[k], scores[k]))
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(drawn), rel=0.15)
    assert classification.auprc(labels, scores) == pytest.approx(average_precision_score(labels, scores))
    threshold = classification.best_threshold(labels, scores)
    best = max(f1_score(labels, scores >= t) for t in np.unique(scores))
    found = classification.at_threshold(labels, scores, threshold)
    assert found["f1"] == pytest.approx(best)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores >= threshold))
    assert all(np.isnan(v) for v in classification.auroc(np.ones(4, bool), np.arange(4.0)))
    assert np.isnan(classification.auprc(np.zeros(4, bool), np.arange(4.0)))


def test_calibration(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    labels = rng.random(20_000) < p
    assert classification.expected_calibration_error(labels, p) < 0.02
    assert classification.expected_calibration_error(labels, np.clip(p + 0.3, 0, 1)) == pytest.approx(0.27, abs=0.05)
    sure, true = np.array([0.05, 0.95, 0.95, 1.0]), np.array([False, True, False, True])
    assert classification.reliability(true, sure) == [(0.05, 0.0, 1), (pytest.approx(2.9 / 3), pytest.approx(2 / 3), 3)]
    assert classification.expected_calibration_error(true, sure) == pytest.approx((0.05 + 3 * 0.3) / 4)
    classification.draw_reliability(true, sure, tmp_path / "r.png", "four")
    assert (tmp_path / "r.png").stat().st_size > 5000
