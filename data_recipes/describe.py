"""The five-level description of a record and the question and answer wordings.

Levels: 1 modality and sequence, 2 visible anatomy, 3 tissue signal, 4 findings, 5 impression. Numbers are slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from omnimri.anatomy import GROUPS, NAMES, SEQUENCE_WORDS, STRUCTURES, groups_of, join
from omnimri.conversation import COUNT_WORDS, Message
from omnimri.example import Record, normalise
from omnimri.measure import signal_sentence, signal_words

from .recipe import pick, uniform

LEAST_PIXELS = 25
"""A structure with fewer pixels in the study is not called visible."""


@dataclass(frozen=True)
class Facts:
    """What is true of a record."""

    plane: str
    sequence: str
    visible: tuple[str, ...]
    """Structure names."""
    places: tuple[str, ...]
    """Of lesions, by falling volume."""
    signal: dict[str, str]
    """`cerebrospinal fluid`, `grey matter`, `lesion` -> `brighter`, `much darker`, ... or `similar`, against white matter."""

    @property
    def groups(self) -> list[str]:
        """Names of the visible groups of structures."""
        return groups_of(self.visible)


def facts_of(record: Record) -> Facts:
    """Read the facts off a labelled record whose signal was measured."""
    assert record.labels is not None
    assert record.lesions is not None
    counts = torch.bincount(record.labels.flatten().long(), minlength=len(NAMES) + 1)
    visible = tuple(s.name for k, s in enumerate(STRUCTURES, 1) if int(counts[k]) >= LEAST_PIXELS)
    signal = dict(s.split(": ") for s in record.signal)
    assert record.sequence is not None
    return Facts(record.plane, record.sequence, visible, record.lesion_places or (), signal)


def article(word: str) -> str:
    """The word with `a` or `an`."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def level1(g: torch.Generator, f: Facts) -> str:
    """Modality, plane and sequence."""
    words = SEQUENCE_WORDS[f.sequence]
    if f.sequence == "other":
        return pick(g, (f"{f.plane.capitalize()} MRI of the brain; the sequence cannot be told from the image.",
                        f"Brain MRI in the {f.plane} plane with an unclassified contrast."))
    return pick(g, (f"{f.plane.capitalize()} {words} MRI of the brain.", f"Brain MRI, {f.plane} plane, {words} sequence.",
                    f"{words} images of the brain in the {f.plane} plane."))


def level2(g: torch.Generator, f: Facts) -> str:
    """Visible anatomy."""
    groups = f.groups
    if not groups:
        return "No brain structure is fully shown."
    return pick(g, (f"The slices show the {join(groups)}.", f"Visible are the {join(groups)}.",
                    f"The study covers the {join(groups)}."))


def level3(g: torch.Generator, f: Facts) -> str:
    """Tissue signal against white matter."""
    return signal_sentence(f.signal)


def finding(g: torch.Generator, f: Facts, place: str) -> str:
    """One lesion with its slot and its `<segment>`."""
    signal = f.signal.get("lesion", "")
    look = "hyperintense " if "brighter" in signal else "hypointense " if "darker" in signal else ""
    a = article(f"<size> {look}lesion").replace("an <size>", "a <size>")
    return pick(g, (f"There is {a} in the {place} <segment>, <mm> mm in diameter and <ml> ml in volume.",
                    f"{a.capitalize()} lies in the {place} <segment>; it measures <mm> mm and <ml> ml.",
                    f"In the {place} there is {a} <segment> of <mm> mm and <ml> ml."))


def level4(g: torch.Generator, f: Facts) -> str:
    """Findings, the largest first; at most four are spelled out."""
    if not f.places:
        return pick(g, ("No lesion is found.", "No focal lesion is seen.", "There is no focal lesion."))
    return " ".join(finding(g, f, p) for p in f.places[: len(COUNT_WORDS) - 1])


def level5(g: torch.Generator, f: Facts) -> str:
    """Impression."""
    if not f.places:
        return pick(g, ("Impression: no focal lesion.", "Impression: no lesion was found."))
    if len(f.places) == 1:
        return f"Impression: a single lesion in the {f.places[0]}."
    return f"Impression: <count> lesions, the largest in the {f.places[0]}."


