"""Synthetic: label maps -> MR studies by signal equations, with exact masks, boxes, k-space and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from omnimri.anatomy import CLASS_OF_LABEL
from omnimri.example import Record

from .describe import describe
from .recipe import Recipe, generator, pick
from .scanner import CODE_OF_EXTRA, LEFT_WMH, NUM_STRUCTURES, RIGHT_WMH, draw_scan, scan_record

_EXTRA_OF_LABEL = {
    30: "vessel", 62: "vessel", 72: "fifth ventricle", 85: "chiasm", 502: "vessel", 506: "eye", 507: "soft tissue",
    508: "optic nerve", 509: "mucosa", 511: "skin", 512: "cord", 514: "dura", 515: "bone", 516: "marrow", 530: "eye",
}
_SAME_AS = {136: 4, 137: 5, 163: 43, 164: 44}
TRAINING_MAPS = tuple(range(1, 17))
CHOOSING_MAPS = tuple(range(17, 21))


class Synthetic(Recipe):
    """Whole-head label maps rendered as MRI."""

    name = "synthetic"
    licence = "Apache-2.0"
    citation = "Billot et al., SynthSeg, Medical Image Analysis 2023 (label maps of github.com/BBillot/SynthSeg)"
    obtain = "training_seg_01..20.nii.gz from the SynthSeg repository's data/training_label_maps, into one folder"
    tasks = ("segment", "detect", "reconstruct", "report")

    def __init__(
        self,
        folder: str | Path,
        *,
        numbers: Sequence[int] = TRAINING_MAPS,
        image_size: int = 192,
        num_slices: int = 8,
        mirror: bool = True,
        with_kspace: bool = True,
        device: str = "cpu",
    ) -> None:
        """Read the label maps once.

        Args:
            folder: Holds `training_seg_%02d.nii.gz`.
            numbers: Which maps to use.

        Raises:
            ValueError: a map is missing.
        """
        self.image_size, self.num_slices, self.mirror = image_size, num_slices, mirror
        self.with_kspace, self.device = with_kspace, torch.device(device)
        self.maps = [_read_map(Path(folder) / f"training_seg_{n:02d}.nii.gz", self.device) for n in numbers]

    def record(self, seed: int, index: int) -> Record:
        """One study of one head."""
        g = generator(seed, self.name, index)
        codes, low, high, centre = pick(g, self.maps)
        scan = draw_scan(
            g,
            num_slices=self.num_slices,
            size=self.image_size,
            brain_box=(low, high),
            head_centre=centre,
            mirror=self.mirror,
        )

        def lookup(points: Tensor) -> Tensor:
            x, y, z = (points + 0.5).floor().int().unbind(-1)
            a, b, c = codes.shape
            inside = (x >= 0) & (x < a) & (y >= 0) & (y < b) & (z >= 0) & (z < c)
            flat = (x.clamp(0, a - 1) * b + y.clamp(0, b - 1)) * c + z.clamp(0, c - 1)
            return codes.view(-1)[flat] * inside

        found = scan_record(
            g, scan, lookup, size=self.image_size, with_kspace=self.with_kspace, device=self.device
        )
        return describe(found, g)


def _read_map(path: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(uint8 codes in RAS+ voxels of 1 mm, brain box low, brain box high, head centre)."""
    import nibabel
    import numpy as np

    if not path.exists():
        raise ValueError(f"expected a label map at {path}, found none; {Synthetic.obtain}")
    image = nibabel.as_closest_canonical(nibabel.load(path))
    labels = np.asarray(image.dataobj).astype(np.int16)
    table = np.zeros(1024, dtype=np.uint8)
    for label, k in CLASS_OF_LABEL.items():
        table[label] = k
    for label, same in _SAME_AS.items():
        table[label] = CLASS_OF_LABEL[same]
    for label, name in _EXTRA_OF_LABEL.items():
        table[label] = CODE_OF_EXTRA[name]
    table[25], table[57] = LEFT_WMH, RIGHT_WMH
    codes = torch.from_numpy(table[labels])
    brain = torch.nonzero(((codes > 0) & (codes <= NUM_STRUCTURES))[::2, ::2, ::2]).double() * 2
    low, high = torch.quantile(brain[::7], torch.tensor([0.001, 0.999]).double(), dim=0).float()
    head = torch.nonzero((codes > 0)[::2, ::2, ::2]).float() * 2
    centre = (torch.quantile(head[::37], 0.001, dim=0) + torch.quantile(head[::37], 0.999, dim=0)) / 2
    return codes.to(device).contiguous().share_memory_(), low, high, centre
