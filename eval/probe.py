"""What frozen encoders know: a linear probe from their patch features to structures, with many studies and with few.

Every encoder sees the same slices as the model would show them; its patch features, without the place that the model adds, are mapped by
ridge regression to the share of each patch that each structure covers (sides as one), brought to every second pixel, and the largest
share is taken. Random weights of the same form stand beside each, and what the true shares give, read in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from data_recipes import Synthetic
from data_recipes.synthetic import CHOOSING_MAPS, TRAINING_MAPS
from omnimri.anatomy import PLANES
from omnimri.assistant import Assistant
from omnimri.example import classes_of, normalise
from omnimri.grid import Grid
from omnimri.measure import STEM_OF_CLASS, STEMS
from omnimri.model.omnimri import OmniMRI

from .realism import real_scans
from .resampling import mean_estimate

FEW, SHRINKAGE, LEAST_PIXELS = 8, 10.0, 30
"""Studies of the probe of few; ridge on standardised features; pixels from which on a structure of a study counts."""


@torch.inference_mode()
def patch_features(encoder: nn.Module, images_SCHW: Tensor) -> Tensor:
    """(S, g, g, D) features of the g x g patches of each slice, whose size is brought to the nearest multiple of a patch."""
    patch, g = encoder.config.patch_size, round(images_SCHW.shape[-1] / encoder.config.patch_size)
    if g * patch != images_SCHW.shape[-1]:
        images_SCHW = F.interpolate(images_SCHW, size=(g * patch, g * patch), mode="bilinear", antialias=True)
    tokens = encoder(images_SCHW).last_hidden_state
    return tokens[:, -g * g :].float().view(len(tokens), g, g, -1)


def shares(classes_SHW: Tensor, g: int) -> Tensor:
    """(S, g, g, kinds) share of each patch that background and each structure cover."""
    one = F.one_hot(STEM_OF_CLASS[classes_SHW.long()], len(STEMS) + 1).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(one, g).permute(0, 2, 3, 1)


class PixelFeatures(nn.Module):
    """The pixel decoder's features, pooled over patches of 16 pixels; each slice by itself, in the place of a middle axial one."""

    def __init__(self, model: OmniMRI) -> None:
        super().__init__()
        self.vision, self.decoder = model.vision, model.heads["pixels"]
        self.config = SimpleNamespace(patch_size=16)

    def forward(self, images_NCHW: Tensor) -> SimpleNamespace:
        """(N, 3, H, W) -> `last_hidden_state` (N, H W / 256, 4 C), as an encoder without prefix gives it."""
        n = len(images_NCHW)
        patches = self.vision(images_NCHW, torch.zeros(n), torch.full((n,), PLANES.index("axial")))
        levels, x = self.decoder.below(images_NCHW, patches)
        fine = self.decoder.above(levels, self.decoder.depth(x, torch.zeros(n, 1))).fine
        return SimpleNamespace(last_hidden_state=F.avg_pool2d(fine, 8).flatten(2).transpose(1, 2))


class Probe:
    """Ridge regression from standardised features."""

    def __init__(self, features_ND: Tensor, targets_NK: Tensor) -> None:
        self.mean, self.scale = features_ND.mean(0), features_ND.std(0) + 1e-6
        x = self._standard(features_ND)
        self.weight = torch.linalg.solve(x.T @ x + SHRINKAGE * torch.eye(x.shape[1]), x.T @ targets_NK)

    def _standard(self, features: Tensor) -> Tensor:
        x = (features - self.mean) / self.scale
        return torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)

    def classes(self, features_SggD: Tensor, size: int) -> Tensor:
        """(S, size, size) classes."""
        return largest(self._standard(features_SggD) @ self.weight, size)


def largest(shares_SggK: Tensor, size: int) -> Tensor:
    """(S, size, size) kinds with the largest share, between patches by interpolation."""
    return F.interpolate(shares_SggK.permute(0, 3, 1, 2), size=(size, size), mode="bilinear").argmax(1)


def mean_dice(said: Tensor, classes_SHW: Tensor) -> float:
    """Mean Dice of the structures of a study on every second pixel; nan where there is none."""
    truth = STEM_OF_CLASS[classes_SHW[:, ::2, ::2].long()]
    found = []
    for k in range(1, len(STEMS) + 1):
        a, b = said == k, truth == k
        if int(b.sum()) >= LEAST_PIXELS:
            found.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(found)) if found else float("nan")


