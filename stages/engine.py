"""Objective, FitConfig, fit(): the only training loop, on accelerate."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omnimri.checkpoint import load_weights, newest_good
from omnimri.example import stable_hash
from omnimri.memory import keep_freed_memory
from omnimri.tasks.reconstruct import fast_bf16

from .state import optimizer_file, optimizer_of, restore, save
from .updates import Sharded, Updates, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from omnimri.model.omnimri import OmniMRI

VALIDATION_START = 1 << 40
"""Indices from here on are never trained on."""


class Term(NamedTuple):
    """One loss term: its sum over what it counts. The engine divides by the count of the whole step."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


class Objective(nn.Module, ABC):
    """A model, its loss, and what only training needs (a teacher, a temperature)."""

    model: OmniMRI

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """Loss terms of one batch."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, for instance to move an EMA teacher."""

    def metrics(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """What validation reports beside the loss terms."""
        return {}

    def dense_parts(self) -> list[nn.Module]:
        """Modules whose inputs always have one shape: what `compile` compiles."""
        return []

    def word_parts(self) -> list[nn.Module]:
        """Modules whose inputs are as long as texts are: compiled once for any length."""
        return []


class Source(Protocol):
    """Training examples as a pure function of their index."""

    def example(self, index: int) -> Any:
        """Example `index`."""
        ...

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        """A batch of examples."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast to train."""

    steps: int
    learning_rate: Mapping[str, float]
    """Peak rate by parameter-name glob, first match wins. What no glob names, or rate 0, is frozen. A glob that
    matches nothing is an error."""
    batch_size: int = 4
    """Examples a process and micro-batch."""
    accumulate: int = 1
    """Micro-batches a step. Over 1, each is run once more without gradient, first, to count what it holds."""
    echo: int = 1
    """Steps in a row that see the same micro-batches, each with draws of its own (data echoing, arXiv 1907.05550): for an
    accelerator that is faster than the processors which make its data."""
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 0
    optimizer: str = "adamw"
    """adamw, or adamw8bit (bitsandbytes)."""
    zero_stage: int = 0
    """1 or 2: DeepSpeed shards optimizer state, and gradients, over the processes of torchrun."""
    workers: int = 0
    """Loader processes; the batches are the same for any number."""
    precision: str = "auto"
    """bf16 (autocast), no, or auto: bf16 where hardware multiplies it, without which a step takes up to twice as long by it."""
    attention: str = "eager"
    """On CPUs: eager, or sdpa, whose backward pass takes longer for short texts and whose forward pass less for long ones."""
    compile: bool = False
    """Compile the objective's dense parts and the language model's blocks (torch.compile; needs a C++ compiler on CPUs)."""
    save_every: int = 200
    keep: int = 2
    validate_every: int = 200
    validate_batches: int = 4
    cpu: bool = False

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then half a cosine down to 2 %."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(module: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Freeze what no glob names and group the rest by rate and decay.

    Raises:
        ValueError: a glob matches no parameter.
    """
    used: set[str] = set()
    model = getattr(module, "model", None)
    base = {n for n, _ in module.named_parameters() if hasattr(model, "is_base") and model.is_base(n.removeprefix("model."))}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        short = name.removeprefix("model.")
        matched = next((g for g in config.learning_rate if fnmatchcase(short, g)), None)
        moves = matched is not None and config.learning_rate[matched] > 0 and not name.startswith("teacher") and name not in base
        parameter.requires_grad_(moves)
        if not name.startswith("teacher"):
            used |= {g for g in config.learning_rate if fnmatchcase(short, g)}
        if matched is None or not moves:
            continue
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((config.learning_rate[matched], decay), []).append(parameter)
    unused = [g for g in config.learning_rate if g not in used]
    if unused:
        raise ValueError(f"learning-rate globs that match no parameter: {unused}; see named_parameters()")
    return [{"params": p, "lr": lr, "peak": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


class _Indices(torch.utils.data.Dataset):
    """Batches by step: item `k` is the k-th micro-batch of this process."""

    def __init__(self, source: Source, config: FitConfig, start: int, rank: int, world: int) -> None:
        self.source, self.config, self.start, self.rank, self.world = source, config, start, rank, world

    def __len__(self) -> int:
        return max(0, math.ceil(self.config.steps / self.config.echo) - self.first) * self.config.accumulate

    @property
    def first(self) -> int:
        """Window of micro-batches that the first step sees."""
        return self.start // self.config.echo

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return batch_at(self.source, self.config, self.first * self.config.accumulate + k, self.rank, self.world)


def batch_at(source: Source, config: FitConfig, micro: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Micro-batch `micro` of a rank: a pure function of its arguments, drawn under one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = (micro * world + rank) * config.batch_size
        return source.collate([source.example(first + i) for i in range(config.batch_size)])
    finally:
        torch.set_num_threads(threads)


def fit(
    objective: Objective,
    source: Source,
    config: FitConfig,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    init: Path | None = None,
    validation: Source | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train, and save to `out/checkpoints/step-%06d`; continue from the newest undamaged one where there is any.

    Args:
        init: A checkpoint whose weights are handed over; resuming wins over it.
        validation: Examples for the numbers logged every `validate_every` steps (`source` when None).

    Returns:
        The last validation's numbers.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from tqdm import tqdm

    keep_freed_memory()
    device = torch.device("cpu") if config.cpu else torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if config.precision == "auto":
        config = replace(config, precision="bf16" if fast_bf16(device) else "no")
    if config.precision == "no":
        objective.float()  # a base comes in bfloat16, which only autocast brings together with the rest
    accelerator = Accelerator(
        mixed_precision=config.precision,
        # Without it processes on CPUs would not know of each other.
        cpu=device.type == "cpu",
        log_with="tensorboard",
        project_dir=str(out),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    resumed = newest_good(out)
    if init is not None and resumed is None:
        loaded, new, unused = load_weights(objective.model, init)
        accelerator.print(f"init {init}: {len(loaded)} weights loaded, {len(new)} new, {len(unused)} unused")
        for title, names in (("new", new), ("unused", unused)):
            accelerator.print(f"  {title}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "")
        if hasattr(objective, "after_init"):
            objective.after_init()
    if accelerator.device.type == "cpu":
        objective.model.language.set_attn_implementation(config.attention)
    groups = parameter_groups(objective, config)
    if config.compile:
        for parts, dynamic in ((objective.dense_parts(), False), (objective.word_parts(), True)):
            for part in parts:
                part.compile(dynamic=dynamic)
    start = 0
    if resumed is not None:
        start = restore(resumed, objective)
        accelerator.print(f"resumed at step {start}")
    updates: Updates = (Sharded if config.zero_stage else Whole)(accelerator, objective, groups, config)
    if resumed is not None:
        before = json.loads((resumed / "state.json").read_text())["optimizer"]
        if before != (now := optimizer_of(config, world)):
            raise ValueError(f"{out} was trained with {before}, and goes on only so; got {now}; use another --out with --init {out}")
        updates.load(load_file(resumed / optimizer_file(updates, rank)))
    accelerator.init_trackers("log")
    loader = torch.utils.data.DataLoader(
        _Indices(source, config, start, rank, world),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_one_thread,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    window: list[dict[str, Tensor]] = []
    kept: dict[int, dict[str, Tensor]] = {}
    bar = tqdm(total=config.steps, initial=start, disable=not accelerator.is_main_process, mininterval=2)
    last: dict[str, float] = {}
    for step in range(start, config.steps):
        tick = time.perf_counter()
        for group in updates.groups:
            group["lr"] = group["peak"] * config.rate(step)
        if not window or step % config.echo == 0:
            window = [{k: v.to(accelerator.device, non_blocking=True) for k, v in next(batches).items()} for _ in range(config.accumulate)]
        objective.train()
        values = _step(accelerator, updates, window, stable_hash(f"step {config.seed} {step}") % (1 << 31))
        objective.after_step(step)
        rate = config.batch_size * world * config.accumulate / (time.perf_counter() - tick)
        bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()} | {"samples/s": f"{rate:.1f}"}, refresh=False)
        bar.update()
        if step % 10 == 0 or step + 1 == config.steps:
            accelerator.log({f"train/{k}": v for k, v in values.items()} | {"samples_per_s": rate}, step=step)
        done = step + 1 == config.steps
        if (step + 1) % config.validate_every == 0 or done:
            last = validate(accelerator, objective, validation or source, config, kept)
            accelerator.log({f"validation/{k}": v for k, v in last.items()}, step=step)
            told = " ".join(f"{k} {v:.4f}" for k, v in last.items())
            accelerator.print(f"\nstep {step + 1} train {_told(values)} | validation {told}", flush=True)
        if (step + 1) % config.save_every == 0 or done:
            save(accelerator, out, step + 1, objective, updates, tokenizer, config, provenance or {})
    bar.close()
    accelerator.wait_for_everyone()
    if world > 1:
        # Gloo's threads need the interpreter to let go of their last tensors, and its destructor waits for them while it
        # holds the interpreter: without this pause a process hangs at its end now and then (torch 2.13).
        time.sleep(0.5)
    accelerator.end_training()
    return last


def _told(values: Mapping[str, float]) -> str:
    return " ".join(f"{k} {v:.4f}" for k, v in values.items())


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _step(accelerator: Any, updates: Updates, window: list[dict[str, Tensor]], seed: int) -> dict[str, float]:
    """One optimizer step over a window of micro-batches; each term is divided by its count over window and ranks.

    What an objective draws comes from the step's own seed, so that counting and training, all micro-batches and all
    ranks see the same draws.
    """
    totals: dict[str, Tensor] = {}
    if len(window) > 1:
        for batch in window:
            torch.manual_seed(seed)
            with torch.no_grad(), accelerator.autocast():
                for name, term in updates.module(batch).items():
                    totals[name] = totals.get(name, 0) + term.count.detach().double()
        totals = {k: accelerator.reduce(v) for k, v in totals.items()}
    sums: dict[str, float] = {}
    for i, batch in enumerate(window):
        torch.manual_seed(seed)
        last = i + 1 == len(window)
        with accelerator.autocast(), updates.window(last):
            terms = updates.module(batch)
            if not totals:
                totals = {k: accelerator.reduce(t.count.detach().double()) for k, t in terms.items()}
            parts = {k: t.sum / totals[k].clamp(min=1e-9).to(t.sum.dtype) for k, t in terms.items()}
            # Ranks' gradients are averaged; the totals are sums over ranks already.
            loss = torch.stack([parts[k].float() * t.weight for k, t in terms.items()]).sum() * accelerator.num_processes
            updates.backward(loss, last)
        for k, v in parts.items():
            sums[k] = sums.get(k, 0.0) + float(v.detach())
    if not all(math.isfinite(v) for v in sums.values()):
        raise FloatingPointError(f"the loss is not finite: {sums}; lower the learning rate, or look at the data")
    updates.step()
    return sums


@torch.no_grad()
def validate(
    accelerator: Any, objective: Objective, source: Source, config: FitConfig, kept: dict[int, dict[str, Tensor]]
) -> dict[str, float]:
    """Loss terms and metrics over fixed examples that training never sees.

    Args:
        kept: The batches, from the first time on.
    """
    objective.eval()
    sums: dict[str, list[float]] = {}
    for k in range(config.validate_batches):
        if k not in kept:
            kept[k] = batch_at(source, config, VALIDATION_START + k, accelerator.process_index, accelerator.num_processes)
        batch = {name: v.to(accelerator.device) for name, v in kept[k].items()}
        torch.manual_seed(k)
        with accelerator.autocast():
            terms = objective(batch) | objective.metrics(batch)
        for name, term in terms.items():
            total, count = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [total + float(accelerator.reduce(term.sum)), count + float(accelerator.reduce(term.count))]
    return {name: total / max(count, 1e-9) for name, (total, count) in sums.items()}
