"""How real the simulated studies are: do the intensities of real scans lie in the recipe's range, and does a classifier of
sequence that has seen simulations alone name the sequence of real scans?
"""

from __future__ import annotations

import csv
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_recipes import Synthetic
from data_recipes.synthetic import TRAINING_MAPS
from omnimri.anatomy import SEQUENCES, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.example import Record, normalise
from omnimri.grid import Grid
from omnimri.volume import Study

from .cases import SCANS, load_any, template, to_structures

SIDE = 96
"""Pixels a side that the classifier sees."""
NAMED = tuple(s for s in SEQUENCES if s != "other")
"""The sequences that the classifier tells apart."""
FLUID = [s.label for s in STRUCTURES if "lateral ventricle" in s.name and "inferior" not in s.name]


@dataclass(frozen=True)
class Case:
    """A real scan whose sequence is known."""

    name: str
    sequence: str
    study: Study
    truth: np.ndarray | None
    """Labels of structures, where somebody drew them."""


def real_scans(folders: Sequence[Path]) -> list[Case]:
    """The scans of `scans.tsv` that lie in folders of validation data (subfolders' names are the table's), and the template.

    Raises:
        ValueError: there is none but the template.
    """
    found = []
    with SCANS.open() as f:
        for row in csv.DictReader(f, delimiter="\t"):
            if row["path"] == "nilearn:":
                found.append(Case(row["name"], row["sequence"], template()[0], None))
                continue
            folder = next((f for f in folders if (f / row["path"]).exists()), None)
            if folder is not None:
                truth = to_structures(load_any(folder / row["truth"])[1]) if row["suite"] == "freesurfer" else None
                found.append(Case(row["name"], row["sequence"], load_any(folder / row["path"])[0], truth))
    if len(found) < 2:
        raise ValueError("expected the folder of validation scans that eval/scans.tsv lists, got one without any of them")
    return found


def contrasts(image: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Grey matter and ventricular fluid against white matter by their medians, and the spread of white matter (interquartile
    range over median); intensities count from the background.
    """
    image = image - image.min()
    white, grey, fluid = (image[np.isin(labels, which)] for which in ([2, 41], [3, 42], FLUID))
    if min(len(white), len(grey), len(fluid)) < 50 or np.median(white) <= 0:
        return {}
    middle = np.median(white)
    low, high = np.percentile(white, [25, 75])
    found = {"grey/white": np.median(grey) / middle, "fluid/white": np.median(fluid) / middle, "white spread": (high - low) / middle}
    return {k: float(v) for k, v in found.items()}


def record_contrasts(record: Record) -> dict[str, float]:
    """The same of a simulated study, lesions left out."""
    assert record.labels is not None
    assert record.lesions is not None
    table = np.array([0, *(s.label for s in STRUCTURES)])
    labels = table[record.labels.numpy()]
    labels[record.lesions.numpy() > 0] = 0
    return contrasts(record.images[:, 1].numpy(), labels)


class Classifier(nn.Module):
    """A small convolutional network: slices (N, 1, SIDE, SIDE) -> logits over `NAMED`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 96)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU()) for a, b in pairwise(widths)))
        self.out = nn.Linear(2 * widths[-1], len(NAMED))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        x = self.layers(x)
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def slices_of(images: Tensor) -> Tensor:
    """(S, 1, SIDE, SIDE) of (S, 3, H, W), those that hold something."""
    x = F.interpolate(normalise(images)[:, 1:2], size=(SIDE, SIDE), mode="area")
    filled = (x > 0.1).float().mean((1, 2, 3))
    return x[filled > 0.3 * filled.max()]


