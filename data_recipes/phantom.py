"""Phantom: an analytic head of ellipsoids with sided structures and lesions, from code alone."""

from __future__ import annotations

import torch
from torch import Tensor

from omnimri.anatomy import CLASS_OF_NAME
from omnimri.example import Record
from omnimri.grid import COLUMNS, NORMAL, ROWS
from omnimri.volume import Volume

from .describe import describe
from .recipe import Recipe, generator
from .scanner import draw_scan, scan_record
from .tissue import CODE

# name, centre (right, anterior, superior) and radii in mm; sided parts are given for the right side.
_PARTS: tuple[tuple[str, tuple[float, float, float], tuple[float, float, float]], ...] = (
    ("CSF", (0, 0, 0), (72, 88, 66)),
    ("cerebral cortex", (1, 0, 3), (64, 79, 57)),
    ("cerebral white matter", (2, 0, 4), (49, 63, 43)),
    ("lateral ventricle", (14, -2, 13), (10, 30, 13)),
    ("thalamus", (15, -14, -7), (12, 16, 11)),
    ("caudate", (16, 27, 5), (10, 15, 12)),
    ("putamen", (35, 8, -3), (9, 20, 15)),
    ("hippocampus", (33, -22, -22), (10, 22, 9)),
    ("cerebellum cortex", (24, -54, -42), (26, 26, 20)),
    ("brain-stem", (0, -20, -44), (14, 14, 28)),
    ("4th ventricle", (0, -37, -40), (9, 8, 10)),
)
_SIDED = {"cerebral cortex", "cerebral white matter", "lateral ventricle", "thalamus", "caudate", "putamen",
          "hippocampus", "cerebellum cortex"}


class Phantom(Recipe):
    """An analytic head; every person's proportions differ."""

    name = "phantom"
    licence = "Apache-2.0"
    citation = "This project"
    obtain = "nothing to obtain: made by code"
    tasks = ("segment", "detect", "reconstruct", "report")

    def __init__(
        self, *, image_size: int = 96, num_slices: int = 4, mirror: bool = True, kspace_size: int = 96, device: str = "cpu"
    ) -> None:
        self.image_size, self.num_slices, self.mirror = image_size, num_slices, mirror
        self.kspace_size, self.device = kspace_size, torch.device(device)

    def record(self, seed: int, index: int) -> Record:
        """One study of one analytic head."""
        g = generator(seed, self.name, index)
        jitter = 1 + 0.04 * torch.randn(len(_PARTS), 3, generator=g).clamp(-2, 2)
        box = (torch.tensor([-62.0, -76, -54]), torch.tensor([62.0, 76, 56]))
        scan = draw_scan(
            g,
            num_slices=self.num_slices,
            size=self.image_size,
            brain_box=box,
            head_centre=torch.tensor([0.0, 4, 0]),
            mirror=self.mirror,
            normal_share=0.4,
            variation=0.3,
            sequences={"T1w": 0.24, "T1w-Gd": 0.19, "T2w": 0.24, "PDw": 0.08, "FLAIR": 0.23, "other": 0.02},
        )

        def lookup(points: Tensor, offsets: Tensor) -> Tensor:
            return torch.stack([head_codes((points + o.to(points.device).view(3, 1, 1, 1)).movedim(0, -1), jitter) for o in offsets])

        found = scan_record(g, scan, lookup, brain_box=box, ventricles=None, size=self.image_size, num_samples=1,
                            kspace_size=self.kspace_size, device=self.device)
        return describe(found, g)

    def retell(self, record: Record, g: torch.Generator) -> Record:
        """Described once more."""
        return describe(record, g)


def head_codes(points: Tensor, jitter: Tensor) -> Tensor:
    """(..., 3) mm -> (...) uint8 tissue codes. The head is asymmetric: the right frontal pole bulges."""
    x, y, z = points.unbind(-1)
    right = x > 0

    def inside(centre: tuple[float, float, float], radii: Tensor, x: Tensor = x) -> Tensor:
        a, b, c = radii.tolist()
        return ((x - centre[0]) / a) ** 2 + ((y - centre[1]) / b) ** 2 + ((z - centre[2]) / c) ** 2 < 1

    codes = torch.zeros(points.shape[:-1], dtype=torch.uint8, device=points.device)
    codes[inside((0, 4, 0), torch.tensor([84.0, 100, 79]))] = CODE["skin"]
    codes[inside((0, 4, 0), torch.tensor([80.0, 96, 75]))] = CODE["bone"]
    codes[inside((34, 93, -14), torch.tensor([12.0, 12, 12]))] = CODE["eye"]
    codes[inside((-34, 93, -14), torch.tensor([9.0, 9, 9]))] = CODE["eye"]
    for (name, centre, radii), scale in zip(_PARTS, jitter, strict=True):
        size = torch.tensor(radii) * scale
        if name in _SIDED:
            where = inside(centre, size, x.abs())
            codes[where & right] = CLASS_OF_NAME[f"right {name}"]
            codes[where & ~right] = CLASS_OF_NAME[f"left {name}"]
        else:
            codes[inside(centre, size)] = CLASS_OF_NAME[name]
    return codes


def record_volume(record: Record) -> Volume:
    """The middle channel of a record as a volume in scanner space, RAS+ mm, centred at the lattice's middle."""
    voxels = record.images[:, 1].permute(2, 1, 0).contiguous()
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[3, 3] = 1
    column_axis, column_sign = COLUMNS[record.plane]
    row_axis, row_sign = ROWS[record.plane]
    affine[column_axis, 0] = column_sign * record.spacing_mm[2]
    affine[row_axis, 1] = row_sign * record.spacing_mm[1]
    affine[NORMAL[record.plane], 2] = record.spacing_mm[0]
    middle = (torch.tensor(voxels.shape, dtype=torch.float64) - 1) / 2
    affine[:3, 3] = -(affine[:3, :3] @ middle)
    return Volume(voxels=voxels[None].float(), affine=affine, sequence=record.sequence or "unknown")
