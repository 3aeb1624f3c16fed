"""ESPIRiT: coil sensitivities as eigenvectors of what calibration data reproduce (Uecker et al., MRM 2014).

Shapes: c coils, H rows, W columns, k kernel width, r calibration width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .physics import calibration_size

POWER_ITERATIONS = 40


def espirit(kspace: Tensor, mask: Tensor, *, kernel: int = 6, most: int = 24, threshold: float = 0.02) -> tuple[Tensor, Tensor]:
    """Sensitivities (c, H, W) complex64 of one slice, root-sum-of-squares 1, and eigenvalues (H, W): near 1 where there is signal.

    Args:
        kspace: (c, H, W) complex64, centred.
        mask: (H or 1, W) bool.
        kernel: Width of a kernel, samples; less where fewer lines are calibrated.
        most: Most calibration samples along an axis.
        threshold: Singular values below this share of the largest are noise.

    Raises:
        ValueError: the middle of k-space is not sampled without a gap.
    """
    c, h, w = kspace.shape
    rows, columns = (min(most, int(n), size) for n, size in zip(calibration_size(mask[None]), (h, w), strict=True))
    if min(rows, columns) < 4:
        raise ValueError(f"expected at least 4 lines sampled without a gap in the middle of k-space, got {min(rows, columns)}; "
                         "give sensitivities")
    k = min(kernel, rows - 1, columns - 1)
    a, b = h // 2 - rows // 2, w // 2 - columns // 2
    patches = kspace[:, a : a + rows, b : b + columns].unfold(1, k, 1).unfold(2, k, 1)
    matrix = patches.permute(1, 2, 0, 3, 4).reshape(-1, c * k * k).to(torch.complex64)
    values, vectors = torch.linalg.eigh(matrix.mH @ matrix)
    kernels = vectors[:, values.clamp(min=0).sqrt() > threshold * values[-1].clamp(min=0).sqrt()].T.reshape(-1, c, k, k)
    # What the kernels span, coil against coil: correlations of 2 k - 1 samples a side, whose transform is G at every pixel.
    wide = torch.fft.fft2(kernels, s=(2 * k - 1, 2 * k - 1))
    spectrum = torch.einsum("nayx,nbyx->abyx", wide.conj(), wide)
    correlation = torch.fft.fftshift(torch.fft.ifft2(spectrum), dim=(-2, -1))
    lag = torch.arange(2 * k - 1, device=kspace.device) - (k - 1)
    turns = [torch.exp(-2j * torch.pi * lag[None] * (torch.arange(n, device=kspace.device)[:, None] - n // 2) / n) for n in (h, w)]
    g = torch.einsum("hy,abyx,wx->hwab", turns[0].to(correlation.dtype), correlation, turns[1].to(correlation.dtype)) / k**2
    coils = torch.ones(h, w, c, 1, dtype=g.dtype, device=g.device)
    for _ in range(POWER_ITERATIONS):
        coils = g @ coils
        size = coils.abs().square().sum(2, keepdim=True).sqrt().clamp(min=1e-12)
        coils = coils / size
    return coils[..., 0].permute(2, 0, 1).contiguous(), size[..., 0, 0]
