"""Acquisition: what a scanner makes of tissue signal - resolution, receive field, motion, ghosts, spikes, wrap, noise - and its raw data.

Shapes: K samples of a pixel, P planes, H rows, W columns, C coils.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.physics import fft2c, gaussian_coils, ifft2c, line_mask

from .recipe import pick, uniform


@dataclass(frozen=True)
class Quality:
    """How well a study was acquired; every number is drawn by `draw_quality`."""

    resolution: tuple[float, float]
    """Share of the spatial frequencies of rows and of columns that were acquired."""
    partial_fourier: float
    """Share of the phase-encoding lines that were acquired, from one side; the rest is filled with zeros."""
    phase_axis: int
    """1 rows, 2 columns."""
    taper: float
    """0 a sharp edge of k-space with Gibbs ringing, 1 a Hann window without."""
    noise: float
    """Standard deviation against the brightest brain tissue."""
    amplification: float
    """Of noise in the middle, by parallel imaging."""
    bias: float
    motion: tuple[tuple[float, float, float], ...] = ()
    """(share of the lines, mm along rows, mm along columns) of each pose."""
    ghost: float = 0.0
    spike: float = 0.0
    wrap: int = 0
    """Pixels that the field of view is too small by."""


def draw_quality(g: torch.Generator, *, technique: str, field_t: float, stripped: bool, size: int, variation: float) -> Quality:
    """Draw it; derived or stripped images have no wrap and little noise outside the head."""
    poor = technique in ("DWI", "ADC")
    low, high = (0.3, 0.65) if poor else (0.6, 1.0)
    first = uniform(g, low, high) if uniform(g, 0, 1) < 0.75 else 1.0
    second = first if uniform(g, 0, 1) < 0.5 else min(1.0, first * uniform(g, 0.8, 1.25))
    noise = math.exp(uniform(g, math.log(0.003), math.log(0.06))) * variation * (1.5 / field_t if field_t < 1.5 else 1.0)
    rare = 0.12 * variation
    motion: tuple[tuple[float, float, float], ...] = ()
    if uniform(g, 0, 1) < rare:
        number = pick(g, (2, 3, 5))
        shares = torch.rand(number, generator=g) + 0.1
        shifts = torch.randn(number, 2, generator=g) * uniform(g, 0.5, 2.0)
        motion = tuple((float(s / shares.sum()), float(a), float(b)) for s, (a, b) in zip(shares, shifts, strict=True))
    return Quality(
        resolution=(first, second),
        partial_fourier=uniform(g, 0.6, 0.9) if uniform(g, 0, 1) < 0.2 * variation else 1.0,
        phase_axis=pick(g, (1, 2)),
        taper=pick(g, (0.0, uniform(g, 0.2, 1.0)), (0.3, 0.7)),
        noise=noise,
        amplification=uniform(g, 1.2, 2.5) if uniform(g, 0, 1) < 0.4 * variation else 1.0,
        bias=uniform(g, 0.005, 0.25) * variation,
        motion=motion,
        ghost=uniform(g, 0.02, 0.12) if uniform(g, 0, 1) < (0.5 if poor else rare) * variation else 0.0,
        spike=uniform(g, 0.01, 0.06) if uniform(g, 0, 1) < rare / 3 else 0.0,
        wrap=round(size * uniform(g, 0.02, 0.12)) if not stripped and uniform(g, 0, 1) < rare / 2 else 0,
    )


def _kernel(weights: Tensor) -> Tensor:
    """(N, N) circulant matrix that weighs the N centred frequencies of a line."""
    line = torch.fft.ifft(torch.fft.ifftshift(weights))
    n = len(weights)
    index = torch.arange(n, device=weights.device)
    return line[(index[:, None] - index) % n]


def _window(n: int, share: float, taper: float) -> Tensor:
    """(N,) weights of centred frequencies: a plateau with a Hann edge over the share `taper` of it."""
    u = ((torch.arange(n) - n // 2) / (n / 2 * share)).abs()
    inside = (u <= 1 + 1e-6).float()
    return inside * (0.5 + 0.5 * torch.cos(math.pi * ((u - 1 + taper) / taper).clamp(0, 1))) if taper else inside


def blurred(images: Tensor, q: Quality, pixel_mm: float) -> Tensor:
    """(P, H, W) at the acquired frequencies: resolution, Gibbs ringing, partial Fourier and motion; magnitude."""
    device = images.device
    sizes = images.shape[1:]
    windows = [_window(n, r, q.taper) for n, r in zip(sizes, q.resolution, strict=True)]
    phase = q.phase_axis - 1
    n = sizes[phase]
    lines = windows[phase].clone()
    if q.partial_fourier < 1:
        lines[torch.arange(n) < round(n * (0.5 - q.resolution[phase] * (q.partial_fourier - 0.5)))] = 0
    frequency = (torch.arange(n) - n // 2) / n
    other = torch.ones(sizes[1 - phase]) * windows[1 - phase]
    side = (torch.arange(len(other)) - len(other) // 2) / len(other)
    view = images if phase == 0 else images.transpose(1, 2)
    if not q.motion and q.partial_fourier == 1:
        found = _kernel(lines).real.to(device) @ view @ _kernel(other).real.to(device).T
    else:
        real, imaginary = torch.zeros_like(view), torch.zeros_like(view)
        begin = 0.0
        for share, down, across in q.motion or ((1.0, 0.0, 0.0),):
            part = (torch.arange(n) >= begin * n) & (torch.arange(n) < (begin + share) * n + (begin + share > 0.999))
            begin += share
            along = down if phase == 0 else across
            turn = torch.polar(lines * part, -2 * math.pi * frequency * along / pixel_mm)
            shifted = view @ _kernel(torch.polar(other, -2 * math.pi * side * (down + across - along) / pixel_mm)).real.to(device).T
            a = _kernel(turn).to(device)
            real += a.real @ shifted
            imaginary += a.imag @ shifted
        found = torch.hypot(real, imaginary)
    return found if phase == 0 else found.transpose(1, 2)


def acquire(
    g: torch.Generator, codes: Tensor, mean: Tensor, texture: Tensor, q: Quality, *, pixel_mm: float, planes: Tensor, stripped: bool
) -> Tensor:
    """Tissue codes (K, P, H, W) -> magnitude images (P, H, W).

    A pixel's signal is the mean over its samples, so that partial volume comes from fractions of tissue.

    Args:
        mean: (NUM_CODES,) signal of tissues.
        texture: (NUM_CODES,) standard deviation of it within a tissue.
        planes: (P,) mm along the slice normal.
    """
    device = codes.device
    noise = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=g)))
    _, p, h, w = codes.shape
    mean, texture = mean.to(device), texture.to(device)
    x = torch.zeros(p, h, w, device=device)
    for sample in codes:
        x += mean.index_select(0, sample.int().view(-1)).view(p, h, w)
    x /= len(codes)
    coarse = torch.randn(p, 1, h // 4, w // 4, generator=noise).to(device)
    grain = F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)[:, 0]
    first = codes[0].int().view(-1)
    x += texture.index_select(0, first).view(p, h, w) * (grain + 0.7 * torch.randn(p, h, w, generator=noise).to(device))
    x = blurred(x.clamp_(min=0), q, pixel_mm)
    if q.wrap:
        field = x.shape[q.phase_axis] - q.wrap
        x.narrow(q.phase_axis, 0, q.wrap).add_(x.narrow(q.phase_axis, field, q.wrap))
        x.narrow(q.phase_axis, field, q.wrap).zero_()
    if q.ghost:
        x = x + q.ghost * torch.roll(x, round(x.shape[q.phase_axis] / pick(g, (2, 2, 3))), q.phase_axis)
    smooth = torch.randn(1, 4, 4, 4, generator=g).to(device) * q.bias
    place = (planes.to(device) - planes.min()) / (planes.max() - planes.min()).clamp(min=1) * 3
    weights = (1 - (place[:, None] - torch.arange(4, device=device)).abs()).clamp(min=0)
    bias = torch.einsum("pn,nhw->phw", weights, F.interpolate(smooth, size=(h, w), mode="bicubic", align_corners=True)[0])
    x = x * torch.exp(bias)
    if q.spike:
        v, u = (torch.arange(n, device=device) / n for n in (h, w))
        struck = int(torch.randint(p, (), generator=g))
        a, b = (uniform(g, -0.3, 0.3) * n for n in (h, w))
        x[struck] += q.spike * 2 * torch.cos(2 * math.pi * (a * v[:, None] + b * u + uniform(g, 0, 1)))
    sigma = q.noise * torch.ones((), device=device)
    if q.amplification > 1:
        v, u = (torch.linspace(-1, 1, n, device=device) for n in (h, w))
        sigma = q.noise * (1 + (q.amplification - 1) * torch.exp(-2 * (v[:, None] ** 2 + u**2)))
    both = torch.randn(2, p, h, w, generator=noise).to(device)
    noisy = torch.hypot(x + sigma * both[0], sigma * both[1])
    return torch.where(codes[0] > 0, noisy, 0.0) if stripped else noisy


@dataclass(frozen=True)
class ThickSlices:
    """Slices that run across the image: a study of thick slices, looked at in another plane than it was acquired in."""

    axis: int
    """1 rows, 2 columns."""
    gap_mm: float
    thickness_mm: float
    first_mm: float
    """Where the first of them lies, from the first pixel."""

    def read(self, count: int, pixel_mm: float) -> Tensor:
        """(count, count) weights: tissue averaged over every slice, and between slices what interpolation makes of them."""
        pixels = torch.arange(count) * pixel_mm
        slices = torch.arange(self.first_mm, float(pixels[-1]) + pixel_mm / 2, self.gap_mm)
        inside = ((self.thickness_mm / 2 - (pixels[None] - slices[:, None]).abs()) / pixel_mm + 0.5).clamp(0, 1)
        inside = inside / inside.sum(1, keepdim=True).clamp(min=1e-6)
        place = ((pixels - self.first_mm) / self.gap_mm).clamp(0, len(slices) - 1)
        between = (1 - (place[:, None] - torch.arange(len(slices))).abs()).clamp(min=0)
        return between @ inside

    def seen(self, images: Tensor, pixel_mm: float) -> Tensor:
        """(P, H, W) images as they look across their slices."""
        weights = self.read(images.shape[self.axis], pixel_mm).to(images.device)
        return weights @ images if self.axis == 1 else images @ weights.T

    def noisier(self, noise: float, pixel_mm: float) -> float:
        """Noise of a pixel before averaging over a slice lowers it, as far as a magnitude image bears it."""
        return max(noise, min(0.06, noise * math.sqrt(max(1.0, self.thickness_mm / pixel_mm))))


def draw_thick_slices(g: torch.Generator) -> ThickSlices:
    """Draw them."""
    gap = math.exp(uniform(g, math.log(2.0), math.log(7.5)))
    return ThickSlices(pick(g, (1, 2), (0.7, 0.3)), gap, gap * uniform(g, 0.7, 1.0), uniform(g, 0, gap))


def simulate_kspace(g: torch.Generator, image: Tensor, *, size: int, variation: float = 1.0) -> dict[str, Tensor]:
    """Undersampled multi-coil k-space of one slice (H, W).

    1 to 32 coils with smooth maps, object phase with an off-resonance ramp, noise correlated between coils; the readout is
    oversampled twice and cropped again as scanners do, lines follow a uniform or a variable-density mask, perhaps of one half of k-space.

    Returns:
        `kspace` and `coils` (C, size, size) complex64, `mask` (1, size) bool, `image` (size, size).
    """
    small = F.interpolate(image[None, None].cpu(), size=(size, size), mode="area")[0, 0].clamp(min=0)
    small = small / small.max().clamp(min=1e-6)
    phase = F.interpolate(torch.randn(1, 1, 3, 3, generator=g), size=(size, size), mode="bicubic", align_corners=True)[0, 0]
    ramp = torch.linspace(-1, 1, size) * uniform(g, -2, 2)
    number = pick(g, (1, 4, 6, 8, 16, 32), (0.05, 0.15, 0.15, 0.45, 0.18, 0.02))
    coils = gaussian_coils(number, size, size, g)
    object_c = torch.polar(small, phase * uniform(g, 0, 2) + ramp[:, None])[None] * coils
    mixing = torch.eye(number) + uniform(g, 0.0, 0.3) * torch.randn(number, number, generator=g) / number**0.5
    sigma = math.exp(uniform(g, math.log(0.001), math.log(0.035)))
    oversampled = uniform(g, 0, 1) < 0.7 * variation
    full = fft2c(F.pad(object_c, (0, 0, size // 2, size - size // 2)) if oversampled else object_c)
    noise = torch.complex(*torch.randn(2, *full.shape, generator=g))
    full = full + sigma * torch.einsum("ab,bhw->ahw", mixing.to(noise.dtype), noise)
    if oversampled:
        full = fft2c(ifft2c(full)[:, size // 2 : size // 2 + size])
    if uniform(g, 0, 1) < 0.7:
        acceleration = math.exp(uniform(g, math.log(2), math.log(12)))
        mask = line_mask(size, acceleration, g, min(uniform(g, 0.03, 0.16), uniform(g, 0.25, 0.6) / acceleration))
    else:
        every = pick(g, (2, 3, 4, 6, 8))
        centre = max(6, round(size * uniform(g, 0.04, 0.12)))
        mask = (torch.arange(size) + int(torch.randint(every, (), generator=g))) % every == 0
        mask[(size - centre) // 2 : (size - centre) // 2 + centre] = True
    if uniform(g, 0, 1) < 0.15 * variation:
        mask = mask & (torch.arange(size) >= round(size * uniform(g, 0.1, 0.4)))
    return {"kspace": full * mask, "coils": coils, "mask": mask[None], "image": small}
