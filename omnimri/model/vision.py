"""The vision part: a ViT over slices, with plane and slice position added to its patch features.

Shapes: B studies, S slices, P patches of a slice, D vision width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import AutoModel

from .config import OmniMRIConfig


class VisionEncoder(nn.Module):
    """A ViT of transformers (DINOv2 with registers by default) and the place of each slice."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size
        self.backbone = AutoModel.from_config(config.vision_config)
        self.num_prefix = 1 + getattr(config.vision_config, "num_register_tokens", 0)
        self.plane = nn.Embedding(3, width)
        self.position = nn.Linear(16, width)

    def forward(self, images_NCHW: Tensor, positions_mm: Tensor, plane: Tensor) -> Tensor:
        """(N, 3, H, W), (N,), (N,) -> patch features (N, P, D)."""
        patches_NPD = self.backbone(images_NCHW).last_hidden_state[:, self.num_prefix :]
        place_ND = self.position(sinusoids(positions_mm)) + self.plane(plane)
        return patches_NPD + place_ND[:, None]


def sinusoids(position_mm: Tensor) -> Tensor:
    """(N,) mm -> (N, 16): sines and cosines with periods from 20 to 640 mm, half octaves apart."""
    period = 20 * 2 ** torch.linspace(0, 5, 8, device=position_mm.device)
    phase = 2 * math.pi * position_mm[:, None] / period
    return torch.cat([phase.sin(), phase.cos()], -1)
