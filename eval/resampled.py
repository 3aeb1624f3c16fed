"""Resampled: one labelled scan as other scanners would have stored it. What do turned arrays, coarser voxels and a mirror cost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.anatomy import MIRROR, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.volume import Study, Volume

from .cases import cases_of, open_case
from .metrics.segmentation import dice
from .reports import NOTICE, row

COARSE_MM = {"2 x 2 x 2 mm": (2.0, 2.0, 2.0), "1 x 1 x 5 mm": (1.0, 1.0, 5.0)}
LEAST_VOXELS = 25
"""A structure with fewer voxels in the truth has no Dice here."""


def turned(volume: Volume) -> tuple[Volume, Any]:
    """The same image with its axes exchanged and two of them reversed, and what brings a label map back."""
    voxels = volume.voxels.permute(0, 3, 1, 2).flip((1, 3))
    n = torch.tensor(voxels.shape[1:], dtype=torch.float64) - 1
    back = torch.zeros(4, 4, dtype=torch.float64)  # new index -> old index
    back[3, 3] = 1
    for new, (old, reverse) in enumerate(((2, True), (0, False), (1, True))):
        back[old, new] = -1 if reverse else 1
        back[old, 3] = n[new] if reverse else 0
    return replace(volume, voxels=voxels.contiguous(), affine=volume.affine @ back), lambda labels: labels.flip((0, 2)).permute(1, 2, 0)


def averaged(volume: Volume, spacing_mm: Sequence[float]) -> tuple[Volume, Any]:
    """The image in larger voxels, each the mean of what it covers, and what brings a label map back by the nearest voxel."""
    shape = volume.shape
    size = [max(1, round(n * s / mm)) for n, s, mm in zip(shape, volume.spacing_mm, spacing_mm, strict=True)]
    voxels = F.adaptive_avg_pool3d(volume.voxels[None], size)[0]
    step = torch.tensor([n / k for n, k in zip(shape, size, strict=True)], dtype=torch.float64)
    affine = volume.affine.clone()
    affine[:3, :3] *= step
    affine[:3, 3] = (volume.affine @ torch.cat([(step - 1) / 2, torch.ones(1, dtype=torch.float64)]))[:3]
    index = [((torch.arange(n) + 0.5) / s).long().clamp(max=k - 1) for n, s, k in zip(shape, step.tolist(), size, strict=True)]
    return replace(volume, voxels=voxels, affine=affine), lambda labels: labels[index[0]][:, index[1]][:, :, index[2]]


def commonest(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The label that covers most of each of `size` larger voxels, which are those of `averaged`."""
    share, found = torch.zeros(list(size)), torch.zeros(list(size), dtype=torch.long)
    for label in np.unique(labels):
        here = F.adaptive_avg_pool3d(torch.from_numpy(labels == label)[None].float(), list(size))[0]
        found, share = torch.where(here > share, int(label), found), torch.maximum(here, share)
    return found.numpy()


def mirrored(volume: Volume) -> tuple[Volume, Any]:
    """A person with left and right exchanged: the array is reversed along the axis nearest to x, the affine stays."""
    axis = int(volume.affine[0, :3].abs().argmax())
    label_of = {s.name: s.label for s in STRUCTURES}
    table = torch.arange(256)
    for s in STRUCTURES:
        table[s.label] = label_of[MIRROR[s.name]]
    return replace(volume, voxels=volume.voxels.flip(1 + axis)), lambda labels: table[labels.flip(axis).long()].to(labels.dtype)


def structures_dice(labels: Tensor, truth: np.ndarray, least: int = LEAST_VOXELS) -> dict[str, float]:
    """Dice of every structure that the truth holds."""
    said = labels.numpy()
    return {s.name: dice(said == s.label, truth == s.label) for s in STRUCTURES if int((truth == s.label).sum()) >= least}


def measure(assistant: Assistant, scans: Sequence[Path]) -> dict[str, Any]:
    """Mean Dice of the structures of every labelled scan, as it is and as it might have been stored."""
    found: dict[str, Any] = {}
    for case in cases_of("freesurfer", scans=scans):
        study, truth = open_case(case)
        assert truth.labels is not None
        volume = study.primary
        ways = {"as it is": (volume, lambda x: x), "axes exchanged and reversed": turned(volume), "mirrored person": mirrored(volume)}
        ways |= {name: averaged(volume, mm) for name, mm in COARSE_MM.items()}
        for name, (other, back) in ways.items():
            labels = assistant.segment(Study(volumes=(other,))).labels
            assert labels is not None
            each = structures_dice(back(labels), truth.labels)
            found.setdefault(case.name, {})[name] = {"mean": float(np.mean(list(each.values()))), **each}
            assistant.forget()
            print(case.name, name, round(found[case.name][name]["mean"], 3), flush=True)
            if name in COARSE_MM:
                # The same structures, however few coarse voxels they have.
                own = structures_dice(labels, commonest(truth.labels, labels.shape), least=1)
                each = {k: v for k, v in own.items() if k in each}
                found[case.name][f"{name}, in these voxels"] = {"mean": float(np.mean(list(each.values()))), **each}
                # The truth itself, read at the middle of every coarse voxel: what no model could be better than by much.
                there, _ = averaged(replace(volume, voxels=torch.from_numpy(truth.labels)[None].float()), COARSE_MM[name])
                middle = [((torch.arange(k) + 0.5) * n / k).long() for n, k in zip(volume.shape, there.shape, strict=True)]
                coarse = torch.from_numpy(truth.labels)[middle[0]][:, middle[1]][:, :, middle[2]]
                each = structures_dice(back(coarse), truth.labels)
                found[case.name][f"the truth at {name}"] = {"mean": float(np.mean(list(each.values()))), **each}
    return found


def markdown(found: dict[str, Any]) -> str:
    """A table a scan."""
    told = (f"{NOTICE} Dice on the scan's own voxels, to which coarse masks are brought back by the nearest voxel; and in the coarse "
            "voxels, of which the truth is the label that covers most of each.")
    lines = ["# The same scan, stored otherwise", "", told, ""]
    for case, ways in found.items():
        lines += [f"## {case}", "", row("structure", *ways), row(*["---"] * (1 + len(ways)))]
        for name in next(iter(ways.values())):
            lines.append(row(name, *(f"{way[name]:.3f}" if name in way else "" for way in ways.values())))
    return "\n".join([*lines, ""])
