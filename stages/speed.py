"""python -m stages.speed --data DIR: slices a second of the training step beside a plain eager loop's, taking turns in one run.

The step is the one that masks are learnt by: four studies of four slices, the pixel decoder moves. Making the studies counts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from omnimri.checkpoint import EMBEDDED
from omnimri.tasks.reconstruct import fast_bf16

from .__main__ import main as run_stage

BATCH, SLICES = 4, 4
STEP: dict[str, Any] = {
    "recipe": "synthetic", "batch_size": BATCH, "num_slices": SLICES, "max_slices": SLICES, "kspace_size": 0,
    "across_share": 0.25, "mask_share": 0.9999, "word_share": 0, "image_share": 0, "warmup": 5,
    "save_every": 10**6, "validate_every": 10**6, "validate_batches": 1, "learning_rate.vision.*": 0, "learning_rate.projector.*": 0,
    "learning_rate.language.*": 0, "learning_rate.heads.pixels.*": 0.0001, "learning_rate.heads.*": 0,
}
ARMS: dict[str, dict[str, Any]] = {
    "plain eager loop": {"precision": "no", "workers": 0},
    "plain eager loop, bf16 autocast": {"precision": "bf16", "workers": 0},
    "compiled, studies made by another process and shown three times": {"compile": "true", "workers": 1, "reuse": 3},
}


def seconds_a_step(log: Path) -> float:
    """Seconds a step between the first and the last entry of a run's log, the first ten steps left out.

    Raises:
        ValueError: it has fewer than two entries after them.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log)).Reload()
    told = [(e.step, e.wall_time) for e in events.Scalars("samples_per_s") if e.step >= 10]
    if len(told) < 2:
        raise ValueError(f"expected a log of 21 steps or more, got {log}")
    return (told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0])


def main(argv: list[str] | None = None) -> int:
    """Time every arm in turn and print what each makes."""
    parser = argparse.ArgumentParser(prog="python -m stages.speed", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of label maps")
    parser.add_argument("--init", default=str(EMBEDDED), help="checkpoint that is trained on")
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    from accelerate.state import AcceleratorState

    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as home:
        for k in range(args.rounds):
            for j, (name, own) in enumerate(ARMS.items()):
                out = Path(home) / f"{k}-{j}"
                told = {**STEP, **own, "steps": args.steps, "seed": k}
                settings = [x for key, value in told.items() for x in ("--set", f"{key}={value}")]
                if run_stage(["pretrain", "--init", args.init, "--data", args.data, "--out", str(out), *settings]):
                    return 2
                AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for the life of a process
                taken[name].append(seconds_a_step(out / "log"))
    plain = median(taken["plain eager loop"])
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    print(f"\n{torch.get_num_threads()} threads, {device.type}, bf16 in hardware: {fast_bf16(device)}")
    for name, seconds in taken.items():
        rate, told = BATCH * SLICES / median(seconds), ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{name}: {rate:.1f} slices a second, {plain / median(seconds):.2f} times the plain eager loop ({told} s a step)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
