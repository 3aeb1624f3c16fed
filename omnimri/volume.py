"""Volume, KSpace, Study: arrays with units, axes and an affine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_NAMED = (
    (r"(t2\W{0,2}(w|weighted)?\W{0,3})?flair", "FLAIR"),
    (r"(contrast|post|gad|t1.{0,12}(contrast|post|gd|gad|\+ ?c|c\b|ce\b))", "T1w-Gd"),
    (r"t1", "T1w"),
    (r"(t2\W?(\*|star)|swi|gre\b|dwi|diffusion|adc)", "other"),
    (r"t2", "T2w"),
    (r"(pd|proton)", "PDw"),
)
"""What people call a sequence, the first that fits."""
_ON_SEQUENCE = re.compile(
    r"\b(?:on|in|of|from|using|for|does|do) (?:the |this |my )?(?:(?:axial|coronal|sagittal|[23]-?d)\W+)*"
    r"((?:flair|contrast(?! (?:to|agent|medi))|post.?contrast|gad|t1|t2|pd\b|proton|swi\b|gre\b|dwi|diffusion.weighted|adc\b)[^.,;?!]*)",
    re.IGNORECASE)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_BY_NUMBER = re.compile(rf"\bseries (?:# ?|no\.? ?|number )?(\d+(?:\.\d+)?)|\b({'|'.join(_ORDINALS)}) series\b", re.IGNORECASE)


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """`torch.quantile` of (N,) float32 values, bit for bit; it sorts them all, which takes four times as long as a partition."""
    ranks = torch.tensor(shares) * (len(values) - 1)
    below, above = ranks.floor().long(), ranks.ceil().long()
    parted = torch.from_numpy(np.partition(values.cpu().numpy(), sorted({*below.tolist(), *above.tolist()})))
    return torch.lerp(parted[below], parted[above], ranks - below).tolist()


@dataclass(frozen=True)
class Volume:
    """One MR image in scanner space."""

    voxels: Tensor
    """(C, X, Y, Z) float32, scanner units."""
    affine: Tensor
    """(4, 4) float64, voxel index -> RAS+ mm."""
    sequence: str = "unknown"
    """One of `anatomy.SEQUENCES`, or `unknown` when the header does not say."""
    source: tuple[str, ...] = ()
    """SOPInstanceUID per slice along the last voxel axis, where it came from DICOM."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Whitelisted numeric header values: repetition_time_ms, echo_time_ms, inversion_time_ms, ..."""
    oriented: bool = True
    """Whether the file told its orientation; without it sides are unknown."""
    name: str = ""
    """A label made by us (never header text), such as `series 1`."""
    frame: int = 0
    """Number of the frame of reference: volumes of one frame share their space."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along the three axes."""
        _, x, y, z = self.voxels.shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths, mm, from the affine's columns."""
        x, y, z = torch.linalg.vector_norm(self.affine[:3, :3], dim=0).tolist()
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(torch.linalg.det(self.affine[:3, :3]).abs()) / 1000.0


@dataclass(frozen=True)
class KSpace:
    """Multi-coil Cartesian k-space of a stack of slices."""

    data: Tensor
    """(S, coils, H, W) complex64, centred; unsampled entries are zero."""
    mask: Tensor
    """(H, W) bool, sampled positions, or (1, W) for whole lines."""
    affine: Tensor
    """(4, 4) float64 of the reconstructed magnitude (W, H, S), cropped where `crop` says so, RAS+ mm."""
    oriented: bool = False
    """Whether the file tells sides."""
    coils: Tensor | None = None
    """(S, coils, H, W) complex64 sensitivities, where they are given."""
    noise: float | None = None
    """Root mean square of a sample's noise where it was measured, the same for every coil and independent between them."""
    crop: tuple[int, int] | None = None
    """Rows and columns around the middle that the scanner would show."""
    num_slices: int = 0
    """Of the whole file, of which `data` are the first; 0: all are here."""
    rest: Callable[[int], KSpace] | None = None
    """Reads the slices from a number on, as many as fit."""

    def slabs(self) -> Iterator[KSpace]:
        """These slices, and those of the file that did not fit beside them."""
        slab, done = self, len(self.data)
        yield slab
        while self.rest is not None and done < self.num_slices:
            slab = self.rest(done)
            done += len(slab.data)
            yield slab


@dataclass(frozen=True)
class SeriesNote:
    """What was found of one series, whether or not it is used; every word is this project's own."""

    name: str
    format: str
    kind: str
    """`image`, `localizer`, `ADC map`, ..."""
    variant: str
    """What tells volumes of one series apart, such as `echo 2 of 3`; or nothing."""
    sequence: str
    plane: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    parameters: Mapping[str, float]
    why: str
    """`used`, or `not used:` and the reason."""


@dataclass(frozen=True)
class Study:
    """What a person opened: one or several volumes, or raw k-space, with what was noticed on the way."""

    volumes: tuple[Volume, ...] = ()
    kspace: KSpace | None = None
    warnings: tuple[str, ...] = ()
    series: tuple[SeriesNote, ...] = ()
    """Everything that was found in the files."""

    @property
    def primary(self) -> Volume:
        """The volume that questions are about unless they name another: the one with most voxels.

        Raises:
            ValueError: the study holds k-space only.
        """
        if not self.volumes:
            raise ValueError("expected an image, got raw k-space only; reconstruct it first (omnimri reconstruct)")
        return max(self.volumes, key=lambda v: v.voxels.numel())

    @staticmethod
    def asked_for(question: str) -> str:
        """What a question names, be it there or not: `series 2`, or one of `anatomy.SEQUENCES`; empty where it names no series."""
        if number := _BY_NUMBER.search(question):
            return f"series {number[1] or 1 + _ORDINALS.index(number[2].lower())}"
        asked = _ON_SEQUENCE.search(question)
        return next(s for pattern, s in _NAMED if re.match(pattern, asked[1], re.IGNORECASE)) if asked else ""

    def named(self, question: str) -> Volume | None:
        """The volume that a question names: `series 2`, or `on the FLAIR`; None where it names none, or more than one fits."""
        wanted = self.asked_for(question)
        if wanted in ("", "other"):
            return None
        fits = [v for v in self.volumes if wanted in (v.name, v.sequence)]
        if wanted == "T1w" and not fits:
            fits = [v for v in self.volumes if v.sequence == "T1w-Gd"]
        return fits[0] if len(fits) == 1 else None
