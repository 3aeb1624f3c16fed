"""Report: `<report>` asks for text; findings in it carry their own `<segment>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversation import IGNORE

if TYPE_CHECKING:
    from ..model.config import OmniMRIConfig


class Report:
    """The `<report>` task: language modelling of answers."""

    name = "report"
    token = "<report>"

    def head(self, config: OmniMRIConfig) -> nn.Module | None:
        """None: the answer is text."""
        return None

    def target(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T) next-token labels, IGNORE where nothing is learnt."""
        return batch["text_labels"]

    def loss(self, predicted: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Next-token cross-entropy of (B, T, V) logits; every answer counts by the root of its length, so that reports do not
        drown the short answers, and its first token, which chooses the task, counts in full.
        """
        learnt = target != IGNORE
        starts = learnt & ~F.pad(learnt[:, :-1], (1, 0))
        answer = starts.long().cumsum(1) * learnt
        length = torch.zeros_like(answer, dtype=torch.float32).scatter_add_(1, answer, torch.ones_like(answer, dtype=torch.float32))
        weight = length.gather(1, answer).rsqrt().masked_fill(starts, 1.0)[:, 1:][learnt[:, 1:]]
        ce = F.cross_entropy(predicted[:, :-1][learnt[:, 1:]].float(), target[:, 1:][learnt[:, 1:]], reduction="none")
        return {"text": ((ce * weight).sum(), weight.sum())}

    def read(self, predicted: str) -> str:
        """The text without task tokens that only choose a head."""
        return predicted.replace("<report>", "").replace("<detect>", "").replace("<reconstruct>", "").strip()