def of_maps(maps: Path, numbers: Sequence[int], seed: int, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (S, 3, H, W) and classes (S, H, W) of simulated studies of four slices."""
    recipe = Synthetic(maps, numbers=numbers, num_slices=4, kspace_size=0, image_size=size)
    for i in range(count):
        record = recipe.record(seed, i)
        assert record.labels is not None
        yield normalise(record.images), record.labels


def of_scans(folders: Sequence[Path], size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Every fourth slice of real scans whose structures somebody drew."""
    found = {}
    for case in real_scans(folders):
        if case.labels is not None:
            volume = case.study.primary
            grid = Grid.fit(volume, size=size)
            images, classes = normalise(grid.to_grid(volume.voxels[0])), classes_of(grid.nearest(torch.as_tensor(case.labels)))
            found[case.name] = (images[::4], classes[::4])
    return found


def encoders_of(assistant: Assistant, folders: Sequence[Path]) -> dict[str, nn.Module]:
    """The assistant's own, those of folders in transformers' form, random weights of the same forms, and the assistant's pixel decoder.

    Raises:
        ValueError: a folder holds no encoder.
    """
    found: dict[str, nn.Module] = {assistant.name: assistant.model.vision.backbone}
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ValueError(f"expected an encoder's folder with config.json and weights, got {folder.name!r}; see omnimri fetch vision")
        found[folder.name] = AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    for name, encoder in tuple(found.items()):
        torch.manual_seed(0)
        found[f"random weights of the form of {name}"] = AutoModel.from_config(encoder.config)
    found[f"{assistant.name}, pixel decoder"] = PixelFeatures(assistant.model)
    return {name: encoder.float().eval() for name, encoder in found.items()}


def measure(assistant: Assistant, maps: Path, folders: Sequence[Path], encoders: Sequence[Path], *, count: int = 200) -> dict[str, Any]:
    """Mean Dice of structures by probes of every encoder.

    Args:
        maps: Label maps; probes are fitted on studies of those for training, and asked on a third as many of the others.
        folders: Of validation scans.
        encoders: Folders of more encoders.
        count: Studies that a probe is fitted to.
    """
    size = assistant.model.config.image_size
    fitted = list(of_maps(maps, TRAINING_MAPS, 201, count, size))
    asked = list(of_maps(maps, CHOOSING_MAPS, 202, max(1, count // 3), size))
    scans = of_scans(folders, size)
    results: dict[str, Any] = {"studies": count, "few": FEW, "asked": len(asked), "encoders": {}}
    for name, encoder in encoders_of(assistant, encoders).items():
        features = [patch_features(encoder, images) for images, _ in fitted]
        targets = [shares(classes, f.shape[1]) for f, (_, classes) in zip(features, fitted, strict=True)]
        tick = time.perf_counter()
        seen = [(patch_features(encoder, images), classes) for images, classes in asked]
        seconds = (time.perf_counter() - tick) / sum(len(images) for images, _ in asked)
        seen_scans = {scan: (patch_features(encoder, images), classes) for scan, (images, classes) in scans.items()}
        told: dict[str, Any] = {"parameters": sum(p.numel() for p in encoder.parameters()), "patch": encoder.config.patch_size,
                                "seconds a slice": seconds}
        for title, number in (("all", count), ("few", FEW)):
            probe = Probe(*(torch.cat([x.flatten(0, 2) for x in part[:number]]) for part in (features, targets)))
            told[title] = vars(mean_estimate([mean_dice(probe.classes(f, size // 2), c) for f, c in seen]))
            told[f"scans, {title}"] = {scan: mean_dice(probe.classes(f, size // 2), c) for scan, (f, c) in seen_scans.items()}
        results["encoders"][name] = told
    best = {patch: mean_estimate([mean_dice(largest(shares(c, round(size / patch)), size // 2), c) for _, c in asked])
            for patch in sorted({told["patch"] for told in results["encoders"].values()})}
    return results | {"true shares": {patch: vars(found) for patch, found in best.items()}}


def markdown(results: Mapping[str, Any]) -> str:
    """results.md."""
    scans = list(next(iter(results["encoders"].values()))["scans, all"])
    lines = [
        "# What frozen encoders know",
        "",
        (
            "Research use only. Not a medical device. Mean Dice of structures, sides as one, by a linear probe of patch features, fitted "
            f"to {results['studies']} and to {results['few']} simulated studies of four slices; on {results['asked']} others, of "
            "heads that neither a probe nor the embedded model was trained on (95 % intervals by study), and on real scans. True shares of "
            "the patches, read as the probes' are, give "
            + " and ".join(f"{told['value']:.3f} in patches of {patch}" for patch, told in results["true shares"].items())
            + ". Time is that of a slice over the first one's."
        ),
        "",
        f"| encoder | parameters | patch | time | {results['studies']} studies | {results['few']} studies | "
        + " | ".join(f"{scan}, {n}" for scan in scans for n in (results["studies"], results["few"])) + " |",
        "|---" * (6 + 2 * len(scans)) + "|",
    ]  # fmt: skip
    first = next(iter(results["encoders"].values()))["seconds a slice"]
    for name, told in results["encoders"].items():
        cells = [f"{told['parameters'] / 1e6:.1f} M", str(told["patch"]), f"{told['seconds a slice'] / first:.1f}"]
        cells += [f"{told[t]['value']:.3f} [{told[t]['low']:.3f}, {told[t]['high']:.3f}]" for t in ("all", "few")]
        cells += [f"{told[f'scans, {t}'][scan]:.3f}" for scan in scans for t in ("all", "few")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
