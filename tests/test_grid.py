"""Geometry: what is drawn in the world comes back to the world."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimri.anatomy import STRUCTURES
from omnimri.grid import Grid, closest_axes, plane_of
from omnimri.tasks import Segment
from omnimri.volume import Volume, quantiles


def ball(affine: torch.Tensor, shape: tuple[int, int, int], centre_mm: torch.Tensor, radius_mm: float) -> torch.Tensor:
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return torch.linalg.vector_norm(world - centre_mm, dim=-1) < radius_mm


def head(affine: torch.Tensor, shape: tuple[int, int, int]) -> Volume:
    middle = affine[:3, :3] @ ((torch.tensor(shape, dtype=torch.float64) - 1) / 2) + affine[:3, 3]
    field = min(n * float(s) for n, s in zip(shape, torch.linalg.vector_norm(affine[:3, :3], dim=0), strict=True))
    voxels = ball(affine, shape, middle, field * 0.4).float() * 500 + torch.rand(shape) * 5
    voxels += ball(affine, shape, middle + torch.tensor([field * 0.15, 0.0, 0.0]).double(), field * 0.1).float() * 400
    return Volume(voxels[None], affine)


def random_affine(rng: np.random.Generator, orientation: int, spacing: tuple[float, ...] | None = None) -> torch.Tensor:
    perms = list(itertools.permutations(range(3)))
    signs = list(itertools.product((1, -1), repeat=3))
    perm, sign = perms[orientation % 6], signs[orientation // 6]
    base = np.zeros((3, 3))
    for k, (p, s) in enumerate(zip(perm, sign, strict=True)):
        base[p, k] = s
    tilt, _ = np.linalg.qr(np.eye(3) + 0.12 * rng.normal(size=(3, 3)))
    tilt = tilt * np.sign(np.diag(tilt))
    shear = np.eye(3)
    shear[0, 1] = rng.uniform(-0.05, 0.05)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ shear @ base * (rng.uniform(0.9, 3.0, size=3) if spacing is None else np.array(spacing))
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return torch.from_numpy(affine)


@pytest.mark.parametrize("orientation", range(48))
def test_mask_painted_in_the_world_returns(orientation):
    """A ball painted in the world at lattice points, written back to the scan, lies where it was painted."""
    rng = np.random.default_rng(orientation)
    affine = random_affine(rng, orientation)
    volume = head(affine, (44, 40, 36))
    grid = Grid.fit(volume, size=64)
    s, h, w = grid.size
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (s, h, w)), indexing="ij"), -1)
    world = grid.world_mm(index.reshape(-1, 3), affine).reshape(s, h, w, 3)
    middle = affine[:3, :3] @ torch.tensor([22.0, 20, 18]).double() + affine[:3, 3]
    radius = 9 * float(max(volume.spacing_mm))
    distance = torch.linalg.vector_norm(world - middle, dim=-1) - radius
    logits = torch.stack([distance, -distance]).float()
    said = Segment().read((torch.cat([logits, torch.full((31, s, h, w), -1e4)]), grid)) == STRUCTURES[0].label
    off = torch.linalg.vector_norm(
        torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in volume.shape), indexing="ij"), -1)
        @ affine[:3, :3].T + affine[:3, 3] - middle, dim=-1) - radius
    inside = torch.ones(volume.shape, dtype=torch.bool)
    for a, covered in enumerate(grid.covered()):
        shape = [1, 1, 1]
        shape[grid.axes[a]] = -1
        inside &= covered.view(shape)
    half = 0.5 * max(volume.spacing_mm)
    wrong = (said != (off < 0)) & (off.abs() > half) & inside
    assert int(wrong.sum()) == 0
    assert int(said.sum()) > 500


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    orientation=st.integers(0, 47),
    shape=st.tuples(st.integers(24, 60), st.integers(24, 60), st.sampled_from([1, 2, 7, 30])),
    turn=st.permutations(range(3)),
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_half_space_painted_in_the_world_returns(orientation, shape, turn, spacing, seed):
    """Any spacing, any slab down to one slice: the side of an oblique plane that is painted on the lattice is the side in the scan."""
    rng = np.random.default_rng(seed)
    shape = tuple(shape[k] for k in turn)
    affine = random_affine(rng, orientation, spacing)
    middle = affine[:3, :3] @ ((torch.tensor(shape).double() - 1) / 2) + affine[:3, 3]
    normal = torch.from_numpy(rng.normal(size=3))
    normal /= torch.linalg.vector_norm(normal)
    index = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij"), -1)
    off = (index @ affine[:3, :3].T + affine[:3, 3] - middle) @ normal
    edge = torch.stack([torch.minimum(index[..., a], n - 1 - index[..., a]) for a, n in enumerate(shape) if n > 2]).amin(0)
    volume = Volume((100 * (edge >= 2) + torch.rand(shape))[None].float(), affine)
    grid = Grid.fit(volume, size=64)
    lattice = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in grid.size), indexing="ij"), -1)
    painted = ((grid.world_mm(lattice.reshape(-1, 3), affine) - middle) @ normal).reshape(grid.size)
    logits = torch.cat([torch.stack([-painted, painted]).float(), torch.full((31, *grid.size), -1e4)])
    said = Segment().read((logits, grid)) == STRUCTURES[0].label
    # Beside the lattice nothing is painted; half a voxel is the scan's own along the plane's normal.
    reached = edge >= 3
    half = 0.5 * float((affine[:3, :3].T @ normal).abs().max())
    assert not bool(((said != (off > 0)) & (off.abs() > half) & reached).any())
    assert bool(said.any())


@pytest.mark.parametrize("orientation", range(0, 48, 5))
def test_masks_of_three_planes_meet(orientation):
    """A ball painted on the lattices of all planes, or on another plane's than the first section axis, lies where it was painted."""
    rng = np.random.default_rng(orientation)
    affine = random_affine(rng, orientation)
    affine[:3, :3] *= 2 / torch.linalg.vector_norm(affine[:3, :3], dim=0)
    volume = head(affine, (44, 40, 36))
    middle = affine[:3, :3] @ torch.tensor([22.0, 20, 18]).double() + affine[:3, 3]

    def painted(plane):
        grid = Grid.fit(volume, size=64, plane=plane, slice_spacing_mm=3.0)
        index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid.size), indexing="ij"), -1)
        off = torch.linalg.vector_norm(grid.world_mm(index.reshape(-1, 3), affine) - middle, dim=-1).reshape(grid.size) - 18
        return torch.cat([torch.stack([off, -off]).float(), torch.full((31, *grid.size), -1e4)]), grid

    views = [painted(p) for p in ("axial", "coronal", "sagittal")]
    truth = ball(affine, volume.shape, middle, 18)
    near = ball(affine, volume.shape, middle, 20) & ~ball(affine, volume.shape, middle, 16)
    assert len({grid.axes[0] for _, grid in views}) == 3
    said = Segment().read(*views) == STRUCTURES[0].label
    assert not bool(((said != truth) & ~near).any())
    (first, grid), (second, other) = views[:2]
    section, across = other.sections(second, grid.axes[0]), torch.zeros(volume.shape, dtype=torch.bool)
    for i, plane in enumerate(across.movedim(grid.axes[0], 0)):
        if (part := section(i)) is not None:
            plane[:] = (part[0].argmax(0) == 1) & part[1]
    assert not bool(((across != truth) & ~near).any())
    probability = Segment().read_lesion(-10 * first[0] / 3, grid)
    assert not bool((((probability > 0.5) != truth) & ~near).any())


