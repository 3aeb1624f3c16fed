"""Grid: the lattice the model sees, aligned with the scan's own axes; `to_grid` and `sections` are inverses.

Lattice axes are (slice, row, column). Rows run superior or anterior to inferior or posterior, columns from the
patient's right to left (axial, coronal) or anterior to posterior (sagittal), whatever the order in the file.
Every lattice axis follows one voxel axis, so interpolation is separable: three small matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .anatomy import PLANES
from .volume import Volume, quantiles

FINEST_MM = 1.0
"""Finest spacing of a lattice."""
NEIGHBOUR_MM = 3.0
"""Distance of the two neighbouring slices that fill the outer image channels."""
NORMAL = {"axial": 2, "coronal": 1, "sagittal": 0}
SLICE_SIGN = {"axial": 1, "coronal": 1, "sagittal": 1}
ROWS = {"axial": (1, -1), "coronal": (2, -1), "sagittal": (2, -1)}
COLUMNS = {"axial": (0, -1), "coronal": (0, -1), "sagittal": (1, -1)}


def closest_axes(affine: Tensor) -> list[int]:
    """Voxel axis that lies closest to each of the patient axes x, y, z, each used once."""
    direction = (affine[:3, :3] / torch.linalg.vector_norm(affine[:3, :3], dim=0)).abs()
    best = max(
        ((a, b, c) for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3),
        key=lambda p: float(direction[0, p[0]] + direction[1, p[1]] + direction[2, p[2]]),
    )
    return list(best)


def foreground(volume: Volume) -> Tensor:
    """(X, Y, Z) bool: voxels above a tenth of the way from the darkest to the brightest percentile."""
    v = volume.voxels[0]
    every = max(1, round((v.numel() / 1_000_000) ** (1 / 3)))
    low, high = quantiles(v[::every, ::every, ::every].flatten(), (0.01, 0.995))
    return v > low + 0.1 * (high - low)


def plane_of(volume: Volume) -> tuple[str, str]:
    """(grid plane, named plane): the slice axis is the widest-spaced one; of near-cubic voxels the one that a DICOM series is stacked
    along, so that what is cited is a file of it, else axial.

    The named plane is `oblique` where the slice normal is over 30 degrees from the nearest patient axis.
    """
    spacing = torch.tensor(volume.spacing_mm)
    axes = closest_axes(volume.affine)
    widest = int(spacing.argmax())
    others = [float(spacing[a]) for a in range(3) if a != widest]
    slice_axis = widest if float(spacing[widest]) > 1.3 * max(others) or volume.shape[widest] == 1 else 2 if volume.source else axes[2]
    patient = axes.index(slice_axis)
    plane = next(p for p in PLANES if NORMAL[p] == patient)
    a, b = (volume.affine[:3, k] / spacing[k] for k in range(3) if k != slice_axis)
    normal = torch.linalg.cross(a, b)
    tilt = torch.rad2deg(torch.arccos((normal[patient].abs() / torch.linalg.vector_norm(normal)).clamp(max=1)))
    return plane, plane if float(tilt) <= 30 else "oblique"


@dataclass(frozen=True)
class Grid:
    """A lattice over one volume.

    Lattice index `i` along lattice axis `a` sits at voxel coordinate `start[a] + i * step[a]` of voxel axis `axes[a]`.
    """

    plane: str
    axes: tuple[int, int, int]
    start: tuple[float, float, float]
    step: tuple[float, float, float]
    size: tuple[int, int, int]
    shape: tuple[int, int, int]
    """The volume's own (X, Y, Z)."""
    spacing_mm: tuple[float, float, float]
    """Lattice spacing, mm: slice, row, column."""

    @classmethod
    def fit(cls, volume: Volume, *, size: int, plane: str | None = None, slice_spacing_mm: float = FINEST_MM) -> Grid:
        """Lay a lattice of `size` x `size` pixels a slice over the volume's foreground.

        Args:
            size: Rows and columns.
            plane: One of `anatomy.PLANES`; the acquisition plane when None.
            slice_spacing_mm: Finest distance of slices; they keep their own where that is wider.

        Raises:
            ValueError: the volume has no contrast.
        """
        plane = plane or plane_of(volume)[0]
        to_voxel = closest_axes(volume.affine)
        fore = foreground(volume).numpy()
        columns = fore.sum(2)  # numpy counts bools twenty times faster than torch
        if columns.sum() in (0, fore.size):
            raise ValueError("expected an image with contrast between head and air, got a nearly constant volume")
        box = []
        for profile in (columns.sum(1), columns.sum(0), fore.sum((0, 1))):
            kept = np.flatnonzero(profile > 0.001 * profile.max())
            box.append((int(kept[0]), int(kept[-1])))
        patient = (NORMAL[plane], ROWS[plane][0], COLUMNS[plane][0])
        want = (SLICE_SIGN[plane], ROWS[plane][1], COLUMNS[plane][1])
        axes = [to_voxel[p] for p in patient]
        signs = [w if float(volume.affine[p, a]) > 0 else -w for p, a, w in zip(patient, axes, want, strict=True)]
        native = [volume.spacing_mm[a] for a in axes]
        extent = [(box[a][1] - box[a][0] + 1) * s for a, s in zip(axes, native, strict=True)]
        inplane = max(FINEST_MM, max(extent[1:]) / (size - 8))
        spacing = [max(slice_spacing_mm, native[0]), inplane, inplane]
        num_slices = max(1, round(extent[0] / spacing[0]))
        step = [sign * s / n for sign, s, n in zip(signs, spacing, native, strict=True)]
        sizes = (num_slices, size, size)
        start = [
            (box[a][0] + box[a][1]) / 2 - st * (n - 1) / 2 for a, st, n in zip(axes, step, sizes, strict=True)
        ]
        if num_slices == box[axes[0]][1] - box[axes[0]][0] + 1 and spacing[0] == native[0]:
            start[0] = float(box[axes[0]][0] if step[0] > 0 else box[axes[0]][1])
        return cls(
            plane=plane,
            axes=(axes[0], axes[1], axes[2]),
            start=(start[0], start[1], start[2]),
            step=(step[0], step[1], step[2]),
            size=sizes,
            shape=volume.shape,
            spacing_mm=(spacing[0], spacing[1], spacing[2]),
        )

    @property
    def positions_mm(self) -> Tensor:
        """(S,) slice positions relative to the middle of the lattice, mm, increasing to S, A or R."""
        s = torch.arange(self.size[0], dtype=torch.float32)
        return (s - (self.size[0] - 1) / 2) * self.spacing_mm[0]

    def _read(self, axis: int, offset: float = 0.0) -> Tensor:
        """(lattice, voxels) weights that read the lattice from the volume, triangle-filtered when coarser."""
        voxels = torch.arange(self.shape[self.axes[axis]], dtype=torch.float64)
        lattice = self.start[axis] + (torch.arange(self.size[axis], dtype=torch.float64) + offset) * self.step[axis]
        if axis == 0:
            lattice = lattice.clamp(0, len(voxels) - 1)
        width = max(1.0, abs(self.step[axis]))
        weights = (1 - (voxels[None] - lattice[:, None]).abs() / width).clamp(min=0)
        inside = (lattice >= -0.5) & (lattice <= len(voxels) - 0.5)
        return (weights / weights.sum(1, keepdim=True).clamp(min=1e-9) * inside[:, None]).float()

    def _write(self, axis: int) -> Tensor:
        """(voxels, lattice) linear weights that bring lattice values back to the volume; rows outside are zero."""
        voxels = torch.arange(self.shape[self.axes[axis]], dtype=torch.float64)
        lattice = (voxels - self.start[axis]) / self.step[axis]
        inside = (lattice >= -0.5 - 1e-6) & (lattice <= self.size[axis] - 0.5 + 1e-6)
        lattice = lattice.clamp(0, self.size[axis] - 1)
        index = torch.arange(self.size[axis], dtype=torch.float64)
        return ((1 - (lattice[:, None] - index[None]).abs()).clamp(min=0) * inside[:, None]).float()

    def to_grid(self, voxels: Tensor) -> Tensor:
        """Sample (X, Y, Z) on the lattice: (S, 3, H, W), the middle channel the slice itself, the outer ones
        its neighbours `NEIGHBOUR_MM` below and above.
        """
        v = voxels.permute(*self.axes)
        rows, columns = self._read(1), self._read(2)
        v = torch.einsum("hy,syx,wx->shw", rows, v, columns)
        offset = NEIGHBOUR_MM / self.spacing_mm[0]
        return torch.stack([torch.einsum("ts,shw->thw", self._read(0, o), v) for o in (-offset, 0.0, offset)], 1)

    def box(self, inside: Tensor, margin: int = 3) -> list[tuple[int, int]]:
        """Voxels, first and one past the last along each voxel axis, that hold all lattice points marked in (S, H, W), and some around.

        Args:
            margin: Lattice steps around them.
        """
        found = [(0, 0)] * 3
        for a in range(3):
            marked = torch.nonzero(inside.any(2).any(1) if a == 0 else inside.any(0).any(2 - a)).flatten()
            if len(marked):
                ends = [self.start[a] + (int(marked[k]) + sign * margin) * self.step[a] for k, sign in ((0, -1), (-1, 1))]
                found[self.axes[a]] = max(0, math.floor(min(ends))), min(self.shape[self.axes[a]], math.ceil(max(ends)) + 1)
        return found

    def sections(
        self, values: Tensor, axis: int, box: Sequence[tuple[int, int]] | None = None
    ) -> Callable[[int], tuple[Tensor, Tensor] | None]:
        """Interpolate (K, S, H, W) lattice values to the scan's sections across one voxel axis, any of the three.

        Args:
            box: Voxels, first and one past the last along each voxel axis, that are wanted; all where None.

        Returns:
            A function of the voxel index along `axis`: values (K, ...) over the two remaining voxel axes in the scan's own
            order and, of the same shape, where the lattice reaches; None where it does not reach the section at all.
        """
        across = self.axes.index(axis)
        first, second = sorted((a for a in range(3) if a != across), key=lambda a: self.axes[a])
        weights = [self._write(a) for a in range(3)]
        if box is not None:
            for a in (first, second):
                weights[a] = weights[a][slice(*box[self.axes[a]])]
        layers = values.movedim([across + 1, first + 1, second + 1], [1, 2, 3])
        reach = (weights[first].sum(1) > 0)[:, None] & (weights[second].sum(1) > 0)[None]
        upper = (weights[first] > 0).int().argmax(1)
        lower = (upper + 1).clamp(max=self.size[first] - 1)
        share = weights[first].gather(1, lower[:, None])

        def section(index: int) -> tuple[Tensor, Tensor] | None:
            used = torch.nonzero(weights[across][index]).flatten()
            if len(used) == 0:
                return None
            mixed = layers[:, used[0]].float()
            if len(used) > 1:
                mixed = torch.lerp(mixed, layers[:, used[1]].float(), weights[across][index, used[1]])
            rows = torch.lerp(mixed.index_select(1, upper), mixed.index_select(1, lower), share)  # a row has two weights
            return rows @ weights[second].T, reach

        return section

    def nearest(self, voxels: Tensor) -> Tensor:
        """(X, Y, Z) labels read at the nearest voxel of each lattice point: (S, H, W), zero outside."""
        v = voxels.permute(*self.axes)
        for a in range(3):
            index = self.start[a] + torch.arange(self.size[a]) * self.step[a]
            inside = (index >= -0.5) & (index <= v.shape[a] - 0.5)
            v = v.index_select(a, index.round().long().clamp(0, v.shape[a] - 1))
            v = v * inside.view([-1 if k == a else 1 for k in range(3)]).to(v.dtype)
        return v

    def covered(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each lattice axis, (voxels,) bool: which voxel rows the lattice reaches."""
        return tuple(self._write(a).sum(1) > 0 for a in range(3))  # type: ignore[return-value]

    def world_mm(self, lattice: Tensor, affine: Tensor) -> Tensor:
        """(N, 3) lattice coordinates (slice, row, column) -> (N, 3) RAS+ mm."""
        voxel = torch.zeros(len(lattice), 3, dtype=torch.float64)
        for a in range(3):
            voxel[:, self.axes[a]] = self.start[a] + lattice[:, a].double() * self.step[a]
        return voxel @ affine[:3, :3].T + affine[:3, 3]
