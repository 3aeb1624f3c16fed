"""Signal equations, centred Fourier transforms, coil maps and undersampling masks; native complex tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
    """(coils, H, W) complex64 sensitivities: smooth lobes on a ring, no two arrays alike, with slow phase, unit root-sum-of-squares."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    turn, ring, reach = torch.rand(3, generator=generator).tolist()
    angle = 2 * torch.pi * (torch.arange(num_coils) + turn + 0.15 * torch.randn(num_coils, generator=generator)) / num_coils
    away = 0.95 + 0.5 * ring + 0.08 * torch.randn(num_coils, generator=generator)
    cy, cx = away * torch.sin(angle), away * torch.cos(angle)
    size = (0.4 + 1.4 * reach) * torch.exp(0.15 * torch.randn(num_coils, 1, 1, generator=generator))
    lobe = torch.exp(-((y[None] - cy[:, None, None]) ** 2 + (x[None] - cx[:, None, None]) ** 2) / size)
    waves = torch.stack([y, x, torch.ones_like(x), x * y, x * x, y * y])
    a = torch.pi * (torch.rand(num_coils, 6, generator=generator) * 2 - 1) * torch.tensor([1.0, 1, 1, 0.4, 0.4, 0.4])
    coils = torch.polar(lobe, torch.einsum("cw,whv->chv", a, waves))
    return coils / coils.abs().square().sum(0, keepdim=True).sqrt().clamp(min=1e-12)


def sense_adjoint(kspace: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
    """Coil-combined image (N, H, W) of measured k-space (N, c, H, W) under a mask (N, H or 1, W)."""
    return (ifft2c(kspace * mask[:, None]) * coils.conj()).sum(1)


def sampled(images: Tensor, mask: Tensor) -> Tensor:
    """What a mask (N, H or 1, W) leaves of coil images (N, c, H, W), as images; whole lines need one transform along W alone.

    The shifts of centred transforms are phases in k-space, which a mask leaves alone: only the mask is shifted.
    """
    axes = (-1,) if mask.shape[-2] == 1 else (-2, -1)
    keep = torch.fft.ifftshift(mask, dim=axes)[:, None]
    return torch.fft.ifftn(torch.fft.fftn(images, dim=axes) * keep, dim=axes)


def sense_normal(image: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
    """What measuring an image (N, H, W) and taking the adjoint gives."""
    return (sampled(image[:, None] * coils, mask) * coils.conj()).sum(1)


def cg_sense(kspace: Tensor, mask: Tensor, coils: Tensor, *, weight: float, iterations: int) -> Tensor:
    """CG-SENSE (Pruessmann et al., MRM 2001) with Tikhonov weight: image (N, H, W)."""
    return solve_sense(sense_adjoint(kspace, mask, coils), mask, coils, weight=weight, iterations=iterations)


@torch.no_grad()
def solve_sense(right: Tensor, mask: Tensor, coils: Tensor, *, weight: float, iterations: int) -> Tensor:
    """The conjugate gradients of CG-SENSE, from the adjoint of the data (N, H, W)."""
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


def calibration_size(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (N,) around the middle of masks (N, H or 1, W) that are sampled without a gap."""
    _, h, w = mask.shape
    across = _run(mask[:, h // 2])
    return (torch.full_like(across, 1 << 20) if h == 1 else _run(mask[:, :, w // 2])), across


def _run(line: Tensor) -> Tensor:
    """(N,) length of the sampled stretch around the middle of (N, L)."""
    middle = line.shape[-1] // 2
    below, above = line[:, :middle].flip(-1).long().cumprod(-1).sum(-1), line[:, middle:].long().cumprod(-1).sum(-1)
    return 2 * torch.minimum(below, above)


def calibration_images(kspace: Tensor, mask: Tensor, *, grid: int = 32, most: int = 24) -> Tensor:
    """Low-resolution coil images (N, c, grid, grid) of the middle of k-space (N, c, H, W) that is sampled without a gap.

    Their pixels lie as those of the full image made smaller, corners at corners.
    """
    *_, h, w = kspace.shape
    axes = []
    for size, run in zip((h, w), calibration_size(mask), strict=True):
        u = (torch.arange(grid, device=kspace.device) - grid // 2)[None]
        half = run.clamp(2, min(most, size))[:, None] / 2
        taper = torch.where(u.abs() <= half, 0.5 + 0.5 * torch.cos(torch.pi * u / (half + 1)), 0.0)
        # Sample 0 of a centred transform lies at pixel 0; that of a smaller image at the middle of its larger pixel.
        axes.append(torch.polar(taper, 2 * torch.pi * u * (0.5 / grid - 0.5 / size)))
    crop = kspace.new_zeros(*kspace.shape[:2], grid, grid)
    rows, columns = min(h, grid), min(w, grid)
    (a, b), (c, d) = ((grid // 2 - n // 2, size // 2 - n // 2) for n, size in ((rows, h), (columns, w)))
    crop[..., a : a + rows, c : c + columns] = kspace[..., b : b + rows, d : d + columns]
    return ifft2c(crop * axes[0][:, None, :, None] * axes[1][:, None, None, :])


def fit_coils(image: Tensor, coils: Tensor, seen: Tensor, mask: Tensor, *, iterations: int = 2, grid: int = 24) -> tuple[Tensor, Tensor]:
    """Sensitivities moved toward what the data say of an image (N, H, W): smooth corrections, a `grid` of them a side, by
    gradient steps over the image's own energy (joint estimation in the spirit of JSENSE; Ying and Sheng, MRM 2007).

    Args:
        seen: (N, c, H, W) the data as images: the inverse transform of what was measured.

    Returns:
        The sensitivities, and what they leave unexplained of `seen`.
    """
    energy = torch.nn.functional.adaptive_avg_pool2d(image.abs().square()[:, None], grid)
    energy = (energy + 1e-3 * image.abs().square().flatten(1).amax(1).view(-1, 1, 1, 1)).clamp(min=1e-30)
    for _ in range(iterations):
        pull = image.conj()[:, None] * (seen - sampled(image[:, None] * coils, mask))
        parts = [torch.nn.functional.adaptive_avg_pool2d(p, grid) for p in (pull.real, pull.imag)]
        coils = coils + resize_complex(torch.complex(*parts) / energy, image.shape[-2:])
    return coils, seen - sampled(image[:, None] * coils, mask)


@lru_cache(maxsize=32)
def _bicubic(size: int, large: int) -> Tensor:
    """(large, size): what `interpolate` does along one axis, as a matrix."""
    return torch.nn.functional.interpolate(torch.eye(size)[None, None], size=(large, size), mode="bicubic", align_corners=False)[0, 0]


def resize_complex(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, c, h, w) complex -> (N, c, *size) by bicubic interpolation of both parts.

    Two small products of matrices take a twentieth of the time of `interpolate`.
    """
    down, across = (_bicubic(n, large).to(x) for n, large in zip(x.shape[-2:], size, strict=True))
    return down @ x @ across.T


def unit_coils(coils: Tensor) -> Tensor:
    """Maps (N, c, H, W) with root-sum-of-squares 1."""
    return coils / coils.abs().square().sum(1, keepdim=True).sqrt().clamp(min=1e-8)


def estimate_coils(kspace: Tensor, mask: Tensor) -> Tensor:
    """Sensitivities (N, c, H, W) of k-space from its fully sampled middle: low-resolution images over their
    root-sum-of-squares (McKenzie et al., MRM 2002).
    """
    low = calibration_images(kspace, mask)
    return unit_coils(resize_complex(unit_coils(low), kspace.shape[-2:]))
