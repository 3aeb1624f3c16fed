"""The language part: any causal LM of transformers, LoRA through peft."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import OmniMRIConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_language(config: OmniMRIConfig) -> PreTrainedModel:
    """The language model of a configuration, with adapters where `lora_rank` asks for them."""
    language = AutoModelForCausalLM.from_config(config.text_config)
    if config.lora_rank:
        inject_lora(language, config.lora_rank)
    return language


def inject_lora(language: PreTrainedModel, rank: int) -> None:
    """Put LoRA adapters on every linear layer of the blocks (Hu et al., arXiv 2106.09685); they start as identity."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0), language
    )


def merge_lora(language: PreTrainedModel) -> None:
    """Fold the adapters into the base weights and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(language.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(language.get_submodule(parent), child, module.get_base_layer())
    if hasattr(language, "peft_config"):
        del language.peft_config
