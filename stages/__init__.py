"""The four stages: what each learns and what it freezes is its learning-rate table."""

from __future__ import annotations

STAGES: dict[str, str] = {
    "vision": "stages.stage1_vision",
    "align": "stages.stage2_align",
    "pretrain": "stages.stage3_pretrain",
    "instruct": "stages.stage4_instruct",
}
"""Name of a stage -> the module that defines LEARNING_RATE, DEFAULTS, Source and build(model, steps)."""
