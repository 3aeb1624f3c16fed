"""OmniMRIConfig and the presets."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class OmniMRIConfig(PreTrainedConfig):
    """Configuration of the four parts.

    Args:
        vision_config: Any ViT of transformers; its `image_size` and `patch_size` set the lattice.
        text_config: Any causal LM of transformers.
        shuffle: Patches merged along each side into one language token.
        max_slices: Most slices the language model sees.
        pixel_width: Channels of a pixel feature, and of a mask query.
        stem_widths: Channels of the pixel decoder at strides 2, 4, 8, 16 and 32.
        extra_blocks: Residual blocks more at each of these strides; none where empty.
        num_cascades: Unrolled data-consistency steps of the reconstruction.
        cascade_width: Channels of a cascade's regulariser.
        lora_rank: Rank of the LoRA adapters on the language model; 0 for none.
        token_ids: Ids of this project's added tokens.
        base: `name` and `sha256` of the base language model whose weights stay outside the checkpoint (`omnimri.weights`); none where
            the checkpoint is whole.
        num_token_rows: Tokens after the base's own.
    """

    model_type = "omnimri"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        shuffle: int = 3,
        max_slices: int = 8,
        pixel_width: int = 32,
        stem_widths: tuple[int, ...] = (32, 64, 96, 128, 128),
        extra_blocks: tuple[int, ...] = (),
        num_cascades: int = 6,
        cascade_width: int = 48,
        lora_rank: int = 0,
        token_ids: dict[str, int] | None = None,
        base: dict[str, str] | None = None,
        num_token_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config or {"model_type": "dinov2_with_registers"})
        self.text_config = _sub_config(text_config or {"model_type": "llama"})
        self.shuffle = shuffle
        self.max_slices = max_slices
        self.pixel_width = pixel_width
        self.stem_widths = list(stem_widths)
        self.extra_blocks = list(extra_blocks)
        self.num_cascades = num_cascades
        self.cascade_width = cascade_width
        self.lora_rank = lora_rank
        self.token_ids = dict(token_ids or {})
        self.base = dict(base or {})
        self.num_token_rows = num_token_rows
        super().__init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Rows and columns of the lattice."""
        return int(self.vision_config.image_size)

    @property
    def tokens_per_slice(self) -> int:
        """Language tokens a slice becomes."""
        return (self.image_size // self.vision_config.patch_size // self.shuffle) ** 2


def _sub_config(config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def preset(name: str, *, vocab_size: int, image_size: int | None = None) -> OmniMRIConfig:
    """The configuration of a preset: one dial from `tiny` (CPU, from scratch) to `large` (GPUs, hub backbones' sizes).

    Raises:
        ValueError: no such preset.
    """
    sizes: dict[str, dict[str, Any]] = {
        "tiny": {"vision": (192, 6, 3, 16, 192), "text": (256, 4, 4, 704), "max_slices": 8},
        "small": {"vision": (384, 12, 6, 14, 224), "text": (576, 30, 9, 1536), "max_slices": 32},
        "base": {"vision": (768, 12, 12, 14, 224), "text": (960, 32, 15, 2560), "max_slices": 32},
        "large": {"vision": (1024, 24, 16, 14, 448), "text": (2048, 24, 32, 8192), "max_slices": 32},
    }
    if name not in sizes:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(sizes)}")
    chosen = sizes[name]
    width, depth, heads, patch, native = chosen["vision"]
    text_width, text_depth, text_heads, mlp = chosen["text"]
    side = (image_size or native) // patch
    return OmniMRIConfig(
        vision_config={
            "model_type": "dinov2_with_registers",
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": side * patch,
            "drop_path_rate": 0.0,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "num_hidden_layers": text_depth,
            "num_attention_heads": text_heads,
            "num_key_value_heads": text_heads,
            "intermediate_size": mlp,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "initializer_range": 0.02 if name != "tiny" else 0.04,
        },
        shuffle=next(f for f in range(1, side + 1) if side % f == 0 and side // f <= 4),
        max_slices=chosen["max_slices"],
    )