def report(g: torch.Generator, f: Facts) -> str:
    """All five levels."""
    return " ".join(t for t in (level1(g, f), level2(g, f), level3(g, f), level4(g, f), level5(g, f)) if t)


def segment_turns(g: torch.Generator, f: Facts) -> list[Message]:
    """Ask for one structure, perhaps the other side after it, or for everything."""
    if uniform(g, 0, 1) < 0.2:
        ask = pick(g, ("Segment everything.", "Segment all structures.", "Outline every structure.",
                       "Show me a full segmentation.", "Label the whole brain.", "Parcellate the brain please."))
        return [Message("user", ask), Message("assistant", "Every structure is outlined <segment>.")]
    absent = [n for n in NAMES if n not in f.visible]
    name = pick(g, absent) if absent and uniform(g, 0, 1) < 0.15 else pick(g, f.visible or NAMES)
    turns = []
    for n in (name, name.replace("left", "\0").replace("right", "left").replace("\0", "right")):
        ask = pick(g, (f"Segment the {n}.", f"Outline the {n}.", f"Can you show me the {n}?", f"Where is the {n}?",
                       f"Delineate the {n} please.", f"segment {n}", f"Please mark the {n}.", f"Draw the {n}.",
                       f"How large is the {n}?", f"What is the volume of the {n}?"))
        if turns:
            side = n.split()[0]
            ask = pick(g, (f"And on the {side}?", f"And the {side} one?", f"What about the {side} side?"))
        if n in f.visible:
            answer = pick(g, (f"Outlined: the {n} <segment>, <ml> ml.", f"Outlined is the {n} <segment> of <ml> ml."))
        else:
            answer = f"The {n} is not visible in these slices."
        turns += [Message("user", ask), Message("assistant", answer)]
        if n == name and (not name.startswith(("left", "right")) or uniform(g, 0, 1) < 0.7):
            break
    return turns


def detect_turns(g: torch.Generator, f: Facts) -> list[Message]:
    """Ask for lesions."""
    ask = pick(g, ("Find lesions.", "Are there any lesions?", "Is there anything abnormal?", "Detect lesions.",
                   "Is there a tumour?", "Do you see an abnormality?", "Look for lesions please.", "Any pathology?",
                   "Mark all lesions.", "Is this brain normal?", "Where is the lesion?", "Locate every lesion."))
    if not f.places:
        answer = pick(g, ("<detect> No lesion is found.", "<detect> There is no focal lesion."))
    elif len(f.places) == 1:
        answer = f"<detect> There is one lesion. {finding(g, f, f.places[0])}"
    else:
        shown = " ".join(finding(g, f, p) for p in f.places[: len(COUNT_WORDS) - 1])
        answer = f"<detect> There are <count> lesions. {shown}"
    turns = [Message("user", ask), Message("assistant", answer)]
    if f.places and uniform(g, 0, 1) < 0.3:
        side = f.places[0].split()[0]
        told = f"The largest lesion is on the {side}." if side in ("left", "right") else "It lies in the midline."
        turns += [Message("user", pick(g, ("On which side?", "Left or right?", "Which side is it on?"))),
                  Message("assistant", told)]
    return turns


def report_turns(g: torch.Generator, f: Facts) -> list[Message]:
    """Ask for the whole report."""
    ask = pick(g, ("Write a report.", "Report this study.", "Describe this study.", "Summarise the findings.",
                   "Give me a radiology report.", "What do you see?", "Please dictate a report.", "Report please.",
                   "Describe the image in detail.", "What does this MRI show?"))
    return [Message("user", ask), Message("assistant", f"<report> {report(g, f)}")]


def reconstruct_turns(g: torch.Generator, f: Facts) -> list[Message]:
    """Ask for a reconstruction."""
    ask = pick(g, ("Reconstruct this.", "Reconstruct the image.", "Make an image from the k-space.",
                   "Reconstruct the undersampled data.", "Run the reconstruction please.", "Turn the raw data into an image."))
    return [Message("user", ask), Message("assistant", "<reconstruct> The image is reconstructed from the k-space.")]


