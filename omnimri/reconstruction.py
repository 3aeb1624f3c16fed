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
from .physics import fit_coils, ifft2c, sampled
from .tasks import Reconstruct
from .tasks.reconstruct import Reconstructed
from .volume import KSpace, Volume

CHUNK = 4
"""Slices reconstructed at a time."""
EDGE, FAR = 1 / 16, 1 / 4
"""Share of the readout at either end, and of the lines from the middle on, beyond which samples tell the noise where none was
measured: the corners of k-space hold least signal."""
_ASKED = re.compile(r"(?<!not )(?<!n't )(?<!mean to )\breconstruct(ing)?\b", re.IGNORECASE)
_POLITE = re.compile(r"(please|thanks|thank you|if possible)", re.IGNORECASE)
DISAGREEMENT = 1.25
"""From this residual on, against the noise, a slice is warned of."""
ROUNDS, DARK = 12, 0.05
"""Most steps that bring an image to its data, and the share of the brightest pixel below which a pixel moves less than half as far: no
noise is brought into air."""


@dataclass(frozen=True)
class Reconstruction:
    """What was made of k-space."""

    image: Volume
    """Magnitude."""
    spread: Volume
    """Expected absolute error of the network's magnitude, in its unit: what then moved toward the data is less off, if anything."""
    zero_filled: Volume
    """What the samples give without any model."""
    residuals: tuple[float, ...]
    """Of each slice: root mean square of measured minus predicted samples, over the noise, with sensitivities fitted to the image."""
    network_residuals: tuple[float, ...]
    """The same of what the network gave, before it was brought to the data (`explain`)."""
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
            "network_residual_over_noise": [round(r, 3) for r in self.network_residuals],
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
    clauses = re.split(r"\s*(?:[,;.?!]|\band then\b|\bthen\b|\band\b)\s*", question.strip().rstrip("?!"))
    clauses = [c for c in clauses if c and not _POLITE.fullmatch(c)]
    rest = [c for c in clauses if not _ASKED.search(c)]
    asked = len(rest) < len(clauses)
    return asked, " and ".join(rest).capitalize() if asked else question


def noise_of(data: Tensor) -> Tensor:
    """(S,) standard deviation of a sample's noise in k-space (S, c, H, W): the median of what lies in a coil's corners, as the root mean
    square over the coils that have any; 0 for a slice without data.
    """
    rows, width = max(1, round(EDGE * data.shape[2])), data.shape[3]
    far = (torch.arange(width) - width // 2).abs() >= FAR * width
    ends = torch.cat([data[:, :, :rows], data[:, :, -rows:]], 2)
    levels = torch.zeros(len(data))
    for k in range(len(data)):
        for seen in (ends[k][..., far], ends[k], data[k]):  # the corners, or even the ends, were not acquired
            medians = [float(size[size > 0].median()) for size in seen.abs() if bool((size > 0).any())]
            if medians:
                # The magnitude of complex Gaussian noise has its median at sqrt(ln 2) of the root mean square.
                levels[k] = torch.tensor(medians).square().mean().sqrt() / 0.8326
                break
    return levels


def explain(found: Reconstructed, data: Tensor, mask: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images (S, H, W) that leave no more of the samples (S, c, H, W) unexplained than noise does, where that can be had.

    Sensitivities are fitted to the images. What is off by more than the noise, and by less than a disagreement, moves along the data's
    pull, weighted by its own brightness, just until it reaches the noise (Morozov's discrepancy principle): signal that the network
    smoothed away comes back, noise in air does not.

    Args:
        level: (S,) standard deviation of a sample's noise.

    Returns:
        The images, and (S,) the root mean square of what they leave, over the noise, before and after.
    """
    keep, image = mask.to(data.real.dtype), found.image
    coils, off = fit_coils(image, found.coils, ifft2c(data), keep)
    there, level = (data != 0).flatten(2).any(2), level.clamp(min=1e-30)
    samples = (keep.expand(-1, data.shape[2], -1).sum((1, 2)) * there.sum(1)).clamp(min=1)
    off = off * there[:, :, None, None]  # a coil without data pulls nowhere
    energy = lambda x: x.abs().square().sum((1, 2, 3))  # noqa: E731
    before = left = (energy(off) / samples).sqrt() / level
    partial = ~mask.flatten(1).all(1)
    for _ in range(ROUNDS):
        moves = partial & (left > 1) & (left < DISAGREEMENT)
        if not bool(moves.any()):
            break
        size = image.abs()
        pull = (coils.conj() * off).sum(1) * size / (size + DARK * size.flatten(1).amax(1)[:, None, None] + 1e-30)
        seen = sampled(pull[:, None] * coils, keep) * there[:, :, None, None]
        # The residual along the pull is a parabola; go to where it meets the noise, or to its lowest point.
        a, b = energy(seen).clamp(min=1e-30), (off.conj() * seen).real.sum((1, 2, 3))
        c = energy(off) - samples * (0.999 * level) ** 2
        step = torch.where(moves, (b - (b * b - a * c).clamp(min=0).sqrt()) / a, 0.0)
        image, off = image + step[:, None, None] * pull, off - step[:, None, None, None] * seen
        left = (energy(off) / samples).sqrt() / level
    return image, before, left


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
    residuals, before, levels, shares = [], [], [], []
    for slab in kspace.slabs():
        level = torch.full((len(slab.data),), float(slab.noise)) if slab.noise else noise_of(slab.data)
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
            image, network, left = explain(found, data, mask, level[first : first + CHUNK].to(device))
            residuals += left.tolist()
            before += network.tolist()
            parts = [image.abs(), found.spread, found.zero_filled.abs()]
            parts = [_shown(p.transpose(1, 2) if lines else p, kspace.crop).cpu() for p in parts]
            for store, part in zip((images, spreads, simple), parts, strict=True):
                store.append(part)
        levels += level.tolist()

    def volume(parts: Sequence[Tensor], name: str) -> Volume:
        return Volume(Reconstruct().read(torch.cat(list(parts)))[None], kspace.affine, oriented=kspace.oriented, name=name)

    return Reconstruction(
        image=volume(images, "reconstruction"),
        spread=volume(spreads, "uncertainty"),
        zero_filled=volume(simple, "zero-filled"),
        residuals=tuple(residuals),
        network_residuals=tuple(before),
        noise=sum(levels) / max(1, sum(x > 0 for x in levels)),
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
