"""Stage 3: captions, task tokens and heads; the whole model moves."""

from __future__ import annotations

from typing import Any

from data_recipes.mixture import Mixture
from omnimri.model.omnimri import OmniMRI

from .engine import Objective
from .grounded import DialogueSource, GroundedDialogue

LEARNING_RATE = {
    "vision.backbone.embeddings.mask_token": 0.0,
    "vision.*": 5e-4,
    "heads.contrast.*": 0.0,
    "projector.*": 1e-3,
    "language.*": 1e-3,
    "heads.pixels.*": 5e-3,
    "heads.segment.table": 5e-3,
    "heads.*": 1e-3,
}
DEFAULTS = {"steps": 2000, "batch_size": 2, "warmup": 100}
NEEDS_KSPACE = True


class Source(DialogueSource):
    """Mostly captions, some chats so that every wording has been heard."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI) -> None:
        super().__init__(mixture, tokenizer, model, report_share=0.5)


def build(model: OmniMRI, steps: int) -> Objective:
    """The objective of this stage."""
    return GroundedDialogue(model, dense_share=0.67)
