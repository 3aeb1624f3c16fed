"""Signal equations, centred Fourier transforms, coil maps and undersampling masks; native complex tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def spin_echo(pd: Tensor, t1_ms: Tensor, t2_ms: Tensor, *, tr_ms: Tensor, te_ms: Tensor) -> Tensor:
    """Spin-echo magnitude, M0 (1 - exp(-TR/T1)) exp(-TE/T2) (Bernstein et al., Handbook of MRI Pulse Sequences)."""
    return pd * (1 - torch.exp(-tr_ms / t1_ms)) * torch.exp(-te_ms / t2_ms)


def inversion_recovery(
    pd: Tensor, t1_ms: Tensor, t2_ms: Tensor, *, tr_ms: Tensor, te_ms: Tensor, ti_ms: Tensor
) -> Tensor:
    """Inversion-recovery magnitude, |M0 (1 - 2 exp(-TI/T1) + exp(-TR/T1))| exp(-TE/T2)."""
    return pd * (1 - 2 * torch.exp(-ti_ms / t1_ms) + torch.exp(-tr_ms / t1_ms)).abs() * torch.exp(-te_ms / t2_ms)


def spoiled_gradient_echo(
    pd: Tensor, t1_ms: Tensor, t2s_ms: Tensor, *, tr_ms: Tensor, te_ms: Tensor, flip_rad: Tensor
) -> Tensor:
    """Spoiled gradient-echo magnitude: Ernst's formula with decay at T2*."""
    e1 = torch.exp(-tr_ms / t1_ms)
    return pd * torch.sin(flip_rad) * (1 - e1) / (1 - torch.cos(flip_rad) * e1) * torch.exp(-te_ms / t2s_ms)


def diffusion_weighted(signal: Tensor, adc: Tensor, *, b_value: Tensor) -> Tensor:
    """Signal under diffusion weighting, S0 exp(-b ADC), ADC in 1e-3 mm^2/s and b in s/mm^2 (Le Bihan, Radiology 1986)."""
    return signal * torch.exp(-b_value * adc * 1e-3)


def t1_at(t1_ms: Tensor, exponent: Tensor, *, field_t: float) -> Tensor:
    """T1 at a field strength from T1 at 3 T, T1 ~ B0^exponent (Rooney et al., MRM 2007)."""
    return t1_ms * (field_t / 3.0) ** exponent


def t2_star_at(t2_ms: Tensor, t2s_ms: Tensor, *, field_t: float) -> Tensor:
    """T2* at a field strength from T2 and T2* at 3 T: what dephases beyond T2 grows linearly with the field."""
    return 1 / (1 / t2_ms + (1 / t2s_ms - 1 / t2_ms).clamp(min=0) * field_t / 3.0)


def fft2c(x: Tensor) -> Tensor:
    """Centred, orthonormal 2-D Fourier transform over the last two axes, image -> k-space."""
    return torch.fft.fftshift(
        torch.fft.fft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )


def ifft2c(x: Tensor) -> Tensor:
    """Inverse of `fft2c`."""
    return torch.fft.fftshift(
        torch.fft.ifft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )


def line_mask(width: int, acceleration: float, generator: torch.Generator, centre_fraction: float = 0.1) -> Tensor:
    """(width,) bool: a fully sampled centre and uniformly random lines outside it, about `width/acceleration` in all."""
    centre = max(4, round(width * centre_fraction))
    mask = torch.zeros(width, dtype=torch.bool)
    mask[(width - centre) // 2 : (width - centre) // 2 + centre] = True
    wanted = max(0, round(width / acceleration) - centre)
    free = torch.nonzero(~mask).flatten()
    mask[free[torch.randperm(len(free), generator=generator)[:wanted]]] = True
    return mask


def gaussian_coils(num_coils: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(coils, H, W) complex64 sensitivities: smooth lobes on a ring with slow phase, unit root-sum-of-squares."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = 2 * torch.pi * (torch.arange(num_coils) + torch.rand((), generator=generator)) / num_coils
    cy, cx = 1.2 * torch.sin(angle), 1.2 * torch.cos(angle)
    lobe = torch.exp(-((y[None] - cy[:, None, None]) ** 2 + (x[None] - cx[:, None, None]) ** 2) / 1.5)
    a, b, c = (torch.rand(num_coils, 3, generator=generator) * 2 - 1).T
    phase = torch.pi * (a[:, None, None] * y + b[:, None, None] * x + c[:, None, None])
    coils = torch.polar(lobe, phase)
    return coils / coils.abs().square().sum(0, keepdim=True).sqrt()


def estimate_coils(kspace: Tensor, centre: int = 24) -> Tensor:
    """Sensitivities of (S, coils, H, W) k-space from its fully sampled centre: low-resolution images over their
    root-sum-of-squares (McKenzie et al., MRM 2002).
    """
    *_, h, w = kspace.shape
    window = torch.zeros(h, w)
    ch, cw = min(centre, h), min(centre, w)
    taper = torch.hann_window(ch + 2, periodic=False)[1:-1, None] * torch.hann_window(cw + 2, periodic=False)[None, 1:-1]
    window[(h - ch) // 2 : (h - ch) // 2 + ch, (w - cw) // 2 : (w - cw) // 2 + cw] = taper
    low = ifft2c(kspace * window)
    return low / low.abs().square().sum(-3, keepdim=True).sqrt().clamp(min=1e-8)


def sense_adjoint(kspace: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
    """Coil-combined image (N, H, W) of measured k-space (N, c, H, W) under a mask (N, H or 1, W)."""
    return (ifft2c(kspace * mask[:, None]) * coils.conj()).sum(1)


def sense_normal(image: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
    """What measuring an image (N, H, W) and taking the adjoint gives."""
    return sense_adjoint(fft2c(image[:, None] * coils), mask, coils)


@torch.no_grad()
def cg_sense(kspace: Tensor, mask: Tensor, coils: Tensor, *, weight: float, iterations: int) -> Tensor:
    """CG-SENSE (Pruessmann et al., MRM 2001) with Tikhonov weight: image (N, H, W)."""
    right = sense_adjoint(kspace, mask, coils)
    image = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    norm = residual.abs().square().sum((1, 2), keepdim=True)
    for _ in range(iterations):
        moved = sense_normal(direction, mask, coils) + weight * direction
        step = norm / (direction.conj() * moved).real.sum((1, 2), keepdim=True).clamp(min=1e-20)
        image = image + step * direction
        residual = residual - step * moved
        new = residual.abs().square().sum((1, 2), keepdim=True)
        direction = residual + new / norm.clamp(min=1e-20) * direction
        norm = new
    return image
