"""Reconstruction: an unrolled network with data consistency. `<reconstruct>` calls it; nothing of the words reaches it.

Shapes: N slices, c coils, h x w the acquisition matrix (any size), K channels at half resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..physics import calibration_images, calibration_size, ifft2c, resize_complex, sense_adjoint, sense_normal, solve_sense, unit_coils

if TYPE_CHECKING:
    from ..model.config import OmniMRIConfig

DILATIONS = (1, 2, 4, 8, 1)
START_WEIGHT, START_ITERATIONS = 0.01, 6
"""Conjugate gradients before the first cascade."""


def _channels(*images: Tensor) -> Tensor:
    """(N, h, w) complex images as real and imaginary channels."""
    return torch.cat([torch.view_as_real(x).permute(0, 3, 1, 2) for x in images], 1)


def _complex(x_N2HW: Tensor) -> Tensor:
    return torch.view_as_complex(x_N2HW.float().permute(0, 2, 3, 1).contiguous())


def _compressed(x: Tensor) -> Tensor:
    """The inverse hyperbolic sine; torch's own takes thirty times as long on CPUs."""
    x = x.float()
    return torch.sign(x) * torch.log(x.abs() + (x * x + 1).sqrt())


class CoilRefiner(nn.Module):
    """Sensitivities from the fully sampled middle of k-space: their quotient with the root-sum-of-squares, corrected by a small
    network on a coarse grid, coil by coil (in the spirit of Sriram et al., MICCAI 2020).
    """

    grid, most, width = 32, 24, 32

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(7, self.width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(self.width, self.width, 3, padding=d, dilation=d) for d in (2, 4, 2))
        self.last = nn.Conv2d(self.width, 2, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """(N, c, h, w) complex, (N, h or 1, w) bool -> (N, c, h, w) complex, root-sum-of-squares 1."""
        n, c = kspace.shape[:2]
        low = calibration_images(kspace, mask, grid=self.grid, most=self.most)
        energy = low.abs().square().sum(1, keepdim=True).sqrt()
        low = low / energy.flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
        energy, coils = low.abs().square().sum(1, keepdim=True).sqrt(), unit_coils(low)
        sizes = [(s.clamp(max=self.most) / self.most).view(n, 1, 1, 1).expand_as(energy) for s in calibration_size(mask)]
        own = _channels(low.flatten(0, 1), coils.flatten(0, 1))
        shared = torch.cat([energy, *sizes], 1).repeat_interleave(c, 0)
        y = F.silu(self.first(torch.cat([own, shared], 1).contiguous(memory_format=torch.channels_last)))
        for layer in self.middle:
            y = y + F.silu(layer(y))
        there = (low.abs().amax((2, 3), keepdim=True) > 0).to(low.real.dtype)
        coils = unit_coils(coils + _complex(self.last(y)).view_as(coils) * there)
        return unit_coils(resize_complex(coils, kspace.shape[-2:]))


class Regulariser(nn.Module):
    """A residual network at half resolution on the image and the data's pull on it; features are carried from cascade to cascade."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.last = nn.Conv2d(width, 8, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_N4HW: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, 4, h, w), features of the cascade before -> change (N, 2, h, w), features (N, K, h/2, w/2)."""
        y = F.silu(self.first(F.pixel_unshuffle(x_N4HW, 2).contiguous(memory_format=torch.channels_last)))
        if carried is not None:
            y = y + carried
        for layer in self.layers:
            y = y + F.silu(layer(y))
        return F.pixel_shuffle(self.last(y), 2), y


@dataclass(frozen=True)
class Reconstructed:
    """What the head gives."""

    image: Tensor
    """(N, h, w) complex."""
    spread: Tensor
    """(N, h, w) expected absolute error of the magnitude."""
    coils: Tensor
    """(N, c, h, w) complex: the sensitivities that were used."""
    zero_filled: Tensor
    """(N, h, w) complex: what the samples give with them."""


class ReconstructHead(nn.Module):
    """CG-SENSE, then cascades of gradient step and regulariser. What is fully sampled returns exactly.

    No step forces the data upon the last image: that would put their noise back.
    """

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        width = config.cascade_width
        self.coils = CoilRefiner()
        self.cascades = nn.ModuleList(Regulariser(width) for _ in range(config.num_cascades))
        self.steps = nn.Parameter(torch.ones(config.num_cascades))
        self.spread = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, kspace: Tensor, mask: Tensor, coils: Tensor | None = None) -> Reconstructed:
        """(N, c, h, w) complex, (N, h or 1, w) bool, sensitivities where they are known -> image, spread, sensitivities."""
        keep = mask.to(kspace.real.dtype)
        fast = torch.autocast(kspace.device.type, torch.bfloat16, enabled=fast_bf16(kspace.device))
        estimated = coils is None
        if coils is None:
            with fast:
                coils = self.coils(kspace, mask)
        else:
            coils = without_phase(coils, kspace, mask)
        measured = sense_adjoint(kspace, keep, coils)
        image = solve_sense(measured, keep, coils, weight=START_WEIGHT, iterations=START_ITERATIONS)
        scale = image.abs().flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
        image, pull = image / scale, measured / scale
        h, w = image.shape[1:]
        features: Tensor | None = None
        for step, regulariser in zip(self.steps, self.cascades, strict=True):
            off = sense_normal(image, keep, coils) - pull
            seen = F.pad(_channels(image, off), (0, w % 2, 0, h % 2), mode="replicate")
            with fast:
                change, features = regulariser(seen, features)
            image = image - step * off - _complex(change[..., :h, :w])
        with fast:
            assert features is not None
            spread = F.pixel_shuffle(self.spread(_compressed(features.detach())), 2)[:, 0, :h, :w]
        complete = mask.all(-1).all(-1)[:, None, None]
        if bool(complete.any()) and estimated:  # what no sensitivities can spoil: the root-sum-of-squares
            measured = torch.polar(ifft2c(kspace).abs().square().sum(1).sqrt(), measured.angle())
        return Reconstructed(
            image=torch.where(complete, measured, image * scale),
            # Between e^-8 and e^-1 of the brightest: what lies far from the training data must not run away.
            spread=torch.where(complete, 0.0, torch.exp(7 * torch.sigmoid(spread.float()) - 8) * scale),
            coils=coils,
            zero_filled=measured,
        )


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices by hardware of its own."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def without_phase(coils: Tensor, kspace: Tensor, mask: Tensor) -> Tensor:
    """Sensitivities turned so that the image they give is nearly real, as those that are estimated are."""
    low = calibration_images(kspace, mask)
    seen = (resize_complex(low, kspace.shape[-2:]) * coils.conj()).sum(1, keepdim=True)
    return coils * seen / seen.abs().clamp(min=1e-12)