def test_permuting_and_flipping_the_array_changes_nothing(scan):
    grid = Grid.fit(scan, size=64)
    images = grid.to_grid(scan.voxels[0])
    turned = scan.voxels.permute(0, 3, 1, 2).flip(1)
    affine = scan.affine[:, [2, 0, 1, 3]].clone()
    n = turned.shape[1]
    affine[:3, 3] += affine[:3, 0] * (n - 1)
    affine[:3, 0] *= -1
    other = Volume(turned.contiguous(), affine)
    again = Grid.fit(other, size=64)
    assert again.plane == grid.plane
    assert torch.allclose(again.to_grid(other.voxels[0]), images, atol=0.05)


def test_left_is_on_the_right_of_an_axial_lattice():
    """Radiological: a bright ball on the patient's left shows in the right half of the lattice."""
    affine = torch.diag(torch.tensor([-2.0, 2.0, 2.0, 1.0]).double())
    volume = head(affine, (60, 60, 60))
    middle = affine[:3, :3] @ torch.tensor([29.5, 29.5, 29.5]).double()
    voxels = volume.voxels + 2000 * ball(affine, (60, 60, 60), middle + torch.tensor([-25.0, 0, 0]).double(), 10)[None]
    grid = Grid.fit(Volume(voxels, affine), size=64, plane="axial")
    bright = grid.to_grid(voxels[0])[:, 1]
    column = float(torch.nonzero(bright > bright.max() * 0.7).float().mean(0)[2])
    assert column > 34


def test_planes_by_spacing():
    thick = {0: "sagittal", 1: "coronal", 2: "axial"}
    for axis, plane in thick.items():
        spacing = [1.0, 1.0, 1.0]
        spacing[axis] = 5.0
        volume = Volume(torch.rand(1, 20, 20, 20), torch.diag(torch.tensor([*spacing, 1.0]).double()))
        assert plane_of(volume) == (plane, plane)
    assert closest_axes(torch.eye(4).double()) == [0, 1, 2]


def test_single_slice_and_constant():
    affine = torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0]).double())
    one = head(affine, (50, 50, 7))
    single = Volume(one.voxels[..., 3:4].contiguous(), affine)
    grid = Grid.fit(single, size=64)
    assert grid.size[0] == 1
    assert grid.to_grid(single.voxels[0]).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="contrast"):
        Grid.fit(Volume(torch.ones(1, 9, 9, 9), affine), size=64)


@given(st.integers(1, 3000), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_quantiles_are_those_of_torch_to_the_last_bit(count, shares, seed):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(100).round()
    assert quantiles(values, shares) == torch.quantile(values, torch.tensor(shares)).tolist()


@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_reading_only_where_a_structure_is_seen_changes_nothing(turn, monkeypatch):
    """Three planes of a volume that is mostly air, stored in any order of its axes."""
    g = torch.Generator().manual_seed(3)
    affine = torch.diag(torch.tensor([2.0, -2.0, 2.0, 1.0])).double()[:, [*turn, 3]]
    voxels = torch.zeros(40, 46, 52)
    voxels[6:34, 8:38, 10:44] = torch.rand(28, 30, 34, generator=g) + 1
    volume = Volume(voxels[None], affine)
    views = []
    for plane in ("axial", "coronal", "sagittal"):
        grid = Grid.fit(volume, size=32, plane=plane)
        logits = torch.zeros(5, *grid.size)
        logits[0] = 4.0
        middle = tuple(slice(n // 3, n // 3 + 7) for n in grid.size)
        logits[(slice(1, None), *middle)] = 9 * torch.rand(4, *(min(7, n - n // 3) for n in grid.size), generator=g)
        views.append((logits, grid))
    read = Segment().read(*views)
    assert 0 < int((read > 0).sum()) < 0.3 * read.numel()
    monkeypatch.setattr(Grid, "box", lambda self, *_: [(0, n) for n in self.shape])
    assert torch.equal(read, Segment().read(*views))
