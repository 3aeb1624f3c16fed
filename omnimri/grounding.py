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
    one_hot = torch.zeros(b, n, s * h * w, device=device, dtype=torch.float32)
    index = classes.long().flatten(1)[:, None]
    one_hot.scatter_(1, torch.where(index > len(NAMES), 0, index), 1.0)
    one_hot[:, 0] = 0
    ranks = lesions.flatten(1)
    for r in range(MAX_LESION_EVIDENCE):
        one_hot[:, LESION_CLASS + r] = (ranks == r + 1).float()
    count = one_hot.sum(-1)
    weight = one_hot / count.clamp(min=1)[..., None]
    pooled = torch.einsum("bnsp,bscp->bnc", weight.view(b, n, s, h * w), features.float().view(b, s, -1, h * w))
    y, x = torch.meshgrid(torch.linspace(-1, 1, h, device=device), torch.linspace(-1, 1, w, device=device), indexing="ij")
    z = (positions_mm.to(device) / 100)[:, :, None, None].expand(b, s, h, w)
    place = torch.stack([z, y.expand(b, s, h, w), x.expand(b, s, h, w), (x**2 + y**2).expand(b, s, h, w)], -1).flatten(1, 3)
    where = torch.einsum("bnp,bpk->bnk", weight, place)
    spread = (where[..., 3] - where[..., 1] ** 2 - where[..., 2] ** 2).clamp(min=0).sqrt()
    share = torch.log10(count / (s * h * w) + 1e-6) / 6
    return torch.cat(
        [pooled, (count > 0).float()[..., None], share[..., None], where[..., :3], spread[..., None]], -1
    )
