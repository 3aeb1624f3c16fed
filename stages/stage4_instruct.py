"""Stage 4: conversations; the language model moves through LoRA (peft) and its token rows."""

from __future__ import annotations

from omnimri.model.omnimri import OmniMRI

from .engine import Objective
from .grounded import DialogueSource, GroundedDialogue

LEARNING_RATE = {
    "language.*lora_*": 2e-3,
    "language.model.embed_tokens.*": 5e-4,
    "projector.*": 3e-4,
    "heads.contrast.*": 0.0,
    "heads.sequence.*": 4e-3,
    "heads.*": 5e-4,
}
DEFAULTS = {"steps": 500, "batch_size": 2}
NEEDS_KSPACE = True
LORA_RANK = 16


Source = DialogueSource


def build(model: OmniMRI, steps: int, *, mask_share: float = 0.15, word_share: float = 0.5, image_share: float = 0.1,
          tellings: int = 1) -> Objective:
    """The objective of this stage; adapters are added to the language model."""
    model.add_lora(LORA_RANK)
    return GroundedDialogue(model, mask_share=mask_share, word_share=word_share, image_share=image_share, tellings=tellings)
