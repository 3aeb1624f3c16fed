"""From k-space to images in scanner space, with what they may be off by and how well they explain the data.

Shapes: S slices, c coils, H x W the acquisition matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .espirit import espirit
from .model.omnimri import OmniMRI
from .physics import fit_coils, ifft2c
from .tasks import Reconstruct
from .tasks.reconstruct import Reconstructed
from .volume import KSpace, Volume

CHUNK = 4
"""Slices reconstructed at a time."""
EDGE = 1 / 16
"""Share of the readout at either end whose samples tell the noise where none was measured: they hold least signal."""
_ASKED = re.compile(r"\breconstruct(ing)?\b", re.IGNORECASE)
_POLITE = re.compile(r"(please|thanks|thank you|if possible)", re.IGNORECASE)
DISAGREEMENT = 1.25
"""From this residual on, against the noise, a slice is warned of."""


@dataclass(frozen=True)
class Reconstruction:
    """What was made of k-space."""

    image: Volume
    """Magnitude."""
    spread: Volume
    """Expected absolute error of the magnitude, in its unit."""
    zero_filled: Volume
    """What the samples give without any model."""
    residuals: tuple[float, ...]
    """Of each slice: root mean square of measured minus predicted samples, over the noise, with sensitivities fitted to the image."""
    noise: float
    """Standard deviation of a sample's noise, in the unit of the data after they were made equal between coils."""
    noise_source: str
    """`measured`, or `estimated` from the ends of the readout."""
    sampled: float
    """Share of the samples that were measured."""
    coils: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Numbers for a file beside the image."""
        return {
            "shape": list(self.image.shape),
            "spacing_mm": [round(s, 4) for s in self.image.spacing_mm],
            "coils": self.coils,
            "sampled": round(self.sampled, 4),
            "noise": float(f"{self.noise:.4g}"),
            "noise_source": self.noise_source,
            "residual_over_noise": [round(r, 3) for r in self.residuals],
            "warnings": list(self.warnings),
        }

    def sentence(self) -> str:
        """What was done, for people."""
        w, h, s = self.image.shape
        told = f"{s} slice{'s' if s > 1 else ''} of {w} × {h} reconstructed from {self.coils} coil{'s' if self.coils > 1 else ''}"
        told += f" and {100 * self.sampled:.0f} % of the samples" if self.sampled < 1 else ", fully sampled"
        most = " at most" if s > 1 else ""
        if self.sampled == 1:
            return f"{told}."
        return f"{told}; what was measured and what the image predicts differ by {max(self.residuals):.1f} times the noise{most}."


def asks_to_reconstruct(question: str) -> tuple[bool, str]:
    """Whether a question asks for a reconstruction, and what else it asks for: `describe it` of `Reconstruct this and describe it`."""
    clauses = re.split(r"\s*(?:[,;.]|\band then\b|\bthen\b|\band\b)\s*", question.strip().rstrip("?!"))
    clauses = [c for c in clauses if c and not _POLITE.fullmatch(c)]
    rest = [c for c in clauses if not _ASKED.search(c)]
    asked = len(rest) < len(clauses)
    return asked, " and ".join(rest).capitalize() if asked else question


def noise_of(data: Tensor) -> float:
    """Standard deviation of a sample's noise in k-space (S, c, H, W), by the median of what lies at the ends of the readout."""
    rows = max(1, round(EDGE * data.shape[2]))
    ends = torch.cat([data[:, :, :rows], data[:, :, -rows:]], 2).abs().flatten()
    ends = ends[ends > 0]
    if not len(ends):  # the ends were not acquired
        ends = data.abs().flatten()
        ends = ends[ends > 0]
    # The magnitude of complex Gaussian noise has its median at sqrt(ln 2) of the root mean square.
    return float(ends.median()) / 0.8326


