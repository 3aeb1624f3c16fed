"""Reconstruction: the fastMRI definitions (Zbontar et al., 2018) on magnitude volumes (S, H, W), and the error of fine detail."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

DETAIL_PIXELS = 1.5
"""Width of the Laplacian of Gaussian that sees edges."""


def psnr_db(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal over root mean square error, dB; the peak is the reference's largest value."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(reference, prediction, data_range=reference.max()))


def ssim(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity of the slices, windows of 7 pixels, the range is the volume's largest value."""
    from skimage.metrics import structural_similarity

    return float(np.mean([structural_similarity(r, p, data_range=reference.max()) for r, p in zip(reference, prediction, strict=True)]))


def nmse(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Squared error over the squared reference."""
    return float(np.linalg.norm(reference - prediction) ** 2 / np.linalg.norm(reference) ** 2)


def high_frequency_error(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Error of what a Laplacian of Gaussian sees, over what it sees in the reference (HFEN; Ravishankar and Bresler, 2011)."""
    seen = [np.stack([ndimage.gaussian_laplace(s.astype(np.float64), DETAIL_PIXELS) for s in x]) for x in (prediction, reference)]
    return float(np.linalg.norm(seen[0] - seen[1]) / np.linalg.norm(seen[1]))


MEASURES = {
    "psnr_db": (psnr_db, "higher", (float("-inf"), float("inf"))),
    "ssim": (ssim, "higher", (-1.0, 1.0)),
    "nmse": (nmse, "lower", (0.0, float("inf"))),
    "high_frequency_error": (high_frequency_error, "lower", (0.0, float("inf"))),
}


def measure_images(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """All of `MEASURES` of two magnitude volumes (S, H, W).

    Raises:
        ValueError: the shapes differ, or the reference is empty.
    """
    if prediction.shape != reference.shape or reference.ndim != 3:
        raise ValueError(f"expected two volumes (slices, rows, columns) of one shape, got {prediction.shape} and {reference.shape}")
    if not float(reference.max()) > 0:
        raise ValueError("expected a reference with signal, got an empty one")
    return {name: f(prediction, reference) for name, (f, _, _) in MEASURES.items()}