@dataclass(frozen=True)
class ReconstructTarget:
    """What was measured."""

    image: Tensor
    """(N, h, w) magnitude without noise."""
    coils: Tensor
    """(N, c, h, w) complex: the true sensitivities, each pixel up to a phase common to all coils."""


class Reconstruct:
    """The `<reconstruct>` task."""

    name = "reconstruct"
    token = "<reconstruct>"

    def head(self, config: OmniMRIConfig) -> nn.Module:
        """The unrolled network."""
        return ReconstructHead(config)

    def target(self, batch: dict[str, Tensor]) -> ReconstructTarget:
        """The reference image and coils of each record."""
        return ReconstructTarget(batch["kspace_image"], batch["coils"])

    def loss(self, predicted: Reconstructed, target: ReconstructTarget) -> dict[str, tuple[Tensor, Tensor]]:
        """Errors of the magnitude (L1, RMS, 1 - SSIM), of its spread (Laplace likelihood, which moves the spread alone), and of what
        the sensitivities cannot span of the true coil images.
        """
        truth, magnitude = target.image, predicted.image.abs()
        level = truth.flatten(1).mean(1).clamp(min=1e-6)
        off = (magnitude - truth).abs()
        energy = truth.square().flatten(1).mean(1).clamp(min=1e-12)
        rms = (off.square().flatten(1).mean(1) / energy + 1e-8).sqrt()
        image = off.flatten(1).mean(1) / level + rms + 1 - ssim(magnitude, truth)
        spread = predicted.spread.clamp(min=1e-6)
        likelihood = off.detach() / spread + (spread / level[:, None, None]).log()
        seen = target.coils * truth[:, None]
        spanned = predicted.coils * (predicted.coils.conj() * seen).sum(1, keepdim=True)
        missed = (seen - spanned).abs().square().sum(1).flatten(1).mean(1)
        count = torch.tensor(float(len(off)), device=off.device)
        return {
            "reconstruct": (image.sum(), count),
            "spread": (likelihood.flatten(1).mean(1).sum(), count),
            "coils": ((missed / energy + 1e-8).sqrt().sum(), count),
        }

    def read(self, predicted: Tensor) -> Tensor:
        """(S, h, w) magnitude -> (W, H, S) float32 in the order of `KSpace.affine`."""
        return predicted.permute(2, 1, 0).contiguous().float()


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """(N,) mean structural similarity of (N, h, w), the range is the largest value of `b` (Wang et al., 2004)."""
    top = b.flatten(1).amax(1).clamp(min=1e-6)[:, None, None]
    mean = lambda x: F.avg_pool2d(x[:, None], window, 1)[:, 0]  # noqa: E731
    share = window**2 / (window**2 - 1)
    ma, mb = mean(a), mean(b)
    va, vb, both = (share * (mean(x * y) - mx * my) for x, y, mx, my in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    return (((2 * ma * mb + c1) * (2 * both + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).flatten(1).mean(1)
