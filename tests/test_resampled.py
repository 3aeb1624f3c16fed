"""A scan as others would have stored it: the image stays where it is, and label maps come back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import resampled
from eval.cases import Case, Truth
from omnimri.volume import Study


def world_mm(volume) -> torch.Tensor:
    """(X, Y, Z, 3) RAS+ mm of every voxel's middle."""
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in volume.shape), indexing="ij"), -1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def test_a_turned_array_is_the_same_image(scan):
    other, back = resampled.turned(scan)
    assert other.shape != scan.shape
    assert torch.equal(back(other.voxels[0]), scan.voxels[0])
    there = torch.stack([back(x) for x in world_mm(other).unbind(-1)], -1)
    assert torch.allclose(there, world_mm(scan))


@pytest.mark.parametrize("mm", list(resampled.COARSE_MM.values()))
def test_larger_voxels_hold_the_mean_and_lie_where_they_were(scan, mm):
    other, back = resampled.averaged(scan, mm)
    assert other.spacing_mm == pytest.approx(mm, rel=0.3)
    assert float(other.voxels.mean()) == pytest.approx(float(scan.voxels.mean()), rel=0.03)
    there = torch.stack([back(x) for x in world_mm(other).unbind(-1)], -1)
    assert there.shape == world_mm(scan).shape
    off = torch.linalg.vector_norm(there - world_mm(scan), dim=-1)
    assert float(off.max()) <= 0.51 * float(np.linalg.norm(np.add(mm, scan.spacing_mm)))


def test_the_truth_of_a_larger_voxel_is_what_covers_most_of_it():
    labels = np.zeros((4, 4, 4), np.int32)
    labels[:2, :2, :2] = 17
    labels[2:, :2, 0] = 3
    labels[2:, 2:, :2].flat[:5] = 53
    found = resampled.commonest(labels, (2, 2, 2))
    assert found[:, :, 0].tolist() == [[17, 0], [0, 53]]
    assert not found[:, :, 1].any()


def test_a_mirrored_person_has_the_sides_exchanged(scan):
    other, back = resampled.mirrored(scan)
    labels = torch.zeros(scan.shape, dtype=torch.int32)
    labels[:5], labels[-5:] = 17, 42  # left hippocampus, right cortex
    came = back(labels)
    assert set(came[:5].unique().tolist()) == {3}
    assert set(came[-5:].unique().tolist()) == {53}
    assert torch.equal(other.voxels[0].flip(0), scan.voxels[0])


def test_every_way_is_scored_against_the_scans_own_truth(scan, monkeypatch):
    truth = torch.zeros(scan.shape, dtype=torch.int32)
    truth[5:20, 5:20, 2:8], truth[30:45, 5:20, 2:8] = 17, 53
    case = Case("one", "freesurfer", "p", lambda: None)
    monkeypatch.setattr(resampled, "cases_of", lambda *_, **__: [case])
    monkeypatch.setattr(resampled, "open_case", lambda _: (Study(volumes=(scan,)), Truth(labels=truth.numpy())))
    # Where the truth lies on an array of another shape, this one does not know: it is right on the scan itself alone.
    knows = lambda s: truth if s.primary is scan else torch.zeros(s.primary.shape)  # noqa: E731
    told = SimpleNamespace(segment=lambda s: SimpleNamespace(labels=knows(s)), forget=lambda: None)
    found = resampled.measure(told, [])["one"]
    assert found["as it is"]["mean"] == 1.0
    assert len(found) == 9
    assert all(way["mean"] == 0 for name, way in found.items() if name != "as it is" and "truth" not in name)
    assert all(0.4 < way["mean"] <= 1 for name, way in found.items() if "truth" in name)
    assert "| left hippocampus | 1.000 | 0.000 |" in resampled.markdown({"one": found})
