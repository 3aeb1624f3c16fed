"""The language part: any causal LM of transformers, LoRA through peft; on a fetched base, new tokens have rows of their own.

Shapes: B batch, T tokens, E width, V tokens of the base, R new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import OmniMRIConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TokenRows(nn.Module):
    """The base's embedding, which never moves, and trainable rows for the tokens after it."""

    def __init__(self, base: nn.Embedding, num_rows: int) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(torch.randn(num_rows, base.embedding_dim) * 0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""
        known = self.base.num_embeddings
        if not len(self.rows):
            return self.base(ids_BT)
        new = self.rows[(ids_BT - known).clamp(min=0)]
        return torch.where((ids_BT >= known)[..., None], new, self.base(ids_BT.clamp(max=known - 1)))

    def logits(self, hidden_BTE: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, V + R): the same rows, read the other way round."""
        return torch.cat([hidden_BTE @ self.base.weight.T, hidden_BTE @ self.rows.T], -1)


class TiedHead(nn.Module):
    """An output layer that has no weights of its own."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self._rows = [rows]  # in a list: its parameters are registered once, in the embedding

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits."""
        return self._rows[0].logits(hidden)


def build_language(config: OmniMRIConfig) -> PreTrainedModel:
    """The language model of a configuration, with token rows on a base, and adapters where `lora_rank` asks for them."""
    language = AutoModelForCausalLM.from_config(config.text_config)
    if config.base:
        rows = TokenRows(language.get_input_embeddings(), config.num_token_rows)
        language.set_input_embeddings(rows)
        language.lm_head = TiedHead(rows)
        language._tied_weights_keys = language.all_tied_weights_keys = {}
    if config.lora_rank:
        inject_lora(language, config.lora_rank)
    return language


def load_base(language: Any, tensors: dict[str, Tensor]) -> None:
    """Put a base's weights into a language model of its form, under its adapters and token rows.

    Raises:
        ValueError: names or shapes differ.
    """
    own = {base_name(n): p for n, p in language.named_parameters() if is_base(n)}
    wrong = {n for n in own.keys() | tensors.keys() if n not in own or n not in tensors or own[n].shape != tensors[n].shape}
    if wrong:
        raise ValueError(f"expected base weights of this configuration, got others: {len(wrong)} tensors differ, such as {min(wrong)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(False)


def is_base(name: str) -> bool:
    """Whether a parameter of a language model on a base is the base's."""
    return "lora_" not in name and not name.endswith("embed_tokens.rows")


def base_name(name: str) -> str:
    """The name of a base's parameter before adapters and token rows were put around it."""
    return name.replace(".base_layer.", ".").replace("embed_tokens.base.", "embed_tokens.")


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
