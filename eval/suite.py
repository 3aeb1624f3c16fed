"""Predict with the assistant, score, and write results.json and results.md."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimri.anatomy import CLASS_OF_LABEL, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.io import open_study, study_of
from omnimri.measure import rank_components
from omnimri.volume import Study

from .metrics.dice import StructureDice, dice

GREY = [s.label for s in STRUCTURES if s.tissue == "gm"]
WHITE = [s.label for s in STRUCTURES if s.tissue == "wm"]
"""White matter and brain-stem."""


def load_any(path: Path) -> tuple[Study, np.ndarray]:
    """A study from a file, and its array.

    Raises:
        ValueError: it cannot be read.
    """
    study = open_study(path)
    return study, study.primary.voxels[0].numpy()


def to_structures(labels: np.ndarray) -> np.ndarray:
    """FreeSurfer aparc+aseg numbers -> the structures that are segmented."""
    table = {251: 0, 252: 0, 253: 0, 254: 0, 255: 0, 77: 0, 31: 4, 63: 43}
    out = labels.astype(np.int32).copy()
    out[(labels >= 11000) & (labels < 12000)] = 3
    out[(labels >= 12000) & (labels < 13000)] = 42
    for a, b in table.items():
        if b:
            out[labels == a] = b
    # Corpus callosum and hypointensities belong to the nearer white matter.
    loose = np.argwhere(np.isin(labels, [251, 252, 253, 254, 255, 77]))
    if len(loose):
        from scipy import ndimage

        white = np.isin(out, [2, 41])
        index = ndimage.distance_transform_edt(~white, return_distances=False, return_indices=True)
        out[tuple(loose.T)] = out[tuple(index[:, loose[:, 0], loose[:, 1], loose[:, 2]])]
    out[~np.isin(out, [s.label for s in STRUCTURES])] = 0
    return out


def segment(assistant: Assistant, study: Study, truth: np.ndarray) -> dict[str, Any]:
    """Dice of every structure, sided, with seconds and peak memory."""
    tick = time.perf_counter()
    answer = assistant.segment(study)
    seconds = time.perf_counter() - tick
    assert answer.labels is not None
    said = answer.labels.numpy().astype(np.int32)
    for lesion, white in ((25, 2), (57, 41)):
        said[said == lesion] = white
    labels = [s.label for s in STRUCTURES]
    metric = StructureDice(keep_in_memory=True)
    scores = metric.compute(predictions=[said.ravel()], references=[truth.ravel()], labels=labels)
    names = {str(s.label): s.name for s in STRUCTURES}
    return {
        "dice": {names.get(k, k): round(v, 4) for k, v in scores.items()},
        "grey": dice(np.isin(said, GREY), np.isin(truth, GREY)),
        "white": dice(np.isin(said, WHITE), np.isin(truth, WHITE)),
        "seconds": round(seconds, 1),
        "peak_memory_gib": peak_memory_gib(),
    }


def tissue_mni(assistant: Assistant) -> dict[str, Any]:
    """Grey- and white-matter Dice on the MNI152 T1 that nilearn carries, against its tissue maps at one half."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image = load_mni152_template(resolution=1)
    study = study_of(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine), oriented=True)
    tick = time.perf_counter()
    answer = assistant.segment(study)
    seconds = time.perf_counter() - tick
    assert answer.labels is not None
    said = answer.labels.numpy()
    grey, white = (np.asarray(load(resolution=1).dataobj) for load in (load_mni152_gm_template, load_mni152_wm_template))
    lesions = np.isin(said, [25, 57])
    return {
        "grey": dice(np.isin(said, GREY), grey > 0.5),
        "white": dice(np.isin(said, WHITE) | lesions, white > 0.5),
        "lesion_ml": float(lesions.sum()) / 1000,
        "seconds": round(seconds, 1),
        "peak_memory_gib": peak_memory_gib(),
    }


def detect(assistant: Assistant, study: Study, truth: np.ndarray) -> dict[str, Any]:
    """Lesion Dice, and how many true lesions are touched by a finding and how many findings touch none."""
    answer = assistant.answer(study, "Find lesions.", task="detect")
    assert answer.labels is not None
    said = np.isin(answer.labels.numpy(), [25, 57])
    ranks, sizes = rank_components(torch.from_numpy(truth), least=50)
    seen = assistant.examine(study.primary)
    hits = sum(bool(said[(ranks == r).numpy()].any()) for r in range(1, len(sizes) + 1))
    false = sum(not truth[(seen.lesion_ranks == x.rank).numpy()].any() for x in seen.lesions)
    ml = study.primary.voxel_ml
    return {
        "lesion_dice": dice(said, truth),
        "lesions": len(sizes),
        "found": hits,
        "findings": len(seen.lesions),
        "false": false,
        "truth_ml": round(float(truth.sum()) * ml, 1),
        "said_ml": round(float(said.sum()) * ml, 1),
    }


def picture(assistant: Assistant, out: Path) -> dict[str, Any]:
    """Draw the answer to "Write a report." on the MNI152 T1: three planes with the label map, and the text below."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from nilearn.datasets import load_mni152_template

    from omnimri.grid import closest_axes

    image = load_mni152_template(resolution=1)
    study = study_of(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine), oriented=True)
    answer = assistant.answer(study, "Write a report.", task="report")
    labels = assistant.segment(study).labels
    assert labels is not None
    volume = study.primary
    spread = torch.zeros(64, dtype=torch.int32)
    for s in STRUCTURES:
        spread[s.label] = 1 + (CLASS_OF_LABEL[s.label] * 13) % 32
    coloured = spread[labels.long()]
    x, y, z = closest_axes(volume.affine)
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 8.6), facecolor="black")
    centre = [n // 2 for n in volume.shape]
    for k, axis in enumerate((z, y, x)):
        for row in range(2):
            cut = volume.voxels[0].select(axis, centre[axis]).numpy().T[::-1, ::-1 if axis != x else 1]
            shown = coloured.select(axis, centre[axis]).numpy().T[::-1, ::-1 if axis != x else 1]
            axes[row, k].imshow(cut, cmap="gray")
            if row:
                style = {"cmap": "nipy_spectral", "vmin": 0, "vmax": 33, "alpha": 0.55, "interpolation": "nearest"}
                axes[row, k].imshow(np.ma.masked_equal(shown, 0), **style)
            axes[row, k].axis("off")
            for place, letter in ((0.02, "R" if axis != x else "P"), (0.95, "L" if axis != x else "A")):
                axes[row, k].text(place, 0.5, letter, color="yellow", transform=axes[row, k].transAxes)
    words = "\n".join(textwrap.wrap(f"Write a report. -> {answer.text}", 130))
    figure.text(0.02, 0.01, f"{words}\n{answer.notice}", color="white", fontsize=9)
    figure.subplots_adjust(0, 0.14, 1, 1, 0.01, 0.01)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "answer.png", dpi=80, facecolor="black")
    return {"text": answer.text}


def peak_memory_gib() -> float:
    """The most memory this process has held, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write results.json, and results.md with one row a number."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    rows = ["| what | value |", "|---|---|"]

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix} {k}".strip(), v)
        else:
            rows.append(f"| {prefix} | {value:.4g} |" if isinstance(value, float) else f"| {prefix} | {value} |")

    walk("", results)
    (out / "results.md").write_text("\n".join(rows) + "\n")
