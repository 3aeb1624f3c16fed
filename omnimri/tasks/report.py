"""Report: `<report>` asks for text; findings in it carry their own `<segment>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        """Next-token cross-entropy of (B, T, V) logits."""
        learnt = target[:, 1:] != IGNORE
        ce = F.cross_entropy(predicted[:, :-1][learnt].float(), target[:, 1:][learnt], reduction="sum")
        return {"text": (ce, learnt.sum())}

    def read(self, predicted: str) -> str:
        """The text without task tokens that only choose a head."""
        return predicted.replace("<report>", "").replace("<detect>", "").replace("<reconstruct>", "").strip()
