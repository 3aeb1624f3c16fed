"""Answer: text with its slots filled from masks and header, findings, and the object that `--json` prints."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .anatomy import GROUPS, LESION, NAMES, groups_of, join
from .examination import Examination
from .lesions import Lesion
from .measure import signal_sentence, size_word
from .reconstruction import Reconstruction

NOTICE = "Research use only. Not a medical device."
_PARAMETERS = {
    "<tr>": ("repetition_time_ms", "{:.0f}"),
    "<te>": ("echo_time_ms", "{:.0f}"),
    "<ti>": ("inversion_time_ms", "{:.0f}"),
    "<tesla>": ("field_strength_tesla", "{:g}"),
}
_UNITS = {"<tr>": " ms", "<te>": " ms", "<ti>": " ms", "<tesla>": " T"}
_NONE = re.compile(r"\bno (focal )?lesions?\b|\bno lesion\b", re.IGNORECASE)
_ONE = re.compile(r"\b(one|a single) lesion\b", re.IGNORECASE)
_DISEASE = re.compile(r"\b(mass|tumou?r|\w*glioma|meningioma|metasta\w+|infarct|stroke|ha?emorrhage|bleed|abscess|demyelination"
                      r"|small-vessel)\b", re.IGNORECASE)
_INTENSITY = re.compile(r"\bhyp(?:er|o)intense\b")
_LOBE = re.compile(r"^The (?:largest lesion lies in the .*\blobe\b|lobe cannot be told)")
_SIDE = re.compile(r"^(?:The largest lesion is on the (?:left|right)|It lies in the midline)\.$")
_MANY = re.compile(r"<count> lesions|\bseveral lesions\b|\bmultiple lesions\b", re.IGNORECASE)
_PLANE = re.compile(r"\b(axial|coronal|sagittal|oblique)\b", re.IGNORECASE)
_ASKS_PLANE = re.compile(r"\b(plane|orientation)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """A lesion as it is shown: one object with its mask, box and words."""

    lesion: Lesion
    label: int
    sop_instance_uid: str | None

    def to_json(self) -> dict[str, Any]:
        """The contract's finding."""
        m = self.lesion.measured
        return {
            "name": LESION,
            "label": self.label,
            "side": self.lesion.side,
            "location": self.lesion.place,
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


@dataclass(frozen=True)
class Grounded:
    """A text of which every sentence has its pixels."""

    raw: str
    lesions: tuple[Lesion, ...]
    """The lesion of each lesion `<segment>` in `raw`, in order."""
    notes: tuple[str, ...]


MOST_SPELLED = 4
"""Lesions that a text tells of one by one."""
UNJUDGED = "Whether there are lesions cannot be told: this checkpoint finds too few of them."


def ground_lesions(raw: str, lesions: tuple[Lesion, ...], *, exhaustive: bool, can_deny: bool = True) -> Grounded:
    """Hold a text against the lesion masks.

    The k-th lesion `<segment>` is the k-th lesion by volume; a sentence whose lesion has no mask is removed, so is one
    that denies or miscounts lesions that have masks.

    Args:
        exhaustive: The answer is to tell of every lesion (report, detection): those it forgot are added, the largest in words.
        can_deny: Whether this checkpoint's sensitivity lets an empty mask mean "no lesion".
    """
    kept: list[str] = []
    shown: list[Lesion] = []
    notes: list[str] = []
    for sentence in sentences(raw):
        number = sentence.count("<segment>") if LESION in sentence else 0
        lesional = LESION in sentence or bool(_DISEASE.search(sentence))
        wrong = (
            ("denies a lesion that has a mask", bool(_NONE.search(sentence)) and bool(lesions)),
            ("denies lesions, which this checkpoint cannot", bool(_NONE.search(sentence)) and not can_deny),
            ("counts one lesion", bool(_ONE.search(sentence)) and len(lesions) != 1),
            ("counts several lesions", bool(_MANY.search(sentence)) and len(lesions) < 2),
            ("tells of a lesion without a mask", lesional and not lesions and not _NONE.search(sentence)),
            ("tells of a lesion without a mask", number > 0 and len(shown) + number > len(lesions)),
            ("names another place than the mask's", number == 1 and len(shown) < len(lesions)
             and not _place_fits(sentence, lesions[len(shown)])),
            ("tells another side than the largest lesion's", lesional and not number and bool(lesions)
             and not _place_fits(sentence, lesions[0])),
        )
        reason = next((why for why, holds in wrong if holds), None)
        if reason is None:
            if number == 1 and (word := _INTENSITY.search(sentence)) and (measured := lesions[len(shown)].signal) not in ("", word[0]):
                sentence = _INTENSITY.sub(measured, sentence)
                notes.append("how bright a lesion is was replaced by what its mask measures")
            if number and "<ml>" not in sentence:
                sentence = sentence.replace("<mm> mm across", "<mm> mm across, <ml> ml")
            shown += lesions[len(shown) : len(shown) + number]
            kept.append(sentence)
        else:
            notes.append(f"a sentence was removed because it {reason}")
    if exhaustive:
        missing = lesions[len(shown) : max(MOST_SPELLED, len(shown))]
        unspelled = len(lesions) - len(shown) - len(missing)
        said = [f"There is a {' '.join(filter(None, ('<size>', x.signal)))} lesion in the {x.place} <segment>, <mm> mm in diameter "
                "and <ml> ml in volume." for x in missing]
        if unspelled:
            other = f"other {unspelled} are" if unspelled > 1 else "other one is"
            said.append(f"The {other} smaller and listed with the findings.")
        place = next((i for i, s in enumerate(kept) if s.startswith("Impression")), len(kept))
        kept[place:place] = said
        shown += missing
        if not lesions and not any(_NONE.search(s) for s in kept):
            kept.append("No lesion is found." if can_deny else UNJUDGED)
        elif not lesions and not can_deny:
            kept.append(UNJUDGED)
    if not kept and not can_deny:
        kept.append(UNJUDGED)
    return Grounded(" ".join(kept) or "I cannot tell from this study.", tuple(shown), tuple(dict.fromkeys(notes)))


def ground_place(text: str, lesions: tuple[Lesion, ...]) -> tuple[str, tuple[str, ...]]:
    """The text with lobe and side of the largest lesion as its mask measures them, whatever the model said; and notes."""
    if not lesions:
        return text, ()
    first = lesions[0]
    untold = f"The lobe cannot be told; the largest lesion lies in the {first.place}."
    lobe = f"The largest lesion lies in the {first.lobe}." if first.lobe else untold
    side = {"unknown": "The side cannot be told.", "midline": "The largest lesion lies on both sides of the midline."}.get(
        first.side, f"The largest lesion is on the {first.side}.")
    before = list(sentences(text))
    after = [lobe if _LOBE.search(s) else side if _SIDE.search(s) else s for s in before]
    return (text, ()) if after == before else (" ".join(after), ("where the largest lesion lies is told as its mask measures it",))


def ground_plane(question: str, raw: str, plane: str) -> tuple[str, tuple[str, ...]]:
    """Hold a text's plane against the affine's: another plane's name is corrected, and a question about the plane is answered.

    Args:
        plane: From the affine: axial, coronal, sagittal or oblique.

    Returns:
        The text and notes on what was changed.
    """
    told = [p for p in _PLANE.findall(raw) if p.lower() != plane]
    notes = ("a plane in the text was replaced by the affine's",) if told else ()
    if told:
        raw = _PLANE.sub(lambda found: plane.capitalize() if found[0][0].isupper() else plane, raw)
        raw = re.sub(rf"\ban? {plane}\b", f"{'an' if plane[0] in 'ao' else 'a'} {plane}", raw)
    # A report opens with its plane; one that goes on with a finding at once lacks the words between.
    raw = re.sub(rf"^(<report> ?)?{plane.capitalize()} (?=<size>)", r"\g<0>MRI of the brain. A ", raw)
    if _ASKS_PLANE.search(question) and plane not in raw.lower():
        raw = f"{raw} The plane is {plane}."
    return raw, notes


_SEQUENCE = re.compile(r"\b(contrast-enhanced|[Cc]ontrast agent|T1|T2|FLAIR|[Pp]roton|PD)")
UNKNOWN_SEQUENCE = "The sequence cannot be told from the image."


def ground_sequence(raw: str, plane: str) -> tuple[str, tuple[str, ...]]:
    """Where neither header nor checkpoint tells the sequence: every sentence that names one gives way to one that says so.

    Args:
        plane: From the affine; said where such a sentence said a plane.

    Returns:
        The text and notes on what was changed.
    """
    task = re.match(r"(<\w+> )?", raw)[0]  # type: ignore[index]
    parts = sentences(raw.removeprefix(task))
    kept = [s for s in parts if not _SEQUENCE.search(s)]
    if len(kept) == len(parts):
        return raw, ()
    told = [UNKNOWN_SEQUENCE]
    if any(_PLANE.search(s) for s in parts if s not in kept):
        told = [f"{plane.capitalize()} MRI of the brain.", UNKNOWN_SEQUENCE]
    return task + " ".join([*told, *kept]), ("a sequence was named that this checkpoint cannot tell; the sentence was removed",)


_GROUP = "|".join(map(re.escape, GROUPS))
_GROUP_LIST = re.compile(rf"(?:{_GROUP})(?:(?:, | and )(?:{_GROUP}))*", re.IGNORECASE)
_SEEN = re.compile(rf"(?:Yes|No), the ({_GROUP}) (is|are) (?:not )?visible\.")
_UNSEEN = re.compile(r"(?:The (.+?) (?:is|are) not visible in these slices|These slices do not show the (.+?)|I cannot see the (.+?) here)"
                     r"\.?")
_SIGNAL = re.compile(
    r"(cerebrospinal fluid|grey matter) is ((?:much )?(?:brighter|darker)|similar) (?:than|to) white matter", re.IGNORECASE)


def ground_anatomy(raw: str, visible: Collection[str], signal: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Hold what a text says of normal anatomy against the masks: only what has one is listed, and signal is as measured.

    Args:
        visible: Structures that have a mask.
        signal: Tissue -> brightness against white matter, see `measure.signal_words`.

    Returns:
        The text and notes on what was changed.
    """
    shown, kept, notes = groups_of(visible), [], []
    for sentence in sentences(raw):
        if asked := _SEEN.fullmatch(sentence):
            group, verb = asked.groups()
            kept.append(f"Yes, the {group} {verb} visible." if group in shown else f"No, the {group} {verb} not visible.")
            if kept[-1] != sentence:
                notes.append("whether anatomy is visible is told as the masks show it")
            continue
        told = {k.lower(): v.lower() for k, v in _SIGNAL.findall(sentence)}
        if any(signal.get(k) != v for k, v in told.items()):
            notes.append("a sentence on signal was replaced by what the masks measure")
            sentence = signal_sentence(signal)
        listed = _GROUP_LIST.search(sentence)
        if listed and any(g not in shown for g in re.findall(_GROUP, listed[0].lower())):
            notes.append("anatomy without a mask was removed from a sentence")
            left = [g for g in re.findall(_GROUP, listed[0].lower()) if g in shown]
            sentence = sentence[: listed.start()] + join(left) + sentence[listed.end() :] if left else ""
        kept.append(sentence)
    return " ".join(s for s in kept if s), tuple(dict.fromkeys(notes))


def ground_unseen(raw: str, visible: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """The outline of a structure that has a mask, where a text says that it cannot be seen; other texts as they are; and notes."""
    denied = _UNSEEN.fullmatch(raw)
    name = next(filter(None, denied.groups())) if denied else ""
    if name not in visible:
        return raw, ()
    return f"Outlined: the {name} <segment>, <ml> ml.", (f"the model said that the {name} cannot be seen, but it has a mask",)


def _place_fits(sentence: str, lesion: Lesion) -> bool:
    """Whether the place and side in a sentence are those of the lesion, where it names any."""
    named = [n for n in NAMES if n in sentence]
    if named and lesion.place not in named:
        return False
    sides = set(re.findall(r"\b(left|right)\b", sentence))
    return not sides or lesion.side in sides or lesion.side in ("midline", "unknown")


def fill_slots(raw: str, measures: list[dict[str, str]], seen: Examination, num_lesions: int) -> str:
    """Fill every slot: with the measures of the nearest `<segment>` before it, of the first where none stands before
    it in its sentence, or with header values.

    Args:
        measures: For each `<segment>` in order, slot -> text.
    """
    out: list[str] = []
    used = 0
    # A `<segment>` cites its slice.
    for sentence in sentences(raw.replace("<segment>, slice <slice>", "<segment>")):
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
                pieces[i] = str(num_lesions)
            elif piece in _PARAMETERS:
                name, style = _PARAMETERS[piece]
                value = seen.volume.parameters.get(name)
                pieces[i] = style.format(value) if value is not None else "not recorded"
                if value is None and i + 1 < len(pieces):
                    pieces[i + 1] = pieces[i + 1].removeprefix(_UNITS[piece])
            elif re.fullmatch(r"<[a-z]+>", piece):
                pieces[i] = current.get(piece, "not measured") if piece in ("<ml>", "<mm>", "<size>", "<slice>", "<percent>") else ""
        used += inside
        out.append(re.sub(r"\s+([.,;])", r"\1", re.sub(r" {2,}", " ", "".join(pieces))).strip())
    return " ".join(out)


def lesion_measures(lesion: Lesion, num_slices: int) -> dict[str, str]:
    """Slot texts of a lesion. Slices are counted from 1 for people."""
    m = lesion.measured
    return {
        "<ml>": f"{m.volume_ml:.1f}" if m.volume_ml >= 0.1 else f"{m.volume_ml:.2f}",
        "<mm>": f"{m.diameter_mm:.0f}",
        "<size>": size_word(m.diameter_mm),
        "<slice>": str(m.slice_index + 1),
        "cite": f"(slice {m.slice_index + 1} of {num_slices}{', on both sides of the midline' if lesion.side == 'midline' else ''})",
    }
