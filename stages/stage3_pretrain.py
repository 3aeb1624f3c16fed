"""Stage 3: captions, task tokens and heads; the whole model moves."""

from __future__ import annotations

from omnimri.model.omnimri import OmniMRI

from .engine import Objective
from .grounded import DialogueSource, GroundedDialogue

LEARNING_RATE = {
    "vision.backbone.embeddings.mask_token": 0.0,
    "vision.*": 5e-4,
    "heads.contrast.*": 0.0,
    "projector.*": 1e-3,
    "language.*": 1.5e-3,
    "heads.pixels.*": 5e-3,
    "heads.segment.table": 5e-3,
    "heads.segment.query.*": 3e-3,
    "heads.sequence.*": 4e-3,
    "heads.*": 1e-3,
}
DEFAULTS = {"steps": 2000, "batch_size": 2, "warmup": 100}
NEEDS_KSPACE = True


Source = DialogueSource


def build(model: OmniMRI, steps: int, *, mask_share: float = 0.45, word_share: float = 0.3, image_share: float = 0.1,
          tellings: int = 1) -> Objective:
    """The objective of this stage."""
    return GroundedDialogue(model, mask_share=mask_share, word_share=word_share, image_share=image_share, tellings=tellings)
