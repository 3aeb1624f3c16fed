"""Stage 2: image-text contrast by pairwise sigmoid (arXiv 2303.15343), and the first words about an image, as in CoCa
(arXiv 2205.01917); the text side is the language model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_recipes.mixture import Mixture
from omnimri.example import Example, collate, prepare
from omnimri.model.omnimri import OmniMRI

from .engine import Objective, Term
from .sequence import sequence_loss

LEARNING_RATE = {
    "vision.backbone.embeddings.mask_token": 0.0,
    "vision.*": 2e-4,
    "projector.*": 1e-3,
    "language.*": 1e-3,
    "heads.contrast.*": 3e-3,
}
DEFAULTS = {"steps": 300, "batch_size": 16}
NEEDS_KSPACE = False


class Source:
    """Studies with their captions."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI) -> None:
        self.mixture, self.tokenizer = mixture, tokenizer
        self.sizes = {"max_slices": model.config.max_slices, "tokens_per_slice": model.config.tokens_per_slice}

    def example(self, index: int) -> Example:
        """The record's images and its caption."""
        return prepare(self.mixture.record(index), (), self.tokenizer, **self.sizes)

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Only what contrast reads."""
        batch = collate(examples, pad_id=self.tokenizer.pad_token_id)
        return {k: batch[k] for k in ("images", "positions_mm", "plane", "chosen", "caption_ids", "caption_mask", "facts",
                                      "query_ids", "query_mask", "query_labels")}


class Contrast(Objective):
    """Every image against every caption of the batch; captions with equal facts are positives. And the sequence in words."""

    def __init__(self, model: OmniMRI) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Mean over images of the summed pair losses; next tokens of the sequence's words."""
        visual = look(self.model, batch)
        image, text = pooled(self.model, visual), text_vector(self.model, batch["caption_ids"], batch["caption_mask"])
        head = self.model.heads["contrast"]
        logits = image @ text.T * head.log_scale.exp() + head.bias
        same = batch["facts"][:, None] == batch["facts"][None]
        loss = F.softplus(torch.where(same, -logits, logits)).sum()
        total, words = sequence_loss(self.model, batch, visual)
        return {"contrast": Term(loss, torch.tensor(float(len(image)), device=loss.device)), "sequence": Term(total, words.float())}

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Retrieval of a caption with the image's facts, and its chance."""
        image, text = image_vector(self.model, batch), text_vector(self.model, batch["caption_ids"], batch["caption_mask"])
        same = batch["facts"][:, None] == batch["facts"][None]
        hit = same[torch.arange(len(image)), (image @ text.T).argmax(1)]
        count = torch.tensor(float(len(image)), device=image.device)
        return {"retrieval": Term(hit.float().sum(), count), "chance": Term(same.float().mean(1).sum(), count)}


def look(model: OmniMRI, batch: dict[str, Tensor]) -> Tensor:
    """(B, tokens, E) language tokens of studies through vision and projector."""
    return model.look(model.encode(batch["images"], batch["positions_mm"], batch["plane"]), batch["chosen"])


def pooled(model: OmniMRI, visual_BTE: Tensor) -> Tensor:
    """(B, E) unit vectors of studies from their language tokens."""
    head = model.heads["contrast"]
    return F.normalize(head.image(head.image_norm(visual_BTE.mean(1))).float(), dim=-1)


def image_vector(model: OmniMRI, batch: dict[str, Tensor]) -> Tensor:
    """(B, E) unit vectors of studies."""
    return pooled(model, look(model, batch))


def text_vector(model: OmniMRI, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, E) unit vectors of texts: the language model's states, averaged."""
    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).hidden_states[0]
    weight = mask[..., None].to(out.dtype)
    head = model.heads["contrast"]
    return F.normalize(head.text(head.text_norm((out * weight).sum(1) / weight.sum(1))).float(), dim=-1)


def build(model: OmniMRI, steps: int) -> Objective:
    """The objective of this stage."""
    return Contrast(model)
