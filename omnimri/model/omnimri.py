"""OmniMRI: one model of four parts.

Shapes: B studies, S slices, T tokens, E language width, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..anatomy import NAMES, SEQUENCES
from ..measure import PROFILE_SIZE
from ..tasks import TASKS
from .config import OmniMRIConfig
from .language import build_language, inject_lora, is_base, load_base, merge_lora
from .pixel_decoder import PixelDecoder, Pixels
from .projector import Projector, as_words
from .vision import VisionEncoder

EVIDENCE_FEATURES = 6
"""Presence, log volume, and the mask's middle (slice, row, column) and spread, all relative to the study."""


class EvidenceEncoder(nn.Module):
    """What a mask shows -> one language token: pooled pixel features, presence and place."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.kind = nn.Embedding(len(NAMES) + 2, width)
        self.up = nn.Linear(config.pixel_width + EVIDENCE_FEATURES, width)
        self.out = nn.Linear(width, width)
        self.size = config.text_config.initializer_range

    def forward(self, pooled_BNC: Tensor, kind_BN: Tensor) -> Tensor:
        """(B, N, C + 6), (B, N) -> (B, N, E)."""
        return as_words(self.out(torch.nn.functional.gelu(self.up(pooled_BNC) + self.kind(kind_BN))), self.size)


class SequenceHead(nn.Module):
    """How bright masks are (`measure.signal_profile`) -> which sequence it is: a few small networks, whose probabilities are averaged,
    because one of them hangs too much on how it began.
    """

    def __init__(self, width: int = 128, members: int = 4) -> None:
        super().__init__()
        sizes = (PROFILE_SIZE, width, width // 2)
        hidden = [[part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU(), nn.Dropout(0.2))] for _ in range(members)]
        self.members = nn.ModuleList(nn.Sequential(*parts, nn.Linear(sizes[-1], len(SEQUENCES))) for parts in hidden)

    def forward(self, profile_BP: Tensor) -> Tensor:
        """(B, PROFILE_SIZE) -> logits (B, len(SEQUENCES))."""
        return torch.stack([member(profile_BP).float().log_softmax(1) for member in self.members]).logsumexp(0)


class ContrastHead(nn.Module):
    """Both sides of the contrast in one space, with the sigmoid loss's temperature and bias (arXiv 2303.15343).

    What all studies share is taken off first: averaged states differ little from study to study.
    """

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.image_norm, self.image = nn.BatchNorm1d(width, affine=False), nn.Linear(width, width)
        self.text_norm, self.text = nn.BatchNorm1d(width, affine=False), nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor([2.7]))
        self.bias = nn.Parameter(torch.tensor([-3.5]))


class OmniMRI(PreTrainedModel, GenerationMixin):
    """Vision encoder, projector, language model and heads in one Hugging Face model."""

    config_class = OmniMRIConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys = {"language.lm_head.weight": "language.model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True
    heads: Any
    """nn.ModuleDict: `pixels`, `evidence`, `contrast`, `sequence`, and one for each task that has a head."""
    scope_mean: Tensor
    scope_whiten: Tensor
    scope_limit: Tensor

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__(config)
        self.vision = VisionEncoder(config)
        self.projector = Projector(config)
        self.language = build_language(config)
        self.heads = nn.ModuleDict(
            {"pixels": PixelDecoder(config), "evidence": EvidenceEncoder(config), "contrast": ContrastHead(config)}
        )
        for name, task in TASKS.items():
            head = task.head(config)
            if head is not None:
                self.heads[name] = head
        self.heads["sequence"] = SequenceHead()
        width = config.vision_config.hidden_size
        self.register_buffer("scope_mean", torch.zeros(width))
        self.register_buffer("scope_whiten", torch.zeros(width, width))
        self.register_buffer("scope_limit", torch.zeros(()))
        self.token_ids: dict[str, int] = config.token_ids
        if config.base:
            self._tied_weights_keys = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves: sub-models through their own classes, heads by torch's defaults."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding."""
        return self.language.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer."""
        return self.language.get_output_embeddings()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save with the keys of `state_dict()`, never with a hub format's."""
        return super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    # --- seeing -----------------------------------------------------------------------------------------------

    def encode(self, images_BSCHW: Tensor, positions_mm_BS: Tensor, plane_B: Tensor) -> Tensor:
        """(B, S, 3, H, W), (B, S), (B,) -> patch features (B S, P, D)."""
        s = images_BSCHW.shape[1]
        return self.vision(images_BSCHW.flatten(0, 1), positions_mm_BS.flatten(), plane_B.repeat_interleave(s))

    def look(self, patches_NPD: Tensor, chosen_BL: Tensor) -> Tensor:
        """Patch features (B S, P, D) of all slices and the slices chosen for language -> (B, L x tokens, E)."""
        b = len(chosen_BL)
        every = patches_NPD.view(b, -1, *patches_NPD.shape[1:])
        picked = every[torch.arange(b, device=chosen_BL.device)[:, None], chosen_BL]
        return self.projector(picked.flatten(0, 1)).reshape(b, -1, self.config.text_config.hidden_size)

    def pixels(self, images_BSCHW: Tensor, patches_NPD: Tensor, positions_mm_BS: Tensor) -> Pixels:
        """Pixel features of every slice."""
        return self.heads["pixels"](images_BSCHW.flatten(0, 1), patches_NPD, positions_mm_BS)

    def evidence(self, pooled_BNC: Tensor, kind_BN: Tensor) -> Tensor:
        """Evidence tokens from pooled mask features and the class of each."""
        return self.heads["evidence"](pooled_BNC, kind_BN)

    # --- speaking ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, visual: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        """Token embeddings with image and evidence placeholders replaced, in order.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        embeds = self.get_input_embeddings()(input_ids)
        for name, features in (("<image>", visual), ("<evidence>", evidence)):
            slots = input_ids == self.token_ids[name]
            if features is None:
                continue
            counts = slots.sum(1, keepdim=True)
            valid = torch.arange(features.shape[1], device=features.device)[None] < counts
            if int(valid.sum()) != int(slots.sum()):
                raise ValueError(f"expected {int(slots.sum())} features for {name} placeholders, got {int(valid.sum())}")
            embeds = embeds.masked_scatter(slots[..., None].expand_as(embeds), features[valid].to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        visual: Tensor | None = None,
        evidence: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the language part over (B, T) ids whose placeholders stand for `visual` and `evidence` tokens.

        Returns:
            logits (B, T or kept, V), the cache, and in `hidden_states` one tensor: the last layer's (B, T, E).
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, visual, evidence)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        out = self.language.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        hidden = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.language.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            total, count = TASKS["report"].loss(logits, labels)["text"]
            loss = total / count.clamp(min=1)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=(hidden,)
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, visual: Any = None, evidence: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand image and evidence tokens to the first step only; later steps have them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs.update(visual=visual, evidence=evidence)
        return inputs

    def hidden_at(self, ids: Tensor, hidden: Tensor, token: str) -> tuple[Tensor, Tensor]:
        """Hidden states at every occurrence of `token`: ((n,) batch index, (n, E))."""
        where = torch.nonzero(ids == self.token_ids[token])
        return where[:, 0], hidden[where[:, 0], where[:, 1]]

    # --- the base ---------------------------------------------------------------------------------------------

    def is_base(self, name: str) -> bool:
        """Whether a parameter is the base's: it never moves and is in no checkpoint."""
        return bool(self.config.base) and name.startswith("language.") and is_base(name)

    def load_base(self, folder: Path) -> None:
        """Put a base's weights in (`omnimri.weights.find_base`).

        Raises:
            ValueError: they do not fit.
        """
        load_base(self.language, load_file(folder / "model.safetensors"))

    # --- adapters ---------------------------------------------------------------------------------------------

    def add_lora(self, rank: int) -> None:
        """Put LoRA adapters on the language model, unless it has them."""
        if not self.config.lora_rank:
            inject_lora(self.language, rank)
            self.config.lora_rank = rank

    def merge_lora(self) -> None:
        """Fold the adapters into the weights."""
        if self.config.lora_rank:
            merge_lora(self.language)
            self.config.lora_rank = 0


AutoConfig.register("omnimri", OmniMRIConfig)
AutoModel.register(OmniMRIConfig, OmniMRI)
AutoModelForCausalLM.register(OmniMRIConfig, OmniMRI)
