"""A model directory: config.json, model.safetensors, tokenizer/, provenance.json, digests.json; no pickle."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .digests import DIGESTS, damage, sha256

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .model.omnimri import OmniMRI

EMBEDDED = Path(__file__).parent / "embedded"
"""The checkpoint that travels in the package."""


def newest_good(run: Path) -> Path | None:
    """The newest undamaged `checkpoints/step-*` of a run; damaged ones are passed over with a warning."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        wrong = damage(folder)
        if wrong is None:
            return folder
        warnings.warn(f"checkpoint {folder.name} is not used: {wrong}; falling back to the one before", stacklevel=2)
    return None


def resolve(folder: str | Path) -> Path:
    """A model directory from a model directory or a run directory.

    Raises:
        ValueError: there is no model in it.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    found = newest_good(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"expected a checkpoint (config.json, model.safetensors) in {folder}, found none")
    return found


def save_model(
    model: OmniMRI,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, configuration, tokenizer and provenance into an existing folder; a base's weights stay where they are.

    Args:
        state: Weights to write in place of the model's own (for a narrower data type).
    """
    if state is None and model.config.base:
        state = model.state_dict()
    if state is not None:
        state = {k: v for k, v in state.items() if not model.is_base(k)}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder / "tokenizer")
    if provenance is not None:
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(resolve(folder) / "tokenizer"), local_files_only=True)


ATTENTION = tuple((f"attention.attention.{a}.", f"attention.{b}_proj.") for a, b in (("query", "q"), ("key", "k"), ("value", "v")))
RENAMED = (*ATTENTION, ("attention.output.dense.", "attention.o_proj."))
"""Names of an encoder's attention before and after transformers 5.23."""


def own_name(name: str, own: Mapping[str, Tensor]) -> str:
    """The name by which this version of transformers knows a weight of another."""
    for pair in RENAMED:
        for old, new in (pair, pair[::-1]):
            if name not in own and (other := name.replace(old, new)) in own:
                return other
    return name


def load_weights(model: OmniMRI, folder: str | Path) -> tuple[list[str], list[str], list[str]]:
    """Hand weights over by name, where shapes agree.

    Returns:
        Names loaded, names of the model that stay new, names of the file that are unused.

    Raises:
        ValueError: no weight matches.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(resolve(folder).glob("*.safetensors")):
        if path.name.startswith("model"):
            tensors.update(load_file(path))
    own = model.state_dict()
    # A language model with adapters keeps its base weights one level deeper.
    deeper = {n.replace(".base_layer.", "."): n for n in own if ".base_layer." in n}
    named = {own_name(n if n in own else deeper.get(n, n), own): t for n, t in tensors.items()}
    fits = {n: t for n, t in named.items() if n in own and own[n].shape == t.shape}
    if not fits:
        raise ValueError(f"expected weights of this model in {folder}, got {len(tensors)} tensors of which none matches")
    model.load_state_dict({n: t.to(own[n].dtype) for n, t in fits.items()}, strict=False)
    settled = set(model._tied_weights_keys or {})
    # Running statistics start as identity: a checkpoint from before they existed is whole without them.
    settled |= {n for n in own if n.endswith(("running_mean", "running_var", "num_batches_tracked")) or model.is_base(n)}
    return sorted(fits), sorted(set(own) - set(fits) - settled), sorted(set(named) - set(fits))


def load_model(folder: str | Path, *, device: str = "cpu") -> tuple[OmniMRI, PreTrainedTokenizerBase, str]:
    """The model of a checkpoint in evaluation mode (float32), its tokenizer, and the SHA-256 of its weights.

    Raises:
        ValueError: the folder holds no model, is damaged, or its weights do not belong to its configuration.
    """
    from .model.config import OmniMRIConfig
    from .model.omnimri import OmniMRI

    found = resolve(folder)
    if (found / DIGESTS).exists() and (wrong := damage(found)):
        raise ValueError(f"checkpoint {found} cannot be used: {wrong}; fetch or train it again")
    try:
        config = OmniMRIConfig.from_pretrained(str(found), local_files_only=True)
    except (OSError, ValueError) as error:  # its text is many lines long
        raise ValueError(f"checkpoint {found} cannot be used: config.json cannot be read ({type(error).__name__}); "
                         "fetch or train it again") from None
    model = OmniMRI(config)
    if config.base:
        from .weights import find_base

        model.load_base(find_base(config.base))
    _, new, _ = load_weights(model, found)
    if new:
        raise ValueError(f"checkpoint {found} lacks {len(new)} weights of its own configuration, such as {new[0]}")
    digest = hashlib.sha256("".join(sha256(p) for p in sorted(found.glob("model*.safetensors"))).encode()).hexdigest()
    return model.float().eval().to(device), load_tokenizer(found), digest