def residual_of(found: Reconstructed, data: Tensor, mask: Tensor) -> Tensor:
    """(S,) root mean square of what images leave unexplained of the samples (S, c, H, W), with sensitivities fitted to them."""
    keep = mask.to(data.real.dtype)
    _, off = fit_coils(found.image, found.coils, ifft2c(data), keep)
    there = (data != 0).flatten(2).any(2)
    samples = keep.expand(-1, data.shape[2], -1).sum((1, 2)) * there.sum(1)
    return ((off.abs().square().sum((2, 3)) * there).sum(1) / samples.clamp(min=1)).sqrt()


@torch.inference_mode()
def reconstruct(
    model: OmniMRI, kspace: KSpace, *, coils: str = "learned", check: Callable[[], None] = lambda: None
) -> Reconstruction:
    """Reconstruct every slice; a file that does not fit into memory comes in slabs.

    Args:
        coils: `learned`, or `espirit`; sensitivities that come with the k-space go before.
        check: Called between slices; what it raises ends the work.

    Raises:
        ValueError: `coils` is neither.
    """
    if coils not in ("learned", "espirit"):
        raise ValueError(f"expected coils 'learned', 'espirit' or a file, got {coils!r}")
    device = next(model.parameters()).device
    images: list[Tensor] = []
    spreads: list[Tensor] = []
    simple: list[Tensor] = []
    residuals, levels, shares = [], [], []
    for slab in kspace.slabs():
        level = slab.noise or noise_of(slab.data)
        shares.append(float(slab.mask.expand(slab.data.shape[2:]).float().mean()))
        lines = bool((slab.mask == slab.mask[:, :1]).all()) and not bool(slab.mask.all())  # whole rows: the network knows columns
        for first in range(0, len(slab.data), CHUNK):
            check()
            data = slab.data[first : first + CHUNK].to(device)
            given = None if slab.coils is None else slab.coils[first : first + CHUNK].to(device)
            mask = slab.mask.to(device)
            if lines:
                data, mask = data.transpose(2, 3), mask.expand(*data.shape[2:])[:, :1].T
                given = None if given is None else given.transpose(2, 3)
            mask = mask.expand(len(data), *mask.shape)
            if given is None and coils == "espirit":
                given = torch.stack([espirit(d, m)[0] for d, m in zip(data, mask, strict=True)])
            found = model.heads["reconstruct"](data, mask, given)
            residuals += (residual_of(found, data, mask) / level).tolist()
            parts = [found.image.abs(), found.spread, found.zero_filled.abs()]
            parts = [_shown(p.transpose(1, 2) if lines else p, kspace.crop).cpu() for p in parts]
            for store, part in zip((images, spreads, simple), parts, strict=True):
                store.append(part)
        levels.append(level)

    def volume(parts: Sequence[Tensor], name: str) -> Volume:
        return Volume(Reconstruct().read(torch.cat(list(parts)))[None], kspace.affine, oriented=kspace.oriented, name=name)

    return Reconstruction(
        image=volume(images, "reconstruction"),
        spread=volume(spreads, "uncertainty"),
        zero_filled=volume(simple, "zero-filled"),
        residuals=tuple(residuals),
        noise=sum(levels) / len(levels),
        noise_source="measured" if kspace.noise else "estimated",
        sampled=sum(shares) / len(shares),
        coils=kspace.data.shape[1],
        warnings=_warnings(residuals),
    )


def _shown(image: Tensor, crop: tuple[int, int] | None) -> Tensor:
    """(S, H, W) within the rows and columns that the scanner would show."""
    if crop is None:
        return image
    h, w = image.shape[1:]
    rows, columns = crop
    top, left = h // 2 - rows // 2, w // 2 - columns // 2
    return image[:, top : top + rows, left : left + columns]


def _warnings(residuals: Sequence[float]) -> tuple[str, ...]:
    bad = [k + 1 for k, r in enumerate(residuals) if r > DISAGREEMENT]
    if not bad:
        return ()
    named = ", ".join(map(str, bad[:12])) + (" and others" if len(bad) > 12 else "")
    told = f"data and image disagree on slice {named} (up to {max(residuals):.1f} times the noise)"
    return (f"{told}: motion, wrong sensitivities or damaged samples; do not rely on what they show",)
