"""Head: a label map in memory, the shells of its structures, and the warp that makes other people's heads of it.

Coordinates are (3, ...) tensors, mm in RAS+ order: scan space outside, the head's own voxels (1 mm) inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimri.anatomy import CLASS_OF_LABEL
from omnimri.grid import COLUMNS, NORMAL, ROWS

from .recipe import uniform
from .tissue import CODE, CORTEX_SHELLS, FLUID_SHELLS, NUM_STRUCTURES, WHITE_SHELLS

Lookup = Callable[[Tensor, Tensor], Tensor]
"""(3, ...) mm and (K, 3) mm offsets -> (K, ...) uint8 codes."""
EXTRA_OF_LABEL = {
    30: "vessel", 62: "vessel", 72: "fifth ventricle", 85: "chiasm", 502: "vessel", 506: "eye", 507: "soft tissue",
    508: "optic nerve", 509: "mucosa", 511: "skin", 512: "cord", 514: "dura", 515: "bone", 516: "marrow", 530: "eye",
}
PAD = 10
"""Voxels of air around a label map; samples lie at most `PAD` - 1 beyond its edge."""
SAME_AS = {136: 4, 137: 5, 163: 43, 164: 44, 25: 0, 57: 0}


@dataclass(frozen=True)
class Head:
    """One person."""

    codes: Tensor
    """(X, Y, Z) uint8, RAS+ voxels of 1 mm, with `PAD` voxels of air on every side."""
    low: Tensor
    """(3,) lowest corner of the brain, in voxels of the map without its padding, as all places are."""
    high: Tensor
    centre: Tensor
    """(3,) middle of the head."""
    ventricles: Tensor
    """(2, 3) middle of the left and of the right lateral ventricle."""

    def lookup(self, points: Tensor, offsets: Tensor) -> Tensor:
        """Codes at points, once for each offset; background outside. A `Lookup`."""
        _, b, c = self.codes.shape
        assert float(offsets.abs().max()) < PAD - 5
        x, y, z = (p.clamp(-4.0, n - 2 * PAD + 3.0) for p, n in zip(points, self.codes.shape, strict=True))
        flat = self.codes.view(-1)
        found = torch.empty(len(offsets), *x.shape, dtype=torch.uint8, device=points.device)
        for k, (dx, dy, dz) in enumerate((offsets + (PAD + 0.5)).tolist()):
            index = ((x + dx).int() * b + (y + dy).int()) * c + (z + dz).int()
            torch.index_select(flat, 0, index.view(-1), out=found[k].view(-1))
        return found


def read_head(path: Path, device: torch.device) -> Head:
    """Read a label map of FreeSurfer ids.

    Raises:
        ValueError: no such file, not a volume of whole numbers, not 1 mm, ids that are not known, or no brain in it.
    """
    import nibabel
    import numpy as np

    if not path.exists():
        raise ValueError(f"expected a label map at {path}, found none; 'python -m data_recipes list' says where to get them")
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asarray(image.dataobj)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"expected a NIfTI label map, got {path.name} that cannot be read ({type(error).__name__})") from None
    spacing = image.header.get_zooms()
    if values.ndim != 3 or any(abs(s - 1) > 0.05 for s in spacing[:3]) or min(values.shape) < 64:
        raise ValueError(f"expected a whole head in voxels of 1 mm, got {path.name} of shape {values.shape} and {spacing} mm; resample it")
    known = {0: 0, 25: CODE["left wmh"], 57: CODE["right wmh"], **CLASS_OF_LABEL}
    known |= {label: CODE[name] for label, name in EXTRA_OF_LABEL.items()}
    known |= {label: CLASS_OF_LABEL[same] for label, same in SAME_AS.items() if same}
    unknown = sorted(set(np.unique(values).tolist()) - set(known))
    if unknown:
        raise ValueError(f"expected FreeSurfer's ids and extra-cerebral ids 502 to 530, got {unknown[:5]} in {path.name}; map them first")
    table = np.zeros(1024, dtype=np.uint8)
    for label, k in known.items():
        table[label] = k
    codes = torch.from_numpy(table[values.astype(np.int16)])
    brain = torch.nonzero(((codes > 0) & (codes <= NUM_STRUCTURES))[::2, ::2, ::2]).double() * 2
    sides = [torch.nonzero(codes[::2, ::2, ::2] == CODE[f"{s} lateral ventricle"]).float() * 2 for s in ("left", "right")]
    if len(brain) < 10_000 or min(map(len, sides)) == 0 or not float(sides[0][:, 0].mean()) < float(sides[1][:, 0].mean()):
        raise ValueError(f"expected a whole brain with its left on the left, got {path.name} without; check its orientation")
    low, high = torch.quantile(brain[::7], torch.tensor([0.001, 0.999]).double(), dim=0).float()
    head = torch.nonzero((codes > 0)[::2, ::2, ::2]).float() * 2
    centre = (torch.quantile(head[::37], 0.001, dim=0) + torch.quantile(head[::37], 0.999, dim=0)) / 2
    codes = F.pad(with_shells(codes, low, high), [PAD] * 6)
    return Head(codes.to(device).contiguous().share_memory_(), low, high, centre, torch.stack([s.mean(0) for s in sides]))


def with_shells(codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Name the shells of `tissue` in (X, Y, Z) codes, within the box of the brain."""
    a, b = (low - 8).int().clamp(min=0).tolist(), (high + 9).int().tolist()
    box = codes[a[0] : b[0], a[1] : b[1], a[2] : b[2]]

    def grow(where: Tensor) -> Tensor:
        wide = where.clone()
        for axis in range(3):
            n = where.shape[axis]
            wide.narrow(axis, 1, n - 1).logical_or_(where.narrow(axis, 0, n - 1))
            wide.narrow(axis, 0, n - 1).logical_or_(where.narrow(axis, 1, n - 1))
        return wide

    structure = (box > 0) & (box <= NUM_STRUCTURES)
    fluid = box == CODE["CSF"]
    outside, near = ~structure | fluid, structure & ~fluid
    for k in range(1, CORTEX_SHELLS + 1):
        outside = grow(outside)
        for side in ("left", "right"):
            box[outside & (box == CODE[f"{side} cerebral cortex"])] = CODE[f"{side} cortex {k}"]
    for k in range(1, FLUID_SHELLS + 1):
        near = grow(near)
        box[near & (box == CODE["CSF"])] = CODE[f"fluid {k}"]
    for side in ("left", "right"):
        wet = box == CODE[f"{side} lateral ventricle"]
        for k in range(1, WHITE_SHELLS + 1):
            wet = grow(wet)
            box[wet & (box == CODE[f"{side} cerebral white matter"])] = CODE[f"{side} periventricular {k}"]
    return codes


Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Lattice:
    """Where the samples of a study lie in scan space: every axis follows one patient axis."""

    plane: str
    along: Tensor
    """(P,) mm of the planes along the slice normal, in any order."""
    rows: Tensor
    """(H,) mm along the patient axis of the rows, signed as the rows run."""
    columns: Tensor
    """(W,)"""

    @property
    def axes(self) -> tuple[int, int, int]:
        """Patient axis of planes, rows and columns."""
        return NORMAL[self.plane], ROWS[self.plane][0], COLUMNS[self.plane][0]

    def points(self, box: Box = (slice(None), slice(None), slice(None))) -> Tensor:
        """(3, p, h, w) mm, RAS+."""
        lines = [line[part] for line, part in zip((self.along, self.rows, self.columns), box, strict=True)]
        found = torch.empty(3, *map(len, lines), device=self.along.device)
        for k, (axis, line) in enumerate(zip(self.axes, lines, strict=True)):
            found[axis] = line.view([-1 if d == k else 1 for d in range(3)])
        return found

    def near(self, centre_mm: Tensor, reach_mm: float) -> Box | None:
        """The part of the lattice within reach of a point along every axis; None where there is none."""
        parts = []
        for axis, line in zip(self.axes, (self.along, self.rows, self.columns), strict=True):
            inside = torch.nonzero((line - float(centre_mm[axis])).abs() < reach_mm).flatten()
            if len(inside) == 0:
                return None
            parts.append(slice(int(inside[0]), int(inside[-1]) + 1))
        return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Push:
    """Tissue that a mass pushes away, or that falls into what was lost (`amount` below zero)."""

    centre_mm: Tensor
    """(3,)"""
    radius_mm: float
    reach_mm: float
    amount: float
    """How far tissue at the border is drawn from: 1 displaces most of what was there."""

    def __call__(self, points: Tensor, lattice: Lattice) -> None:
        """Move points (3, P, H, W) in place to where in the unharmed head their tissue comes from."""
        box = lattice.near(self.centre_mm, self.reach_mm)
        if box is None:
            return
        off = lattice.points(box) - self.centre_mm.to(points.device).view(3, 1, 1, 1)
        r = (off[0] * off[0] + off[1] * off[1] + off[2] * off[2]).sqrt_()
        # Tissue at radius r comes from nearer to the centre: most of the radius of the mass at its border, nothing at the reach.
        fall = ((self.reach_mm - r) / (self.reach_mm - self.radius_mm)).clamp(0, 1)
        inner = (r / self.radius_mm).clamp(max=1)
        points[(slice(None), *box)] -= off / r.clamp(min=1e-3) * (self.amount * self.radius_mm * 0.8 * fall * fall * inner)


