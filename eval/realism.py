"""How real the simulated studies are: do the intensities of real scans lie in the recipe's range, and does a classifier of
sequence that has seen simulations alone take real scans for what they are?
"""

from __future__ import annotations

import csv
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from data_recipes import Synthetic
from data_recipes.synthetic import TRAINING_MAPS
from omnimri.anatomy import SEQUENCES, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.example import Record
from omnimri.volume import Study

from .cases import SCANS, load_any, load_mask, template, to_structures

NAMED = tuple(s for s in SEQUENCES if s != "other")
"""The sequences that have a name."""
BESIDE = 5
"""Pixels from a lesion up to which tissue may be ill that nobody outlined."""
FLUID = [s.label for s in STRUCTURES if "lateral ventricle" in s.name and "inferior" not in s.name]


@dataclass(frozen=True)
class Case:
    """A real scan whose sequence is known."""

    name: str
    sequence: str
    study: Study
    labels: np.ndarray | None = None
    """Structures, where somebody drew them."""
    lesions: np.ndarray | None = None
    """(X, Y, Z) bool, where somebody drew them."""


def real_scans(folders: Sequence[Path]) -> list[Case]:
    """The scans of `scans.tsv` that lie in folders of validation data (subfolders' names are the table's), and the template.

    Raises:
        ValueError: there is none but the template.
    """
    found = []
    with SCANS.open() as f:
        for row in csv.DictReader(f, delimiter="\t"):
            if row["path"] == "nilearn:":
                found.append(Case(row["name"], row["sequence"], template()[0]))
                continue
            folder = next((f for f in folders if (f / row["path"]).exists()), None)
            if folder is not None:
                case = Case(row["name"], row["sequence"], load_any(folder / row["path"])[0])
                drawn = load_mask(folder / row["truth"], case.study) if row["suite"] in ("freesurfer", "brats") else None
                if row["suite"] == "freesurfer":
                    case = replace(case, labels=to_structures(drawn))
                elif drawn is not None:
                    case = replace(case, lesions=drawn > 0)
                found.append(case)
    if len(found) < 2:
        raise ValueError("expected the folder of validation scans that eval/scans.tsv lists, got one without any of them")
    return found


def contrasts(image: np.ndarray, labels: np.ndarray, lesions: np.ndarray) -> dict[str, float]:
    """Grey matter and ventricular fluid against white matter by their medians, and the spread of white matter (interquartile
    range over median); intensities count from the background. A region is what lies a pixel inside of it, and not beside a lesion.

    Args:
        image: (S, H, W).
        labels: (S, H, W) FreeSurfer numbers.
        lesions: (S, H, W) bool.
    """
    image, cross = image - image.min(), ndimage.generate_binary_structure(2, 1)[None]
    away = ~ndimage.binary_dilation(lesions, cross, iterations=BESIDE) if lesions.any() else ~lesions
    white, grey, fluid = (image[ndimage.binary_erosion(np.isin(labels, which), cross) & away] for which in ([2, 41], [3, 42], FLUID))
    if min(len(white), len(grey), len(fluid)) < 50 or np.median(white) <= 0:
        return {}
    middle = np.median(white)
    low, high = np.percentile(white, [25, 75])
    found = {"grey/white": np.median(grey) / middle, "fluid/white": np.median(fluid) / middle, "white spread": (high - low) / middle}
    return {k: float(v) for k, v in found.items()}


def record_contrasts(record: Record) -> dict[str, float]:
    """The same of a simulated study."""
    assert record.labels is not None
    assert record.lesions is not None
    table = np.array([0, *(s.label for s in STRUCTURES)])
    return contrasts(record.images[:, 1].numpy(), table[record.labels.numpy()], record.lesions.numpy() > 0)


def simulate(maps: Path, numbers: range) -> dict[str, dict[str, list[float]]]:
    """Contrasts of simulated studies by sequence."""
    torch.set_num_threads(1)
    recipe = Synthetic(maps, numbers=TRAINING_MAPS, num_slices=4, kspace_size=0)
    ranges: dict[str, dict[str, list[float]]] = {s: defaultdict(list) for s in NAMED}
    for i in numbers:
        record = recipe.record(0, i)
        if record.sequence in NAMED:
            for k, v in record_contrasts(record).items():
                ranges[record.sequence][k].append(v)
    return ranges


def measure_realism(assistant: Assistant, maps: Path, validation: Sequence[Path], *, count: int = 2500) -> dict[str, Any]:
    """Ranges of simulated studies and where real scans lie in them; what the assistant's head of sequences, a small classifier that has
    seen simulations alone, takes real scans for, without a threshold.

    Regions and lesions of a real scan are what was drawn where somebody did, else this assistant's own masks.
    """
    cases = real_scans(validation)
    half = count // 2
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(simulate, (maps, maps), (range(half), range(half, count))))
    ranges = {s: {k: v + parts[1][s][k] for k, v in parts[0][s].items()} for s in NAMED}
    results: dict[str, Any] = {"simulated studies": count, "scans": {}}
    inside = total = named = family = 0
    for case in cases:
        seen = assistant.examine(replace(case.study.primary, sequence="unknown"))
        labels = seen.labels.numpy() if case.labels is None else case.labels
        lesions = seen.lesion_ranks.numpy() > 0 if case.lesions is None else case.lesions
        own = (np.moveaxis(x, seen.slice_axis, 0) for x in (seen.volume.voxels[0].numpy(), labels, lesions))
        told: dict[str, Any] = {"sequence": case.sequence}
        for k, v in contrasts(*own).items():
            low, high = np.percentile(ranges[case.sequence][k], [1, 99])
            told[k] = {"value": round(v, 3), "range": [round(float(low), 3), round(float(high), 3)], "inside": bool(low <= v <= high)}
            inside += told[k]["inside"]
            total += 1
        told["likeliest"], share = seen.likely[0]
        told["probability"] = round(share, 2)
        named += told["likeliest"] == case.sequence
        family += told["likeliest"].removesuffix("-Gd") == case.sequence.removesuffix("-Gd")
        results["scans"][case.name] = told
        assistant.forget()
    return results | {"inside": f"{inside} of {total}", "named right": f"{named} of {len(cases)}",
                      "named right but for contrast agent": f"{family} of {len(cases)}"}


def markdown(results: dict[str, Any]) -> str:
    """results.md."""
    kinds = ("grey/white", "fluid/white", "white spread")
    lines = [
        "# Simulated studies against real scans",
        "",
        (
            "Research use only. Not a medical device. Value in the real scan, and the 1st to 99th percentile of simulated studies "
            f"of its sequence ({results['simulated studies']} studies); of each region what lies a pixel inside of it and "
            f"{BESIDE} from lesions."
        ),
        "",
        f"| scan | sequence | taken for, with its probability | {' | '.join(kinds)} |",
        "|---|---|---|---|---|---|",
    ]
    for name, told in results["scans"].items():
        cells = [
            f"{told[k]['value']} ({told[k]['range'][0]} to {told[k]['range'][1]}{'' if told[k]['inside'] else ', OUTSIDE'})"
            if k in told
            else ""
            for k in kinds
        ]
        lines.append(f"| {name} | {told['sequence']} | {told['likeliest']} {told['probability']} | {' | '.join(cells)} |")
    found = (
        f"Inside: {results['inside']}. Taken for what they are by a classifier that saw simulations alone, the model's head of sequences, "
        f"without a threshold: {results['named right']}; T1-weighted with and without contrast agent as one: "
        f"{results['named right but for contrast agent']}."
    )
    return "\n".join([*lines, "", found, ""])
