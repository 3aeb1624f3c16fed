"""Synthetic: label maps -> MR studies by signal equations, with exact masks, boxes, k-space and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from omnimri.example import Record

from .acquisition import draw_thick_slices
from .describe import describe
from .head import read_head
from .recipe import Recipe, generator, pick, uniform
from .scanner import draw_scan, scan_record

TRAINING_MAPS = tuple(range(1, 17))
CHOOSING_MAPS = tuple(range(17, 21))
LEAST_BRAIN = 0.05
"""A study with less brain in all, in slices, is drawn again: a thin slab may miss it."""
WIDEST_ACROSS_MM = 3.0
"""Slices that lie across thick ones are no further apart than that."""


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
        kspace_size: int = 96,
        across_share: float = 0.0,
        device: str = "cpu",
    ) -> None:
        """Read the label maps once.

        Args:
            folder: Holds `training_seg_%02d.nii.gz`.
            numbers: Which maps to use.
            across_share: Of the studies without wide gaps, how many look like thick slices of another plane.

        Raises:
            ValueError: no such folder, or a map is missing or cannot be used.
        """
        self.image_size, self.num_slices, self.mirror = image_size, num_slices, mirror
        self.kspace_size, self.across_share, self.device = kspace_size, across_share, torch.device(device)
        if not Path(folder).is_dir():
            raise ValueError(f"expected a folder of label maps, got {Path(folder).name!r} that is none; obtain: {self.obtain}")
        self.heads = [read_head(Path(folder) / f"training_seg_{n:02d}.nii.gz", self.device) for n in numbers]

    def record(self, seed: int, index: int) -> Record:
        """One study of one head."""
        g = generator(seed, self.name, index)
        other = generator(seed, self.name, index, "across")
        across = draw_thick_slices(other) if self.across_share and uniform(other, 0, 1) < self.across_share else None
        while True:
            head = pick(g, self.heads)
            box = head.low, head.high
            scan = draw_scan(g, num_slices=self.num_slices, size=self.image_size, brain_box=box, head_centre=head.centre,
                             mirror=self.mirror)
            found = scan_record(g, scan, head.lookup, brain_box=box, ventricles=head.ventricles, size=self.image_size, num_samples=5,
                                kspace_size=self.kspace_size, device=self.device,
                                thick=across if scan.native_mm <= WIDEST_ACROSS_MM else None)
            assert found.labels is not None
            if int((found.labels > 0).sum()) >= LEAST_BRAIN * self.image_size**2:
                return describe(found, g, wide=True)

    def retell(self, record: Record, g: torch.Generator) -> Record:
        """Described once more."""
        return describe(record, g, wide=True)
