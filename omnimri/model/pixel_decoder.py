"""The pixel decoder: a light convolutional stem, the ViT's patch features, and mixing along depth.

Works at strides 2 to 8 and lifts with pixel-shuffle. Shapes: N = B * S slices, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import OmniMRIConfig


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
    """Images and patch features -> pixel features."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        c2, c4, c8 = config.stem_widths
        d = config.vision_config.hidden_size
        self.stem2 = nn.Sequential(_block(3, c2, 2), _block(c2, c2))
        self.stem4 = nn.Sequential(_block(c2, c4, 2), _block(c4, c4))
        self.stem8 = nn.Sequential(_block(c4, c8, 2), _block(c8, c8))
        # LayerNorm, not GroupNorm: torch 2.13's channels-last GroupNorm backward crashes on inputs without gradient.
        self.patches = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, c8 * 4))
        self.depth = DepthMixing(c8)
        self.mix8 = nn.Sequential(_block(c8, c8), _block(c8, c8))
        self.lift4 = nn.Conv2d(c8, c4 * 4, 1)
        self.mix4 = nn.Sequential(_block(c4, c4), _block(c4, c4))
        self.lift2 = nn.Conv2d(c4, c2 * 4, 1)
        self.mix2 = _block(c2, c2)
        self.fine = nn.Conv2d(c2, config.pixel_width * 4, 1)

    def forward(self, images_NCHW: Tensor, patches_NPD: Tensor, positions_mm: Tensor) -> Pixels:
        """(N, 3, H, W), (N, P, D), (B, S) with N = B S -> Pixels."""
        n, p, _ = patches_NPD.shape
        side = round(p**0.5)
        images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        x2 = self.stem2(images_NCHW)
        x4 = self.stem4(x2)
        x8 = self.stem8(x4)
        lifted = F.pixel_shuffle(self.patches(patches_NPD).transpose(1, 2).reshape(n, -1, side, side), 2)
        if lifted.shape[-2:] != x8.shape[-2:]:
            lifted = F.interpolate(lifted, size=x8.shape[-2:], mode="bilinear", align_corners=False)
        x8 = self.mix8(self.depth(x8 + lifted, positions_mm))
        x4 = self.mix4(x4 + F.pixel_shuffle(self.lift4(x8), 2))
        x2 = self.mix2(x2 + F.pixel_shuffle(self.lift2(x4), 2))
        return Pixels(fine=self.fine(x2), coarse=x4)
