"""The pixel decoder: a light convolutional stem, the ViT's patch features, and mixing along depth.

Works at strides 2 to 32 and lifts with pixel-shuffle. Shapes: N = B * S slices, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import OmniMRIConfig

DEPTH_AT, PATCHES_AT = 2, 3
"""Levels (strides 8 and 16) where slices of a study mix and where the ViT's features join."""


@dataclass(frozen=True)
class Pixels:
    """What the decoder hands to the heads."""

    fine: Tensor
    """(N, 4 C, H/2, W/2): four pixel features a cell; `phase` k is rows k // 2, columns k % 2 of each 2 x 2 block."""
    coarse: Tensor
    """(N, stem_widths[1], H/4, W/4)"""

    def phase(self, k: int) -> Tensor:
        """(N, C, H/2, W/2): the features of every second pixel, offset (k // 2, k % 2)."""
        n, c4, h, w = self.fine.shape
        return self.fine.view(n, c4 // 4, 4, h, w)[:, :, k]

    def full(self) -> Tensor:
        """(N, C, H, W)"""
        return F.pixel_shuffle(self.fine, 2)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(8, outside), nn.GELU()
    )


class Residual(nn.Module):
    """Two convolutions beside the identity, which they start as: half as many steps to the same Dice as a plain stack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.GroupNorm(8, width)
        nn.init.zeros_(norm.weight)
        self.branch = nn.Sequential(_block(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), norm)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Same shape."""
        return x_NCHW + self.branch(x_NCHW)


class DepthMixing(nn.Module):
    """Blend each slice's features with its neighbours', weighted by their distance in mm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(width, width, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    reach_mm = 4.0

    def forward(self, x_NCHW: Tensor, positions_mm: Tensor) -> Tensor:
        """(B S, C, H, W) features, (B, S) positions -> same shape."""
        b, s = positions_mm.shape
        near = torch.exp(-0.5 * ((positions_mm[:, :, None] - positions_mm[:, None]) / self.reach_mm) ** 2)
        near = (near / near.sum(-1, keepdim=True)).to(x_NCHW.dtype)
        mixed = torch.einsum("bst,btn->bsn", near, x_NCHW.reshape(b, s, -1)).view_as(x_NCHW)
        return x_NCHW + self.out(mixed)


class PixelDecoder(nn.Module):
    """Images and patch features -> pixel features: down to stride 32, up again with the ViT's features joining at 16."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        widths = config.stem_widths
        if len(widths) < PATCHES_AT + 2:
            raise ValueError(f"expected stem_widths at {PATCHES_AT + 2} strides, got {len(widths)}: a model of another version?")
        if config.image_size % 2 ** len(widths):
            raise ValueError(f"expected an image size that is a multiple of {2 ** len(widths)}, got {config.image_size}")
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b, 2), _block(b, b)) for a, b in zip([3, *widths], widths, strict=False)
        )
        self.lift = nn.ModuleList(nn.Conv2d(b, a * 4, 1) for a, b in pairwise(widths))
        self.mix = nn.ModuleList(Residual(a) for a in widths[:-1])
        extra = config.extra_blocks or [0] * len(widths)
        if len(extra) != len(widths):
            raise ValueError(f"expected extra_blocks at {len(widths)} strides or none, got {len(extra)}")
        self.extra = nn.ModuleList(nn.Sequential(*(Residual(a) for _ in range(n))) for a, n in zip(widths, extra, strict=True))
        # LayerNorm, not GroupNorm: torch 2.13's channels-last GroupNorm backward crashes on inputs without gradient.
        size = config.vision_config.hidden_size
        self.patches = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, widths[PATCHES_AT]))
        self.depth = DepthMixing(widths[DEPTH_AT])
        self.fine = nn.Conv2d(widths[0], config.pixel_width * 4, 1)

    def forward(self, images_NCHW: Tensor, patches_NPD: Tensor, positions_mm: Tensor) -> Pixels:
        """(N, 3, H, W), (N, P, D), (B, S) with N = B S -> Pixels."""
        levels, x = self.below(images_NCHW, patches_NPD)
        return self.above(levels, self.depth(x, positions_mm))

    def below(self, images_NCHW: Tensor, patches_NPD: Tensor) -> tuple[list[Tensor], Tensor]:
        """Every slice by itself until `depth` mixes slices: the levels above that wait, and what is to be mixed."""
        n, p, _ = patches_NPD.shape
        side = round(p**0.5)
        x = images_NCHW.contiguous(memory_format=torch.channels_last)
        levels = []
        for down in self.down:
            x = down(x)
            levels.append(x)
        x = self.extra[-1](x)
        for k in reversed(range(DEPTH_AT, len(self.mix))):
            x = self.extra[k + 1](self.mix[k + 1](x)) if k + 1 < len(self.mix) else x
            x = levels[k] + F.pixel_shuffle(self.lift[k](x), 2)
            if k == PATCHES_AT:
                patches = self.patches(patches_NPD).transpose(1, 2).reshape(n, -1, side, side)
                if patches.shape[-2:] != x.shape[-2:]:
                    patches = F.interpolate(patches, size=x.shape[-2:], mode="bilinear", align_corners=False)
                x = x + patches
        return levels[:DEPTH_AT], x

    def above(self, levels: list[Tensor], mixed_NCHW: Tensor) -> Pixels:
        """Up to stride 2, every slice by itself again."""
        x = coarse = self.extra[DEPTH_AT](self.mix[DEPTH_AT](mixed_NCHW))
        for k in reversed(range(DEPTH_AT)):
            x = self.extra[k](self.mix[k](levels[k] + F.pixel_shuffle(self.lift[k](x), 2)))
            if k == 1:
                coarse = x
        return Pixels(fine=self.fine(x), coarse=coarse)
