"""Answer: text with its slots filled from masks and header, findings, and the object that `--json` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .anatomy import LESION
from .examination import Examination
from .lesions import Lesion, without_sides
from .measure import size_word
from .reconstruction import Reconstruction

NOTICE = "Research use only. Not a medical device."
UNLIKE = "I cannot judge this study: it is unlike the images I was trained on."
SIDES_UNKNOWN = "sides are unknown: the file gives no orientation"
_PARAMETERS = {
    "<tr>": ("repetition_time_ms", "{:.0f}"),
    "<te>": ("echo_time_ms", "{:.0f}"),
    "<ti>": ("inversion_time_ms", "{:.0f}"),
    "<tesla>": ("field_strength_tesla", "{:g}"),
}
_UNITS = {"<tr>": " ms", "<te>": " ms", "<ti>": " ms", "<tesla>": " T"}
_SLOT_OF = {"echo time": "<te>", "repetition time": "<tr>", "inversion time": "<ti>", "field strength": "<tesla>"}
"""The slot of what a sentence speaks of: one value is not shown for another."""

_BOTH_SIDES = ", on both sides of the midline"
_OF_LARGEST = re.compile(rf"\b(?:largest|single {LESION})\b")


@dataclass(frozen=True)
class Finding:
    """A lesion as it is shown: one object with its mask, box and words."""

    lesion: Lesion
    label: int | None
    """Of its side in label maps; None where it lies on both, or sides are unknown: each voxel there has that of its own."""
    sop_instance_uid: str | None

    def to_json(self) -> dict[str, Any]:
        """The contract's finding."""
        m = self.lesion.measured
        return {
            "number": self.lesion.rank,
            "name": LESION,
            "label": self.label,
            "side": self.lesion.side,
            "location": self.lesion.told_place,
            "volume_ml": round(m.volume_ml, 3),
            "diameter_mm": round(m.diameter_mm, 1),
            "box_mm": [[round(v, 2) for v in corner] for corner in m.box_mm],
            "slice_index": m.slice_index,
            "sop_instance_uid": self.sop_instance_uid,
            "confidence": round(self.lesion.confidence, 3),
        }


@dataclass(frozen=True)
class StructureVolume:
    """One segmented structure."""

    label: int
    name: str
    voxels: int
    volume_ml: float

    def to_json(self) -> dict[str, Any]:
        """A row of the table of structures."""
        return {"name": self.name, "label": self.label, "voxels": self.voxels, "volume_ml": round(self.volume_ml, 3)}


@dataclass(frozen=True)
class Answer:
    """What a person gets for a question."""

    text: str
    raw: str
    """The text with slots and task tokens, as the model wrote it: what a conversation remembers."""
    task: str
    """reconstruct, segment, detect, report, or `text` where no task token was chosen."""
    study: Mapping[str, Any]
    scope: Mapping[str, Any]
    model: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    structures: tuple[StructureVolume, ...] = ()
    warnings: tuple[str, ...] = ()
    labels: Tensor | None = None
    """(X, Y, Z) int32 label map in the scan's own space: what the answer asked to be drawn, lesions included."""
    covered: Tensor | None = None
    """(X, Y, Z) int32: `labels` without lesions: what they lie on."""
    lesion_ranks: Tensor | None = None
    """(X, Y, Z) uint8: 0, or the lesion's rank, as in `findings`."""
    affine: Tensor | None = None
    brain_ml: float = 0.0
    """All that was outlined inside the skull, fluid included."""
    reconstruction: Reconstruction | None = None
    """What was made of k-space."""
    notice: str = field(default=NOTICE)

    def to_json(self) -> dict[str, Any]:
        """The contract's object."""
        told: dict[str, Any] = {
            "text": self.text,
            "findings": [f.to_json() for f in self.findings],
            "study": dict(self.study),
            "scope": dict(self.scope),
            "warnings": list(self.warnings),
            "model": dict(self.model),
            "notice": self.notice,
        }
        if self.structures:
            told["structures"] = [s.to_json() for s in self.structures]
        if self.reconstruction is not None:
            told["reconstruction"] = self.reconstruction.to_json()
        return told


def sentences(text: str) -> list[str]:
    """Split at full stops that end a sentence; slots hold no stop."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def fill_slots(raw: str, measures: list[dict[str, str]], seen: Examination, lesions: Sequence[Lesion]) -> str:
    """Fill every slot: with the measures of the nearest `<segment>` before it, of the first where none stands before
    it in its sentence, or with header values.

    Args:
        measures: For each `<segment>` in order, slot -> text.
        lesions: Every one of the study, the largest first.
    """
    out: list[str] = []
    used = 0
    # A `<segment>` cites its slice.
    for sentence in sentences(raw.replace("<segment>, slice <slice>", "<segment>")):
        for name, slot in _SLOT_OF.items():
            if sentence.startswith(f"The {name} is "):
                sentence = re.sub(r"<(?:te|tr|ti|tesla)>", slot, sentence, count=1)
        inside = sentence.count("<segment>")
        own = measures[used : used + inside]
        current = own[0] if own else (measures[used - 1] if used else {})
        position = -1
        pieces = re.split(r"(<[a-z]+>)", sentence)
        for i, piece in enumerate(pieces):
            if piece == "<segment>":
                position += 1
                current = own[position]
                pieces[i] = current.get("cite", "")
            elif piece == "<count>":
                pieces[i] = str(len(lesions))
            elif piece in _PARAMETERS:
                name, style = _PARAMETERS[piece]
                value = seen.volume.parameters.get(name)
                pieces[i] = style.format(value) if value is not None else "not recorded"
                if value is None and i + 1 < len(pieces):
                    pieces[i + 1] = pieces[i + 1].removeprefix(_UNITS[piece])
            elif re.fullmatch(r"<[a-z]+>", piece):
                pieces[i] = current.get(piece, "not measured") if piece in ("<ml>", "<mm>", "<size>", "<slice>", "<percent>") else ""
        used += inside
        filled = re.sub(r"\s+([.,;])", r"\1", re.sub(r" {2,}", " ", "".join(pieces))).strip()
        both = inside == 1 and _BOTH_SIDES in own[0].get("cite", "")
        both = both or (not inside and bool(lesions) and lesions[0].side == "midline" and bool(_OF_LARGEST.search(filled)))
        out.append(without_sides(filled) if both else filled)
    return " ".join(out)


def lesion_measures(lesion: Lesion, num_slices: int) -> dict[str, str]:
    """Slot texts of a lesion. Slices are counted from 1 for people."""
    m = lesion.measured
    return {
        "<ml>": f"{m.volume_ml:.1f}" if m.volume_ml >= 0.1 else f"{m.volume_ml:.2f}",
        "<mm>": f"{m.diameter_mm:.0f}",
        "<size>": size_word(m.diameter_mm),
        "<slice>": str(m.slice_index + 1),
        "cite": f"(slice {m.slice_index + 1} of {num_slices}{_BOTH_SIDES if lesion.side == 'midline' else ''})",
    }
