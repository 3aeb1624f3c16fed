"""Overlay: letters and marks that a scanner or a viewer burnt into the pixels of every slice. They are no anatomy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .volume import Volume

WIDEST = 7
"""Pixels; strokes of letters are narrower."""
LEAST_SLICES = 3
"""In fewer slices a mark cannot be told from a bright voxel."""
BURNT = "letters or marks burnt into every slice were left out of what the model sees; they may tell who the patient is"


def without_overlay(volume: Volume) -> Volume:
    """The volume with what is at its brightest value at one place of every slice along some axis replaced by the nearest pixel that is not;
    the same object where there is none.
    """
    from scipy import ndimage

    voxels = volume.voxels
    top = voxels[0].max()
    for axis in range(3):
        if voxels.shape[1 + axis] < LEAST_SLICES or top <= voxels[0].min():
            continue
        marks = (voxels[0] == top).all(axis).numpy()
        # What is as bright and wider than a stroke is saturated anatomy.
        marks &= ~ndimage.binary_opening(marks, np.ones((WIDEST, WIDEST)))
        if not marks.any() or marks.all():
            continue
        rows, columns = ndimage.distance_transform_edt(marks, return_distances=False, return_indices=True)
        flat = voxels.movedim(1 + axis, 1)
        voxels = flat[:, :, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()].movedim(1, 1 + axis)
    return volume if voxels is volume.voxels else replace(volume, voxels=voxels.contiguous())