def train(slices: Tensor, classes: Tensor, *, seed: int, epochs: int = 12) -> Classifier:
    """Train on simulated slices, as many of each sequence; shifts, size, mirror, gamma, brightness and noise are drawn."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Classifier()
    share = torch.bincount(classes).clamp(min=1).float().rsqrt()[classes]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(slices) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(64, 1, 1, 1, generator=g)

    for _ in range(steps):
        chosen = torch.multinomial(share, 64, True, generator=g)
        x = torch.roll(slices[chosen], tuple(torch.randint(-8, 9, (2,), generator=g).tolist()), (2, 3))
        zoom, turn = drawn(0.9, 1.1).flatten(), torch.zeros(64, 2, 3)
        turn[:, 0, 0], turn[:, 1, 1] = zoom * (1 - 2 * (torch.rand(64, generator=g) < 0.5).float()), zoom
        x = F.grid_sample(
            x.clamp(min=0) ** torch.exp(drawn(-0.2, 0.2)), F.affine_grid(turn, x.shape, align_corners=False), align_corners=False
        )
        x = (x * drawn(0.7, 1.2)).clamp(max=1.5)
        x = x + drawn(0.0, 0.04) * torch.randn(x.shape, generator=g)
        loss = F.cross_entropy(model(x), classes[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def simulate(maps: Path, numbers: range) -> tuple[Tensor, list[int], dict[str, dict[str, list[float]]]]:
    """Slices of simulated studies of named sequences, their classes, and contrasts by sequence."""
    torch.set_num_threads(1)
    recipe = Synthetic(maps, numbers=TRAINING_MAPS, num_slices=4, kspace_size=0)
    ranges: dict[str, dict[str, list[float]]] = {s: defaultdict(list) for s in NAMED}
    slices, classes = [], []
    for i in numbers:
        record = recipe.record(0, i)
        if record.sequence not in NAMED:
            continue
        for k, v in record_contrasts(record).items():
            ranges[record.sequence][k].append(v)
        own = slices_of(record.images)
        slices.append(own)
        classes += [NAMED.index(record.sequence)] * len(own)
    return torch.cat(slices), classes, ranges


def measure_realism(assistant: Assistant, maps: Path, validation: Sequence[Path], *, count: int = 2500) -> dict[str, Any]:
    """Ranges of simulated studies and where real scans lie in them; names that the classifier gives to real scans.

    Regions of a real scan are drawn labels where there are any, else this assistant's own masks.
    """
    cases = real_scans(validation)
    half = count // 2
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(simulate, (maps, maps), (range(half), range(half, count))))
    ranges = {s: {k: v + parts[1][2][s][k] for k, v in parts[0][2][s].items()} for s in NAMED}
    held = [round(0.9 * len(part[1])) for part in parts]
    x, y = torch.cat([p[0][:h] for p, h in zip(parts, held, strict=True)]), [c for p, h in zip(parts, held, strict=True) for c in p[1][:h]]
    models = [train(x, torch.tensor(y), seed=seed) for seed in range(3)]
    x, y = torch.cat([p[0][h:] for p, h in zip(parts, held, strict=True)]), [c for p, h in zip(parts, held, strict=True) for c in p[1][h:]]
    with torch.no_grad():
        right = float((sum(m(x).log_softmax(1) for m in models).argmax(1) == torch.tensor(y)).float().mean())
    results: dict[str, Any] = {"simulated studies": count, "held-out simulated slices named right": right, "scans": {}}
    inside = total = named = 0
    for case in cases:
        volume = case.study.primary
        labels = case.truth
        if labels is None:
            answer = assistant.segment(case.study)
            labels = answer.labels.numpy() if answer.labels is not None else np.zeros(volume.shape, np.int32)
        told: dict[str, Any] = {"sequence": case.sequence}
        for k, v in contrasts(volume.voxels[0].numpy(), labels).items():
            low, high = np.percentile(ranges[case.sequence][k], [1, 99])
            told[k] = {"value": round(v, 3), "range": [round(float(low), 3), round(float(high), 3)], "inside": bool(low <= v <= high)}
            inside += told[k]["inside"]
            total += 1
        grid = Grid.fit(volume, size=192)
        images = grid.to_grid(volume.voxels[0])
        with torch.no_grad():
            shown = slices_of(images[:: max(1, len(images) // 24)])
            told["named"] = NAMED[int(sum(m(shown).log_softmax(1).mean(0) for m in models).argmax())]
        named += told["named"] == case.sequence
        results["scans"][case.name] = told
        assistant.forget()
    return results | {"inside": f"{inside} of {total}", "named right": f"{named} of {len(cases)}"}


def markdown(results: dict[str, Any]) -> str:
    """results.md."""
    kinds = ("grey/white", "fluid/white", "white spread")
    lines = [
        "# Simulated studies against real scans",
        "",
        (
            "Research use only. Not a medical device. Value in the real scan, and the 1st to 99th percentile of simulated studies "
            f"of its sequence ({results['simulated studies']} studies)."
        ),
        "",
        f"| scan | sequence | named by a classifier that saw simulations alone | {' | '.join(kinds)} |",
        "|---|---|---|---|---|---|",
    ]
    for name, told in results["scans"].items():
        cells = [
            f"{told[k]['value']} ({told[k]['range'][0]} to {told[k]['range'][1]}{'' if told[k]['inside'] else ', OUTSIDE'})"
            if k in told
            else ""
            for k in kinds
        ]
        lines.append(f"| {name} | {told['sequence']} | {told['named']} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            (
                f"Inside: {results['inside']}. Named right: {results['named right']}. Held-out simulated slices named right: "
                f"{results['held-out simulated slices named right']:.2f}."
            ),
            "",
        ]
    )
