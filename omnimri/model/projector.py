"""The projector: pixel-shuffle to fewer tokens, then an MLP to the language width."""

from __future__ import annotations

from torch import Tensor, nn

from .config import OmniMRIConfig


class Projector(nn.Module):
    """Merge `shuffle` x `shuffle` patches into one token of the language model."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        merged = config.vision_config.hidden_size * config.shuffle**2
        width = config.text_config.hidden_size
        self.shuffle = config.shuffle
        self.norm = nn.LayerNorm(merged)
        self.up = nn.Linear(merged, width)
        self.out = nn.Linear(width, width)
        self.act = nn.GELU()

    def forward(self, patches_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, P / shuffle^2, E)."""
        n, p, d = patches_NPD.shape
        side, f = round(p**0.5), self.shuffle
        grid = patches_NPD.view(n, side // f, f, side // f, f, d).permute(0, 1, 3, 2, 4, 5)
        return self.out(self.act(self.up(self.norm(grid.reshape(n, (side // f) ** 2, f * f * d)))))
