"""Detection: a query at `<detect>` becomes a 3-D centre heatmap with size and offset channels (arXiv 1904.07850).

Shapes: B studies, S slices, h = H/4, w = W/4, 7 channels: heat, log size (slice, row, column), offset (same order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..grid import Grid
    from ..model.config import OmniMRIConfig

STRIDE = 4


class DetectHead(nn.Module):
    """Hidden state -> the weights of seven 1 x 1 filters over coarse pixel features."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.text_config.hidden_size)
        self.filters = nn.Linear(config.text_config.hidden_size, 7 * (config.stem_widths[1] + 1))

    def forward(self, hidden_BE: Tensor, coarse_NCHW: Tensor) -> Tensor:
        """(B, E) with (B S, C, h, w) -> (B, S, 7, h, w)."""
        b = len(hidden_BE)
        n, c, h, w = coarse_NCHW.shape
        filters = self.filters(self.norm(hidden_BE)).view(b, 7, c + 1)
        x = torch.einsum("boc,bscp->bsop", filters[..., :c] / c**0.5, coarse_NCHW.reshape(b, n // b, c, h * w))
        x = (x + filters[:, None, :, c:]).view(b, n // b, 7, h, w)
        return torch.cat([x[:, :, :1] - 4.6, x[:, :, 1:]], 2)


@dataclass(frozen=True)
class DetectTarget:
    """Centres as a heatmap, and size and offset at each centre."""

    heat: Tensor
    """(B, S, h, w), 1 at a centre, Gaussian around it."""
    centre: Tensor
    """(B, S, h, w) bool."""
    regression: Tensor
    """(B, S, 6, h, w): log mm sizes and offsets in lattice cells."""
    known: Tensor
    """(B,) bool: lesions are labelled."""


@dataclass(frozen=True)
class Box:
    """A box on the lattice."""

    centre: tuple[float, float, float]
    """Lattice coordinates: slice, row, column."""
    size_mm: tuple[float, float, float]
    score: float


class Detect:
    """The `<detect>` task."""

    name = "detect"
    token = "<detect>"

    def head(self, config: OmniMRIConfig) -> nn.Module:
        """The filter generator."""
        return DetectHead(config)

    def target(self, batch: dict[str, Tensor]) -> DetectTarget:
        """Boxes of the lesion instances in `batch["lesions"]`."""
        lesions, spacing = batch["lesions"], batch["spacing_mm"]
        b, s, height, width = lesions.shape
        h, w = height // STRIDE, width // STRIDE
        device = lesions.device
        heat = torch.zeros(b, s, h, w, device=device)
        centre = torch.zeros(b, s, h, w, dtype=torch.bool, device=device)
        regression = torch.zeros(b, s, 6, h, w, device=device)
        known = (lesions != 255).flatten(1).all(1)
        axes = [torch.arange(k, device=device, dtype=torch.float32) for k in (s, h, w)]
        for i in range(b):
            for rank in range(1, int(lesions[i].max()) + 1 if bool(known[i]) else 1):
                where = torch.nonzero(lesions[i] == rank).float()
                if len(where) == 0:
                    continue
                low, high = where.min(0).values, where.max(0).values
                middle = (low + high) / 2
                size = (high - low + 1) * spacing[i].to(device)
                cell = torch.stack([middle[0], (middle[1] + 0.5) / STRIDE - 0.5, (middle[2] + 0.5) / STRIDE - 0.5])
                z, y, x = (int(v.round().clamp(0, k - 1)) for v, k in zip(cell, (s, h, w), strict=True))
                radius = (size / spacing[i].to(device) / torch.tensor([1, STRIDE, STRIDE], device=device) / 6).clamp(
                    min=0.6
                )
                parts = [torch.exp(-0.5 * ((a - c) / r) ** 2) for a, c, r in zip(axes, (z, y, x), radius, strict=True)]
                heat[i] = torch.maximum(heat[i], parts[0][:, None, None] * parts[1][:, None] * parts[2])
                centre[i, z, y, x] = True
                regression[i, z, :3, y, x] = size.log()
                regression[i, z, 3:, y, x] = cell - torch.tensor([z, y, x], device=device)
        return DetectTarget(heat, centre, regression, known)

    def loss(self, predicted: Tensor, target: DetectTarget) -> dict[str, tuple[Tensor, Tensor]]:
        """Penalty-reduced focal loss on the heatmap, L1 on size and offset at the centres."""
        predicted = predicted.float()
        logit = predicted[:, :, 0]
        p = logit.sigmoid()
        positive = (1 - p) ** 2 * F.softplus(-logit) * target.centre
        negative = (1 - target.heat) ** 4 * p**2 * F.softplus(logit) * ~target.centre
        focal = ((positive + negative).flatten(1).sum(1) * target.known).sum()
        off = ((predicted[:, :, 1:] - target.regression).abs().sum(2) * target.centre).sum()
        number = target.centre.sum()
        return {"detect": (focal, number + target.known.sum()), "box": (off, number)}

    def read(self, predicted: Tensor, grid: Grid, *, threshold: float = 0.2, most: int = 50) -> list[Box]:
        """Peaks of (S, 7, h, w) predictions after 3-D non-maximum suppression, best first."""
        heat = predicted[:, 0].sigmoid()
        peak = F.max_pool3d(heat[None, None], (5, 3, 3), 1, (2, 1, 1))[0, 0] == heat
        where = torch.nonzero(peak & (heat > threshold))
        order = heat[tuple(where.T)].argsort(descending=True)[:most]
        boxes: list[Box] = []
        for z, y, x in where[order].tolist():
            values = predicted[z, :, y, x].float()
            cell = torch.tensor([z, y, x]) + values[4:].clamp(-1, 1)
            size = values[1:4].clamp(-1, 6).exp()
            lattice = (float(cell[0]), float((cell[1] + 0.5) * STRIDE - 0.5), float((cell[2] + 0.5) * STRIDE - 0.5))
            if all(_apart(lattice, b, grid) for b in boxes):
                boxes.append(Box(lattice, (float(size[0]), float(size[1]), float(size[2])), float(heat[z, y, x])))
        return boxes


def _apart(centre: tuple[float, float, float], box: Box, grid: Grid) -> bool:
    """Whether a centre lies outside a stronger box."""
    away = [
        abs(a - b) * mm - size / 2
        for a, b, mm, size in zip(centre, box.centre, grid.spacing_mm, box.size_mm, strict=True)
    ]
    return max(away) > 0