@dataclass(frozen=True)
class Warp:
    """Scan space to a head's own voxels: turn, scale, asymmetry, bend, and ventricles of another size."""

    matrix: Tensor
    centre: Tensor
    coarse: Tensor
    """(3, nodes, 7, 7) displacement in mm, the nodes evenly along the slices."""
    widths: tuple[float, float]
    """By how much the left and the right lateral ventricle are wider (positive) or narrower."""
    asymmetry: float
    mirrored: bool

    def __call__(self, points: Tensor, positions_mm: Tensor, ventricles: Tensor | None = None) -> Tensor:
        """(3, P, H, W) mm in scan space, planes at (P,) positions -> the same in the head."""
        device = points.device
        moved = torch.einsum("ab,bphw->aphw", self.matrix.to(device), points)
        nodes = self.coarse.shape[1]
        fine = F.interpolate(self.coarse.to(device), size=points.shape[2:], mode="bilinear", align_corners=True)
        place = (positions_mm.to(device) - positions_mm.min()) / (positions_mm.max() - positions_mm.min()).clamp(min=1) * (nodes - 1)
        weights = (1 - (place[:, None] - torch.arange(nodes, device=device)).abs()).clamp(min=0)
        moved += torch.einsum("pn,anhw->aphw", weights, fine)
        if self.mirrored:
            moved[0].neg_()
        moved[0] *= 1 + self.asymmetry * moved[0].sign()
        moved += self.centre.to(device).view(3, 1, 1, 1)
        if ventricles is not None:
            for middle, width in zip(ventricles, self.widths, strict=True):
                if width:
                    off = moved - middle.to(device).view(3, 1, 1, 1)
                    near = (off[0] * off[0] + off[1] * off[1] + off[2] * off[2]).mul_(-1 / (2 * 24.0**2)).exp_()
                    moved -= off.mul_(near.mul_(width))
        return moved


def draw_warp(
    g: torch.Generator, centre: Tensor, extent_mm: float, *, mirrored: bool, hydrocephalus: bool, variation: float
) -> Warp:
    """Draw a warp; `centre` is the middle of the lattice in the head, mm, and `extent_mm` its length along the slices."""
    angle = torch.randn(3, generator=g) * math.radians(7) * variation
    (cx, cy, cz), (sx, sy, sz) = angle.cos(), angle.sin()
    rx = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    scale = torch.diag(1 + 0.08 * variation * torch.randn(3, generator=g).clamp(-2, 2))
    coarse = torch.randn(3, 1 + math.ceil(extent_mm / 30), 7, 7, generator=g) * uniform(g, 0.5, 3.0) * variation
    width = uniform(g, 0.35, 0.55) if hydrocephalus else uniform(g, -0.2, 0.35) * variation
    uneven = uniform(g, -0.06, 0.06) * variation
    return Warp(rx @ ry @ rz @ scale, centre, coarse, (width + uneven, width - uneven), uniform(g, -0.04, 0.04) * variation, mirrored)
