"""How many slices a second a recipe makes: by one process and by several at once, on processors or on one accelerator."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from .synthetic import Synthetic

MAPS, SECONDS = (1, 2), 10.0
START_SECONDS = 300
"""A process waits so long for the others to be ready; one that fails would be waited for without end."""


def _make(folder: str, numbers: tuple[int, ...], device: str, num_slices: int, seconds: float, ready: Any, made: Any) -> None:
    torch.set_num_threads(1)
    recipe = Synthetic(folder, numbers=numbers, num_slices=num_slices, kspace_size=0, device=device)
    recipe.record(0, 0)
    ready.wait(START_SECONDS)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += len(recipe.record(1, count).images)
    made.put(count / (time.perf_counter() - begin))


def slices_a_second(folder: str | Path, *, device: str, num_slices: int, processes: int) -> float:
    """Slices of 192 x 192 with masks and text, by all processes, each of which makes one study after another on `device`.

    Raises:
        ValueError: the folder holds no label maps, there is no such device, or a process failed.
    """
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"expected cpu, or cuda where there is a GPU, got {device!r}")
    Synthetic(folder, numbers=MAPS, kspace_size=0)  # what is wrong is told here
    spawned = multiprocessing.get_context("spawn")  # no child of a fork can use an accelerator
    ready, made = spawned.Barrier(processes), spawned.Queue()
    children = [spawned.Process(target=_make, args=(str(folder), MAPS, device, num_slices, SECONDS, ready, made)) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise ValueError(f"expected {processes} processes to make studies on {device}, got an error in one (see above)")
    return sum(made.get() for _ in children)
