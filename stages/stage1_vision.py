"""Stage 1: self-distillation of the vision encoder: DINO + iBOT + KoLeo (arXiv 2304.07193), no left-right flip."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_recipes.mixture import Mixture
from data_recipes.recipe import generator, uniform
from omnimri.example import normalise
from omnimri.model.omnimri import OmniMRI

from .engine import Objective, Term

LEARNING_RATE = {"vision.backbone.*": 5e-4, "student_*": 1e-3}
DEFAULTS = {"steps": 600, "batch_size": 8, "weight_decay": 0.04}
NEEDS_KSPACE = False
LOCAL_CROPS = 2
"""Small crops a view; 0 switches them off."""
SLICES = 2
"""Slices taken of each record."""
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.04, 0.1
PROTOTYPES, MOMENTUM = 256, 0.98


class Source:
    """Crops of slices with their iBOT masks."""

    def __init__(self, mixture: Mixture, tokenizer: Any, model: OmniMRI) -> None:
        vision = model.config.vision_config
        self.mixture, self.patch = mixture, vision.patch_size
        side = vision.image_size // vision.patch_size
        self.large, self.small = max(4, 2 * side // 3) * self.patch, max(2, side // 3) * self.patch

    def example(self, index: int) -> dict[str, Tensor]:
        """`large` (SLICES, 2, 3, c, c), `small` (SLICES, LOCAL_CROPS, 3, d, d), `mask` (SLICES, 2, patches)."""
        record = self.mixture.record(index)
        g = generator(self.mixture.seed, "crops", index)
        images = normalise(record.images)
        power = images[:, 1].flatten(1).std(1)
        best = power.argsort(descending=True)[: max(SLICES, len(power) // 2)]
        chosen = best[torch.randperm(len(best), generator=g)[:SLICES]]
        large, small, masks = [], [], []
        for s in chosen.tolist():
            large.append(torch.stack([self._crop(images[s], self.large, (0.4, 1.0), g) for _ in range(2)]))
            crops = [self._crop(images[s], self.small, (0.08, 0.35), g) for _ in range(LOCAL_CROPS)]
            small.append(torch.stack(crops) if crops else torch.zeros(0, 3, self.small, self.small))
            count = (self.large // self.patch) ** 2
            share = torch.tensor([uniform(g, 0.1, 0.5) if uniform(g, 0, 1) < 0.7 else 0.0 for _ in range(2)])
            masks.append(torch.rand(2, count, generator=g).argsort(1) < (share * count)[:, None])
        return {"large": torch.stack(large), "small": torch.stack(small), "mask": torch.stack(masks)}

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Concatenate over slices."""
        return {k: torch.cat([e[k] for e in examples]) for k in examples[0]}

    @staticmethod
    def _crop(image: Tensor, size: int, scale: tuple[float, float], g: torch.Generator) -> Tensor:
        side = uniform(g, *scale) ** 0.5
        angle = torch.tensor(uniform(g, -0.2, 0.2))
        room = 0.85 * (1 - side)
        theta = torch.tensor([[[side, 0, uniform(g, -room, room)], [0, side, uniform(g, -room, room)]]])
        rotation = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
        grid = F.affine_grid(theta @ rotation, [1, 3, size, size], align_corners=False)
        out = F.grid_sample(image[None], grid, align_corners=False)[0].clamp(min=0)
        out = out ** uniform(g, 0.7, 1.5) * uniform(g, 0.8, 1.2) + uniform(g, -0.1, 0.1)
        return out + 0.05 * uniform(g, 0, 1) * torch.randn(out.shape, generator=g)


class _Head(nn.Module):
    """Three layers, then unit-length prototypes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 128))
        for layer in self.mlp[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(128, PROTOTYPES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x).float(), dim=-1), F.normalize(self.prototypes.weight.float(), dim=-1))


def sinkhorn_knopp(logits: Tensor, rounds: int = 3) -> Tensor:
    """Of (N, K) logits, soft assignments (N, K) that use all prototypes alike over all ranks' examples (arXiv 2304.07193)."""
    q = logits.float().softmax(-1)
    for _ in range(rounds):
        used = q.sum(0)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(used)
        q = q / used.clamp(min=1e-12)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12)
    return q


class SelfDistillation(Objective):
    """A student that must say of a view what its slowly moving average says of another."""

    def __init__(self, model: OmniMRI, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        width = model.config.vision_config.hidden_size
        self.prefix = model.vision.num_prefix
        self.student_image, self.student_patch = _Head(width), _Head(width)
        self.teacher_backbone = copy.deepcopy(model.vision.backbone)
        self.teacher_image, self.teacher_patch = copy.deepcopy(self.student_image), copy.deepcopy(self.student_patch)

    def after_init(self) -> None:
        """Start the teacher from the weights just loaded."""
        self.teacher_backbone.load_state_dict(self.model.vision.backbone.state_dict())

    def _teacher(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher_backbone, self.model.vision.backbone), (self.teacher_image, self.student_image),
                (self.teacher_patch, self.student_patch)]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Term]:
        """DINO between views, iBOT at masked patches, KoLeo on image features."""
        large, small, mask = batch["large"], batch["small"], batch["mask"]
        n = len(large)
        views, masks = large.transpose(0, 1).flatten(0, 1), mask.transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            seen = self.teacher_backbone(views).last_hidden_state
            image_target = sinkhorn_knopp(self.teacher_image(seen[:, 0]) / TEACHER_TEMPERATURE)
            patch_target = sinkhorn_knopp(self.teacher_patch(seen[:, self.prefix :][masks]) / TEACHER_TEMPERATURE)
        out = self.model.vision.backbone(views, bool_masked_pos=masks).last_hidden_state
        said = [*(self.student_image(out[:, 0]) / STUDENT_TEMPERATURE).log_softmax(-1).chunk(2)]
        if small.shape[1]:
            local = self.model.vision.backbone(small.flatten(0, 1)).last_hidden_state[:, 0]
            local = (self.student_image(local) / STUDENT_TEMPERATURE).log_softmax(-1)
            said += [*local.view(n, small.shape[1], -1).unbind(1)]
        dino, pairs = said[0].new_zeros(()), 0
        for i, target in enumerate(image_target.chunk(2)):
            for j, log_p in enumerate(said):
                if i != j:
                    dino, pairs = dino - (target * log_p).sum(), pairs + n
        patch = (self.student_patch(out[:, self.prefix :][masks]) / STUDENT_TEMPERATURE).log_softmax(-1)
        per_image = 1 / masks.sum(1, keepdim=True).clamp(min=1).float().expand_as(masks)[masks]
        ibot = -((patch_target * patch).sum(-1) * per_image).sum()
        feature = F.normalize(out[:n, 0].float(), dim=-1)
        nearest = (feature @ feature.T - 2 * torch.eye(n, device=feature.device)).argmax(1)
        koleo = -(F.pairwise_distance(feature, feature[nearest]) + 1e-8).log().sum()
        number = lambda k: torch.tensor(float(k), device=views.device)  # noqa: E731
        return {
            "dino": Term(dino, number(pairs)),
            "ibot": Term(ibot, masks.any(1).sum().float()),
            "koleo": Term(koleo, number(n), 0.1),
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher toward the student."""
        momentum = 1 - (1 - MOMENTUM) * (1 - step / max(1, self.steps))
        for slow, fast in self._teacher():
            for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                a.lerp_(b.to(a.dtype), 1 - momentum)


def build(model: OmniMRI, steps: int) -> Objective:
    """The objective of this stage."""
    return SelfDistillation(model, steps)
