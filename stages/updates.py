"""How gradients become new weights: on accelerate with all state in every process, or on DeepSpeed with it sharded.

Both hand their state out as named tensors, so that checkpoints need no pickle.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine import FitConfig, Objective

CLIP_NORM = 1.0
MOST_OVERFLOWS = 10
"""Steps in a row whose gradient may overflow."""


class Updates(Protocol):
    """A wrapped objective and its optimizer."""

    module: Any
    """Call it for the forward pass."""
    groups: list[dict[str, Any]]
    """Parameter groups, for the learning rate."""
    sharded: bool
    """Whether `state` holds only this process's part."""

    def window(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients meet between processes in the last of a step."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients."""
        ...

    def step(self) -> None:
        """Clip, update, forget the gradients."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state by name."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring a state back."""
        ...


def build_optimizer(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    """AdamW of torch, or the 8-bit AdamW of bitsandbytes (a quarter of the state's memory).

    Raises:
        ValueError: no such optimizer.
    """
    betas = (0.9, 0.95 if config.steps < 5000 else 0.99)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=0.0, betas=betas)
    raise ValueError(f"unknown optimizer {config.optimizer!r}; expected adamw or adamw8bit")


class Whole(Updates):
    """Every process holds all state (DDP where there are several)."""

    sharded = False

    def __init__(self, accelerator: Any, objective: Objective, groups: list[dict[str, Any]], config: FitConfig) -> None:
        self.accelerator, self.objective, self.config = accelerator, objective, config
        self.optimizer = build_optimizer(groups, config)
        self.module, self.prepared = accelerator.prepare(objective, self.optimizer)
        self.groups = self.prepared.param_groups
        self.overflows = 0

    def window(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients meet in the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Through the mixed precision of accelerate."""
        self.accelerator.backward(loss)

    def step(self) -> None:
        """Clip, update, forget."""
        # A gradient that overflowed says nothing; every rank sees the same norm.
        if bool(torch.isfinite(self.accelerator.clip_grad_norm_(self.module.parameters(), CLIP_NORM))):
            self.overflows = 0
            self.prepared.step()
        else:
            self.overflows += 1
            warnings.warn("a gradient overflowed: its step changes nothing", stacklevel=2)
            if self.overflows > MOST_OVERFLOWS:
                raise FloatingPointError(f"gradients overflowed in {self.overflows} steps in a row; lower the learning rate")
        self.prepared.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`parameter|key` of every parameter."""
        names = {id(p): n for n, p in self.objective.named_parameters()}
        return {
            f"{names[id(p)]}|{key}": torch.as_tensor(value).detach().clone().contiguous()
            for group in self.groups for p in group["params"] for key, value in self.optimizer.state.get(p, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring a state back."""
        parameters = dict(self.objective.named_parameters())
        for name, value in state.items():
            parameter, _, key = name.rpartition("|")
            owner = parameters[parameter]
            plain = key == "step" and self.config.optimizer == "adamw8bit"  # bitsandbytes counts on the host, fused AdamW does not
            self.optimizer.state[owner][key] = int(value) if plain else value.to(owner.device)


class Sharded(Updates):
    """DeepSpeed ZeRO: optimizer state (stage 1) and gradients (stage 2) are spread over the processes."""

    sharded = True

    def __init__(self, accelerator: Any, objective: Objective, groups: list[dict[str, Any]], config: FitConfig) -> None:
        import deepspeed

        if config.zero_stage not in (1, 2):
            raise ValueError(f"expected zero_stage 0, 1 or 2, got {config.zero_stage}")
        if config.optimizer != "adamw":
            raise ValueError(f"expected optimizer adamw with zero_stage {config.zero_stage}, got {config.optimizer}")
        self.module, self.zero, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(groups, config),
            config={
                "train_micro_batch_size_per_gpu": config.batch_size,
                "gradient_accumulation_steps": config.accumulate,
                "gradient_clipping": CLIP_NORM,
                "zero_optimization": {"stage": config.zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
                "steps_per_print": 10**9,
            },
        )
        self.groups = self.zero.param_groups

    def window(self, last: bool) -> AbstractContextManager[Any]:
        """DeepSpeed holds gradients back itself."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients meet at the boundary that `last` marks."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """DeepSpeed clips, updates and forgets."""
        self.module.step()

    def _parts(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def state(self) -> dict[str, Tensor]:
        """`group|key` of this process's part of each group, its weights among them."""
        found = {}
        for i, part in enumerate(self._parts()):
            found[f"{i}|weights"] = part.detach().clone()
            found |= {f"{i}|{k}": torch.as_tensor(v).detach().clone() for k, v in self.zero.optimizer.state[part].items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Bring this process's part back."""
        for i, part in enumerate(self._parts()):
            part.data.copy_(state[f"{i}|weights"])
            mine = {k.partition("|")[2]: v for k, v in state.items() if k.startswith(f"{i}|") and k != f"{i}|weights"}
            self.zero.optimizer.state[part] = {k: v if k == "step" else v.to(part.device) for k, v in mine.items()}
