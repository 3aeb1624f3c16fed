"""What a run keeps on disk: weights, the objective's own state, the optimizer's, and the step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from omnimri.checkpoint import load_weights, save_model
from omnimri.digests import publish

from .updates import Updates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .engine import FitConfig, Objective


def optimizer_of(config: FitConfig, world: int) -> dict[str, Any]:
    """What the optimizer's state fits: only sharded state depends on the number of processes."""
    return {"optimizer": config.optimizer, "zero_stage": config.zero_stage} | ({"processes": world} if config.zero_stage else {})


def optimizer_file(updates: Updates, rank: int) -> str:
    """Its file in a checkpoint: one for each process where the state is sharded."""
    return f"optimizer-{rank}.safetensors" if updates.sharded else "optimizer.safetensors"


def save(
    accelerator: Any,
    out: Path,
    step: int,
    objective: Objective,
    updates: Updates,
    tokenizer: PreTrainedTokenizerBase,
    config: FitConfig,
    provenance: Mapping[str, Any],
) -> None:
    """Write a checkpoint beside and move it into place; drop all but the newest `keep`."""
    folder = out / "checkpoints"
    partial = folder / f".step-{step:06d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if updates.sharded or accelerator.is_main_process:
        save_file(updates.state(), partial / optimizer_file(updates, accelerator.process_index))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    told = {**provenance, "steps": step, "seed": config.seed}
    save_model(objective.model, tokenizer, partial, provenance=told)
    rest = {k: v.contiguous().clone() for k, v in objective.state_dict().items() if not k.startswith("model.")}
    save_file(rest or {"none": torch.zeros(1)}, partial / "objective.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "optimizer": optimizer_of(config, accelerator.num_processes)}))
    publish(partial, folder / f"step-{step:06d}")
    for old in sorted(folder.glob("step-*"))[: -config.keep]:
        shutil.rmtree(old)


def restore(folder: Path, objective: Objective) -> int:
    """Bring weights and the objective's own state back; the step to go on from."""
    load_weights(objective.model, folder)
    rest = load_file(folder / "objective.safetensors")
    rest.pop("none", None)
    own = {k for k in objective.state_dict() if not k.startswith("model.")}
    if own != set(rest):
        raise ValueError(f"checkpoint {folder} is of another objective: it differs in {sorted(own ^ set(rest))[:4]}")
    objective.load_state_dict(rest, strict=False)
    return int(json.loads((folder / "state.json").read_text())["step"])
