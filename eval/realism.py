"""How real the simulated studies are: do the intensities of real scans lie in the recipe's range, and does a classifier of
sequence that has seen simulations alone name the sequence of real scans?
"""

from __future__ import annotations

import csv
from collections import defaultdict
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
from omnimri.io import study_of
from omnimri.volume import Study

from .suite import load_any, to_structures

SIDE = 96
"""Pixels a side that the classifier sees."""
FLUID = [s.label for s in STRUCTURES if "lateral ventricle" in s.name and "inferior" not in s.name]


@dataclass(frozen=True)
class Case:
    """A real scan whose sequence is known."""

    name: str
    sequence: str
    study: Study
    truth: np.ndarray | None
    """Labels of structures, where somebody drew them."""


def real_scans(folder: Path) -> list[Case]:
    """The scans of `scans.tsv` that lie in a folder of validation data (its subfolders' names are the table's), and the template.

    Raises:
        ValueError: there is none but the template.
    """
    found = []
    with (Path(__file__).parent / "scans.tsv").open() as f:
        for row in csv.DictReader(f, delimiter="\t"):
            if row["path"] == "nilearn:":
                from nilearn.datasets import load_mni152_template

                image = load_mni152_template(resolution=1)
                study = study_of(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine), oriented=True)
                found.append(Case(row["name"], row["sequence"], study, None))
            elif (folder / row["path"]).exists():
                truth = to_structures(load_any(folder / row["labels"])[1]) if row["labels"] else None
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
    """A small convolutional network: slices (N, 1, SIDE, SIDE) -> logits over `SEQUENCES`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 96)
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)))
        self.out = nn.Linear(2 * widths[-1], len(SEQUENCES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        x = self.layers(x)
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def slices_of(images: Tensor) -> Tensor:
    """(S, 1, SIDE, SIDE) of (S, 3, H, W), those that hold something."""
    x = F.interpolate(normalise(images)[:, 1:2], size=(SIDE, SIDE), mode="area")
    filled = (x > 0.1).float().mean((1, 2, 3))
    return x[filled > 0.3 * filled.max()]


def train(slices: Tensor, classes: Tensor, *, epochs: int = 15) -> Classifier:
    """Train on simulated slices; shifts, brightness and contrast are drawn."""
    torch.manual_seed(0)
    model = Classifier()
    weights = 1 / torch.bincount(classes, minlength=len(SEQUENCES)).clamp(min=1).float().sqrt()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(slices) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(slices), (64,))
        x = slices[pick]
        x = torch.roll(x, tuple(torch.randint(-8, 9, (2,)).tolist()), (2, 3))
        x = x * (0.85 + 0.3 * torch.rand(64, 1, 1, 1)) + 0.02 * torch.randn(64, 1, 1, 1)
        loss = F.cross_entropy(model(x), classes[pick], weight=weights, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def measure_realism(assistant: Assistant, maps: Path, validation: Path, *, count: int = 600) -> dict[str, Any]:
    """Ranges of simulated studies and where real scans lie in them; names that the classifier gives to real scans.

    Regions of a real scan are drawn labels where there are any, else this assistant's own masks.
    """
    cases = real_scans(validation)
    recipe = Synthetic(maps, numbers=TRAINING_MAPS, num_slices=4, with_kspace=False)
    ranges: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    slices, classes = [], []
    for i in range(count):
        record = recipe.record(0, i)
        for k, v in record_contrasts(record).items():
            ranges[str(record.sequence)][k].append(v)
        own = slices_of(record.images)
        slices.append(own)
        classes += [SEQUENCES.index(str(record.sequence))] * len(own)
    held = int(0.9 * len(classes))
    x, y = torch.cat(slices), torch.tensor(classes)
    model = train(x[:held], y[:held])
    with torch.no_grad():
        right = float((model(x[held:]).argmax(1) == y[held:]).float().mean())
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
            logits = model(slices_of(images[:: max(1, len(images) // 24)]))
        told["named"] = SEQUENCES[int(logits.log_softmax(1).mean(0).argmax())]
        named += told["named"] == case.sequence
        results["scans"][case.name] = told
        assistant.forget()
    return results | {"inside": f"{inside} of {total}", "named right": f"{named} of {len(cases)}"}
