"""Reconstruction: an unrolled network with data consistency, modulated by the hidden state at `<reconstruct>`.

Shapes: N slices, c coils, h x w the acquisition matrix (any size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..physics import fft2c, ifft2c

if TYPE_CHECKING:
    from ..model.config import OmniMRIConfig


class Regulariser(nn.Module):
    """A small residual network on real and imaginary parts, its features scaled and shifted by the query."""

    def __init__(self, width: int, query: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.third = nn.Conv2d(width, width, 3, padding=4, dilation=4)
        self.last = nn.Conv2d(width, 2, 3, padding=1)
        self.film = nn.Linear(query, 2 * width)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_N2HW: Tensor, query_NE: Tensor) -> Tensor:
        """(N, 2, h, w), (N, E) -> (N, 2, h, w)."""
        scale, shift = self.film(query_NE)[:, :, None, None].chunk(2, 1)
        y = F.silu(self.first(x_N2HW)) * (1 + scale) + shift
        y = y + F.silu(self.second(y))
        y = y + F.silu(self.third(y))
        return self.last(y)


class ReconstructHead(nn.Module):
    """Cascades of gradient step and regulariser; a last data-consistency step makes full sampling exact."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.text_config.hidden_size)
        self.cascades = nn.ModuleList(
            Regulariser(config.cascade_width, config.text_config.hidden_size) for _ in range(config.num_cascades)
        )
        self.steps = nn.Parameter(torch.ones(config.num_cascades))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, hidden_NE: Tensor, kspace: Tensor, mask: Tensor, coils: Tensor) -> Tensor:
        """(N, E), (N, c, h, w) complex, (N, h or 1, w) bool, (N, c, h, w) complex -> (N, h, w) complex image."""
        query = self.norm(hidden_NE.float())
        keep = mask[:, None].to(kspace.real.dtype)
        image = (ifft2c(kspace * keep) * coils.conj()).sum(1)
        scale = image.abs().flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
        image, measured = image / scale, kspace / scale[:, None]

        def residual(x: Tensor) -> Tensor:
            return (ifft2c(keep * (fft2c(x[:, None] * coils) - measured)) * coils.conj()).sum(1)

        for step, regulariser in zip(self.steps, self.cascades, strict=True):
            image = image - step * residual(image)
            real = torch.view_as_real(image).permute(0, 3, 1, 2)
            image = image - torch.view_as_complex(regulariser(real, query).permute(0, 2, 3, 1).contiguous())
        return (image - residual(image)) * scale


@dataclass(frozen=True)
class ReconstructTarget:
    """The fully sampled magnitude."""

    image: Tensor
    """(N, h, w)"""


class Reconstruct:
    """The `<reconstruct>` task."""

    name = "reconstruct"
    token = "<reconstruct>"

    def head(self, config: OmniMRIConfig) -> nn.Module:
        """The unrolled network."""
        return ReconstructHead(config)

    def target(self, batch: dict[str, Tensor]) -> ReconstructTarget:
        """The reference image of each record."""
        return ReconstructTarget(batch["kspace_image"])

    def loss(self, predicted: Tensor, target: ReconstructTarget) -> dict[str, tuple[Tensor, Tensor]]:
        """L1 between magnitudes, relative to the mean of the truth."""
        level = target.image.flatten(1).mean(1).clamp(min=1e-6)
        off = (predicted.abs() - target.image).abs().flatten(1).mean(1) / level
        return {"reconstruct": (off.sum(), torch.tensor(float(len(off)), device=off.device))}

    def read(self, predicted: Tensor) -> Tensor:
        """(S, h, w) complex -> (W, H, S) float32 magnitude in the order of `KSpace.affine`."""
        return predicted.abs().permute(2, 1, 0).contiguous().float()
