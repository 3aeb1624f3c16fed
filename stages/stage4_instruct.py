"""Stage 4: conversations; the language model moves through LoRA (peft) and its token rows."""

from __future__ import annotations

from typing import Any

from data_recipes.mixture import Mixture
from omnimri.model.omnimri import OmniMRI

from .engine import Objective
from .grounded import DialogueSource, GroundedDialogue

LEARNING_RATE = {
    "language.*lora_*": 1e-3,
    "language.model.embed_tokens.weight": 3e-4,
    "projector.*": 3e-4,
    "heads.contrast.*": 0.0,
    "heads.*": 5e-4,
}
DEFAULTS = {"steps": 500, "batch_size": 2}
NEEDS_KSPACE = True
LORA_RANK = 16


class Source(DialogueSource):
    """Mostly chats."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI) -> None:
        super().__init__(mixture, tokenizer, model, report_share=0.2)


def build(model: OmniMRI, steps: int) -> Objective:
    """The objective of this stage; adapters are added to the language model."""
    model.add_lora(LORA_RANK)
    return GroundedDialogue(model, dense_share=0.3)
