"""Evidence: what masks show, pooled into numbers for the language model.

Shapes: B studies, S slices, C pixel width, h x w pixels, N = structures + 1 + lesions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import NAMES
from .conversation import MAX_LESION_EVIDENCE
from .example import LESION_CLASS


def pool_evidence(features: Tensor, classes: Tensor, lesions: Tensor, positions_mm: Tensor) -> Tensor:
    """Pool pixel features and place over each structure and over each of the first lesions.

    Args:
        features: (B S, C, h, w).
        classes: (B, S, h, w) structure classes, 0 or 255 elsewhere.
        lesions: (B, S, h, w) lesion ranks from 1; 0 or 255 elsewhere.
        positions_mm: (B, S).

    Returns:
        (B, LESION_CLASS + MAX_LESION_EVIDENCE, C + 6): row k is structure class k, row LESION_CLASS + r the lesion of
        rank r + 1. The last six are presence, log share of the study, mean slice, row and column, and spread.
    """
    b, s, h, w = classes.shape
    n = LESION_CLASS + MAX_LESION_EVIDENCE
    device = features.device
    y, x = torch.meshgrid(torch.linspace(-1, 1, h, device=device), torch.linspace(-1, 1, w, device=device), indexing="ij")
    place = torch.stack([y, x, x**2 + y**2, torch.ones_like(x)]).flatten(1).expand(b, 4, h * w)
    ranks = torch.arange(1, MAX_LESION_EVIDENCE + 1, device=device)[:, None]
    index = torch.where(classes > len(NAMES), 0, classes).long().flatten(2)
    features = features.view(b, s, -1, h * w)
    found = []
    for k in range(s):  # a slice at a time: of a whole head the masks of all classes would be half a gigabyte
        one_hot = torch.zeros(b, n, h * w, device=device).scatter_(1, index[:, k, None], 1.0)
        one_hot[:, 0] = 0
        one_hot[:, LESION_CLASS:] = (lesions[:, k].reshape(b, 1, -1) == ranks).float()
        with torch.autocast(device.type, enabled=False):  # counts are whole numbers
            found.append(torch.einsum("bnp,bcp->bnc", one_hot, torch.cat([features[:, k].float(), place], 1)))
    sums = torch.stack(found, 1)
    count = sums[..., -1].sum(1)
    sums[..., -1] *= (positions_mm.to(device) / 100)[..., None]
    mean = sums.sum(1) / count.clamp(min=1)[..., None]
    row, column, square, z = mean[..., -4:].detach().unbind(-1)
    spread = (square - row**2 - column**2).clamp(min=0).sqrt()
    share = torch.log10(count / (s * h * w) + 1e-6) / 6
    return torch.cat([mean[..., :-4], torch.stack([(count > 0).float(), share, z, row, column, spread], -1)], -1)
