"""Segmentation: a query at `<segment>` meets pixel features; structures compete in a softmax, lesions stand alone.

Shapes: B studies, S slices, K structure classes (0 is background), C pixel width, h = H/2, w = W/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import NAMES, STRUCTURES

if TYPE_CHECKING:
    from ..grid import Grid
    from ..model.config import OmniMRIConfig

UNKNOWN = 255


class SegmentHead(nn.Module):
    """Hidden states -> mask queries; queries x pixel features -> logits."""

    def __init__(self, config: OmniMRIConfig) -> None:
        super().__init__()
        width, pixel = config.text_config.hidden_size, config.pixel_width
        self.norm = nn.LayerNorm(width)
        self.query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, pixel + 1))
        self.table = nn.Parameter(0.3 * torch.randn(len(NAMES) + 1, pixel + 1))
        """A learned query for every structure and for lesion: masks are learnt against it as well, the language model's
        queries learn to meet it, and they are measured against it. No answer ever uses it."""
        self.background = nn.Parameter(torch.zeros(pixel + 1))
        with torch.no_grad():
            self.background[-1] = 2.0

    def queries(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., C + 1); the last number is the bias."""
        return self.query(self.norm(hidden))

    def logits(self, queries_BKC: Tensor, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of every structure and, last, of lesion: (B, K, C + 1) with (B S, C, h, w).

        Returns:
            structures (B S, K, h, w) with background first, lesion (B S, h, w).
        """
        b = len(queries_BKC)
        n, c, h, w = pixels_NCHW.shape
        background = self.background.to(queries_BKC.dtype).expand(b, 1, c + 1)
        every = torch.cat([background, queries_BKC], 1)
        x = torch.einsum("bkc,bscp->bskp", every[..., :c], pixels_NCHW.reshape(b, n // b, c, h * w))
        x = (x + every[:, None, :, c:]).reshape(n, every.shape[1], h, w)
        lesion = x[:, -1] - 2.0
        return x[:, :-1], lesion


@dataclass(frozen=True)
class SegmentTarget:
    """Truth at one phase of the lattice."""

    labels: Tensor
    """(N, h, w) long, UNKNOWN where unlabelled."""
    ranks: Tensor
    """(N, h, w) long: 0, the number of a lesion, or UNKNOWN."""

    @property
    def lesion(self) -> Tensor:
        """(N, h, w) long: 0, 1 or UNKNOWN."""
        return torch.where(self.ranks == UNKNOWN, self.ranks, (self.ranks > 0).long())


def root_weights(labels: Tensor, num_classes: int) -> Tensor:
    """(N, h, w) labels -> weight of each pixel: one over the root of its class's size in its slice; 0 where UNKNOWN."""
    n = len(labels)
    flat = labels.flatten(1).clamp(max=num_classes)
    counts = torch.zeros(n, num_classes + 1, device=labels.device).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    weights = counts.clamp(min=9).rsqrt()
    weights[:, num_classes] = 0
    return weights.gather(1, flat).view(labels.shape)


class Segment:
    """The `<segment>` task."""

    name = "segment"
    token = "<segment>"

    def head(self, config: OmniMRIConfig) -> nn.Module:
        """The query MLP and the background query."""
        return SegmentHead(config)

    def target(self, batch: dict[str, Tensor], phase: int = 0) -> SegmentTarget:
        """Labels of every second pixel, offset by `phase`."""
        cut = (..., slice(phase // 2, None, 2), slice(phase % 2, None, 2))
        labels, lesions = (batch[k].flatten(0, 1)[cut].long() for k in ("labels", "lesions"))
        return SegmentTarget(labels, lesions)

    def loss(self, predicted: tuple[Tensor, Tensor], target: SegmentTarget) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy and soft Dice over structures; both over the lesion mask.

        Cross-entropies weigh every class, and every lesion, of a slice by the root of its size: unweighted, small ones are
        given up early and soft Dice, whose gradient fades with the probability, does not bring them back.
        """
        structures, lesion = (p.float() for p in predicted)
        k = structures.shape[1]
        known, weight = target.labels != UNKNOWN, root_weights(target.labels, k)
        ce = F.cross_entropy(structures, target.labels, ignore_index=UNKNOWN, reduction="none") * weight
        probability = structures.softmax(1).transpose(0, 1).reshape(k, -1) * known.reshape(1, -1)
        truth = F.one_hot(target.labels.masked_fill(~known, 0), k).to(probability.dtype).reshape(-1, k).T
        truth = truth * known.reshape(1, -1)
        present = (truth.sum(1) > 0).float()
        present[0] = 0
        overlap = 2 * (probability * truth).sum(1) / (probability.sum(1) + truth.sum(1) + 1)
        seen, lesion_weight = target.ranks != UNKNOWN, root_weights(target.ranks, UNKNOWN)
        lesion_truth = (target.lesion == 1).float()
        bce = F.binary_cross_entropy_with_logits(lesion, lesion_truth, reduction="none") * lesion_weight
        p = lesion.sigmoid() * seen
        any_lesion = (lesion_truth.sum() > 0).float()
        lesion_dice = 1 - (2 * (p * lesion_truth).sum() + 1) / (p.sum() + lesion_truth.sum() + 1)
        return {
            "segment": (ce.sum(), weight.sum()),
            "dice": (((1 - overlap) * present).sum(), present.sum()),
            "lesion": (bce.sum(), lesion_weight.sum()),
            "lesion_dice": (lesion_dice * any_lesion, any_lesion),
        }

    def read(self, *views: tuple[Tensor, Grid]) -> Tensor:
        """Bring structure logits (K, S, H, W) of one or several lattices to scan space, average their probabilities and
        take the argmax there: (X, Y, Z) int32 FreeSurfer labels, 0 where no lattice reaches.
        """
        table = torch.tensor([0, *(s.label for s in STRUCTURES)], dtype=torch.int32)
        shape, axis = views[0][1].shape, views[0][1].axes[0]
        answer = torch.zeros(shape, dtype=torch.int32)
        # Most of a scan is air: only where some view sees a structure is it read. `max` is twice as fast as `argmax` along this axis.
        boxes = [grid.box(predicted[:, :, ::2, ::2].max(0).indices.repeat_interleave(2, 1).repeat_interleave(2, 2) > 0)
                 for predicted, grid in views]
        box = [(min(low), max(high)) for low, high in (zip(*ends, strict=True) for ends in zip(*boxes, strict=True))]
        first, second = (slice(*box[a]) for a in range(3) if a != axis)
        out = answer.movedim(axis, 0)[:, first, second]
        sections = [grid.sections(predicted, axis, box) for predicted, grid in views]
        for index in range(*box[axis]):
            parts = [part for section in sections if (part := section(index)) is not None]
            if not parts:
                continue
            votes = parts[0][0]
            if len(parts) > 1:
                votes, *others = (values.softmax(0).mul_(reach) for values, reach in parts)
                for other in others:
                    votes += other
            anywhere = torch.stack([reach for _, reach in parts]).any(0)
            out[index] = (table[votes.max(0).indices] * anywhere).to(torch.int32)
        return answer

    def read_lesion(self, predicted: Tensor, grid: Grid) -> Tensor:
        """Bring lesion logits (S, H, W) to scan space: probability (X, Y, Z), zero where the lattice does not reach."""
        answer = torch.zeros(grid.shape)
        out = answer.movedim(grid.axes[0], 0)
        section = grid.sections(predicted[None], grid.axes[0])
        for index in range(len(out)):
            if (part := section(index)) is not None:
                out[index] = part[0][0].sigmoid() * part[1]
        return answer


NUM_CLASSES = len(NAMES) + 1
