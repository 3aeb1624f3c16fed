"""Stage 2: image-text contrast by pairwise sigmoid (arXiv 2303.15343); the text side is the language model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_recipes.mixture import Mixture
from omnimri.example import Example, collate, prepare
from omnimri.model.omnimri import OmniMRI

from .engine import Objective, Term

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
        return {k: batch[k] for k in ("images", "positions_mm", "plane", "chosen", "caption_ids", "caption_mask", "facts")}


class Contrast(Objective):
    """Every image against every caption of the batch; captions with equal facts are positives."""

    def __init__(self, model: OmniMRI) -> None:
        super().__init__()
        self.model = model

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and of captions, (B, E) each."""
        return image_vector(self.model, batch), text_vector(self.model, batch["caption_ids"], batch["caption_mask"])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Mean over images of the summed pair losses."""
        image, text = self.embed(batch)
        head = self.model.heads["contrast"]
        logits = image @ text.T * head.log_scale.exp() + head.bias
        same = batch["facts"][:, None] == batch["facts"][None]
        loss = F.softplus(torch.where(same, -logits, logits)).sum()
        return {"contrast": Term(loss, torch.tensor(float(len(image)), device=loss.device))}

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Retrieval of a caption with the image's facts, and its chance."""
        image, text = self.embed(batch)
        same = batch["facts"][:, None] == batch["facts"][None]
        hit = same[torch.arange(len(image)), (image @ text.T).argmax(1)]
        count = torch.tensor(float(len(image)), device=image.device)
        return {"retrieval": Term(hit.float().sum(), count), "chance": Term(same.float().mean(1).sum(), count)}


def image_vector(model: OmniMRI, batch: dict[str, Tensor]) -> Tensor:
    """(B, E) unit vectors of studies through vision and projector."""
    patches = model.encode(batch["images"], batch["positions_mm"], batch["plane"])
    seen = model.look(patches, batch["chosen"])
    head = model.heads["contrast"]
    return F.normalize(head.image(head.image_norm(seen.mean(1))).float(), dim=-1)


def text_vector(model: OmniMRI, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, E) unit vectors of texts: the language model's states, averaged."""
    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).hidden_states[0]
    weight = mask[..., None].to(out.dtype)
    head = model.heads["contrast"]
    return F.normalize(head.text(head.text_norm((out * weight).sum(1) / weight.sum(1))).float(), dim=-1)


def build(model: OmniMRI, steps: int) -> Objective:
    """The objective of this stage."""
    return Contrast(model)
