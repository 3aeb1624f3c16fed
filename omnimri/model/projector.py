"""The projector: pixel-shuffle to fewer tokens, then an MLP to the language width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

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
        self.size = config.text_config.initializer_range

    def forward(self, patches_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, P / shuffle^2, E)."""
        n, p, d = patches_NPD.shape
        side, f = round(p**0.5), self.shuffle
        grid = patches_NPD.view(n, side // f, f, side // f, f, d).permute(0, 1, 3, 2, 4, 5)
        return as_words(self.out(self.act(self.up(self.norm(grid.reshape(n, (side // f) ** 2, f * f * d))))), self.size)


def as_words(tokens_E: Tensor, size: float) -> Tensor:
    """Give tokens the size at which word embeddings start. What a language model normalises has no size of its own: left
    free it grows by the thousandfold in training, until no layer can change such a token any more.
    """
    return F.layer_norm(tokens_E, tokens_E.shape[-1:]) * size