def question_turns(g: torch.Generator, f: Facts) -> list[Message]:
    """Questions answered in words."""
    words, plane = SEQUENCE_WORDS[f.sequence], f.plane
    unclear = f.sequence == "other"
    kind = pick(g, ("both", "sequence", "plane", "weighting", "contrast", "visible", "signal", "level", "parameter", "off"),
                (0.16, 0.14, 0.1, 0.1, 0.1, 0.14, 0.08, 0.06, 0.06, 0.06))
    if kind == "both":
        ask = pick(g, ("What sequence and plane is this?", "Which sequence and which plane?", "Name the sequence and the plane."))
        answer = (f"The plane is {plane}; the sequence cannot be told." if unclear
                  else f"This is {article(plane)} {words} image.")
    elif kind == "sequence":
        ask = pick(g, ("What sequence is this?", "What is the MR weighting in this image?", "Which sequence was used?",
                       "What imaging modality was used to take this image?", "Is this T1, T2 or FLAIR?",
                       "How was the image taken?", "What kind of MRI is it?"))
        answer = "The sequence cannot be told from the image." if unclear else f"This is {article(words)} MRI."
    elif kind == "plane":
        ask = pick(g, ("What plane is this?", "In which plane was this taken?", "Which orientation are the slices?"))
        answer = f"The plane is {plane}."
    elif kind == "weighting":
        guess = pick(g, ("T1w", "T2w", "FLAIR", "PDw"))
        ask = pick(g, (f"Is this {article(SEQUENCE_WORDS[guess])} image?", f"Is this image {SEQUENCE_WORDS[guess]}?"))
        same = guess == f.sequence or (guess == "T1w" and f.sequence == "T1w-Gd")
        answer = "I cannot tell the sequence." if unclear else f"{'Yes' if same else 'No'}, it is {words}."
    elif kind == "contrast":
        ask = pick(g, ("Was the MRI taken with contrast?", "Was gadolinium given?", "Is this a noncontrast MRI?"))
        given = f.sequence == "T1w-Gd"
        yes = given != ("noncontrast" in ask)
        answer = ("I cannot tell." if unclear else
                  f"{'Yes' if yes else 'No'}, {'a' if given else 'no'} contrast agent was given.")
    elif kind == "visible":
        group = pick(g, tuple(GROUPS))
        verb = "is" if group in ("cerebellum", "brain-stem") else "are"
        ask = pick(g, (f"{verb.capitalize()} the {group} visible?", f"Can the {group} be seen?", f"Do you see the {group}?"))
        seen = group in f.groups
        answer = f"{'Yes' if seen else 'No'}, the {group} {verb} {'' if seen else 'not '}visible."
    elif kind == "signal":
        ask = pick(g, ("Is the cerebrospinal fluid bright or dark?", "How bright is grey matter?", "Describe the signal."))
        answer = level3(g, f) or "I cannot tell."
    elif kind == "level":
        ask, answer = pick(g, (("Which anatomy is shown?", level2(g, f)), ("Give only the impression.", level5(g, f)),
                               ("What are the findings?", level4(g, f)), ("Describe the technique.", level1(g, f))))
    elif kind == "parameter":
        ask, answer = pick(g, (("What is the echo time?", "The echo time is <te> ms."),
                               ("What is the repetition time?", "The repetition time is <tr> ms."),
                               ("What is the inversion time?", "The inversion time is <ti> ms."),
                               ("What is the field strength?", "The field strength is <tesla> T.")))
    else:
        ask = pick(g, ("Who is the patient?", "What is the diagnosis in the other knee?", "How old is the patient?",
                       "Will it rain tomorrow?", "What treatment do you advise?", "Tell me a joke.", "asdf"))
        answer = "I can only speak about what this study shows."
    return [Message("user", ask), Message("assistant", answer)]


TURNS = (segment_turns, detect_turns, report_turns, reconstruct_turns, question_turns)


def describe(record: Record, g: torch.Generator) -> Record:
    """Add caption, facts and conversations: two to ten drawn exchanges, of which reports take most of the words."""
    assert record.labels is not None
    assert record.lesions is not None
    record = replace(record, signal=signal_words(normalise(record.images)[:, 1], record.labels, record.lesions))
    f = facts_of(record)
    exchanges = [pick(g, TURNS, (0.27, 0.18, 0.14, 0.12, 0.29))(g, f) for _ in range(pick(g, (2, 4, 6, 8, 10)))]
    return replace(
        record,
        caption=report(g, f),
        conversations=tuple(tuple(e) for e in exchanges),
        facts=(f.plane, f.sequence, *f.groups, *f.places),
    )
