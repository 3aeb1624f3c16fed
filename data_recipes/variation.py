"""Variation: a cheap second look at a record that was dear to make: other grey values, another place in the image.

Shapes: S slices, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from omnimri.anatomy import STRUCTURES
from omnimri.example import Record

from .recipe import pick, uniform

VENTRICLES = tuple(k for k, s in enumerate(STRUCTURES, 1) if "ventricle" in s.name)
OTHER_FLUID = tuple(k for k, s in enumerate(STRUCTURES, 1) if s.tissue == "csf" and k not in VENTRICLES)


def vary(record: Record, g: torch.Generator) -> Record:
    """The same study turned, scaled and moved a little in its plane, with other gamma, bias and noise; sides stay where they are.

    What lies beyond the old image is dark and no structure. The text stays true: it speaks of no place in the image.
    """
    s, c, h, w = record.images.shape
    angle, zoom = math.radians(uniform(g, -8, 8)), math.exp(uniform(g, -0.12, 0.12))
    move = [uniform(g, -0.06, 0.06) for _ in range(2)]
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    grid = F.affine_grid(torch.tensor([[[cos, -sin, move[0]], [sin, cos, move[1]]]]), [1, 1, h, w], align_corners=False)
    low = record.images.amin()
    flat = (record.images - low).reshape(1, s * c, h, w)
    images = F.grid_sample(flat, grid, align_corners=False).reshape(s, c, h, w)
    top = images.amax().clamp(min=1e-6)
    smooth = F.interpolate(torch.randn(1, 1, 4, 4, generator=g) * uniform(g, 0, 0.12), size=(h, w), mode="bicubic", align_corners=True)
    images = top * (images / top) ** math.exp(uniform(g, -0.25, 0.25)) * torch.exp(smooth)
    noise = top * uniform(g, 0, 0.02) * torch.randn(s, c, h, w, generator=g)
    masks = {}
    for name in ("labels", "lesions"):
        mask = getattr(record, name)
        if mask is not None:
            moved = F.grid_sample(mask[None].float(), grid, mode="nearest", align_corners=False)[0]
            masks[name] = moved.to(mask.dtype)
    slice_mm, row_mm, column_mm = record.spacing_mm
    return replace(record, images=images + noise, spacing_mm=(slice_mm, row_mm * zoom, column_mm * zoom), **masks)


def closed(images: torch.Tensor, labels: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (S, H, W) and labels (S, H, W) of the same head with narrower ventricles, or sulci, or both: fluid near tissue looks like the
    tissue beside it and carries its label, as in the young and beside masses. Label maps, most of them of the elderly, have ventricles and
    sulci that are wide open.
    """
    image, label = images.numpy().copy(), labels.numpy().copy()
    tissue = (label > 0) & ~np.isin(label, VENTRICLES + OTHER_FLUID)
    for which in (VENTRICLES, OTHER_FLUID):
        reach = pick(g, (0, 1, 2, 3, 4, 5))
        for k in range(len(label)) if reach else ():
            here = np.isin(label[k], which)
            rim = ndimage.binary_dilation(here, iterations=2) & tissue[k]  # it holds some fluid too
            pure = tissue[k] & ~rim
            if not here.any() or not pure.any():
                continue
            away, (row, column) = ndimage.distance_transform_edt(~pure, return_indices=True)
            taken = (here & (away <= reach + 2)) | (rim & (away <= 2))
            image[k] = np.where(taken, ndimage.uniform_filter(image[k][row, column], 3), image[k])
            label[k] = np.where(taken & here, label[k][row, column], label[k])
    return torch.from_numpy(image), torch.from_numpy(label)
