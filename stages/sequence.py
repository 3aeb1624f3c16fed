"""The words for the sequence, read off the image: what stages 2 to 4 learn for `omnimri.examination.infer_sequence`."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimri.conversation import IGNORE
from omnimri.model.omnimri import OmniMRI
from omnimri.tasks import Report


def sequence_loss(model: OmniMRI, batch: dict[str, Tensor], visual_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the next-token loss of the sequence's words, with which the standing exchange of every study begins.

    Args:
        visual_BTE: Language tokens of the image, (B, tokens, E).
    """
    learnt = torch.nonzero((batch["query_labels"] != IGNORE).any(0))
    if not len(learnt):
        return visual_BTE.sum() * 0, torch.zeros((), device=visual_BTE.device)
    ids, labels, mask = (batch[k][:, : int(learnt.max()) + 1] for k in ("query_ids", "query_labels", "query_mask"))
    told = model(input_ids=ids, attention_mask=mask, visual=visual_BTE)
    return Report().loss(told.logits, labels)["text"]
