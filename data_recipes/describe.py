"""The five-level description of a record and the exchanges about it.

Levels: 1 modality and sequence, 2 visible anatomy, 3 tissue signal, 4 findings, 5 impression. Numbers are slots. Nothing is
said that the image cannot show: what a lesion is called depends on the sequence that shows it so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from omnimri.anatomy import GROUPS, NAMES, SEQUENCE_WORDS, STRUCTURES, WHITE_CLASSES, groups_of, join
from omnimri.conversation import COUNT_WORDS, Message
from omnimri.example import Record, normalise
from omnimri.factcheck import NOT_SHOWN
from omnimri.knowledge import KNOWLEDGE
from omnimri.measure import signal_sentence, signal_words

from .recipe import pick, uniform
from .wording import Voice

CONTRAST = (("contrast", "Was contrast agent used?"), ("contrast", "Was gadolinium given?"),
            ("without contrast", "Is this scan without contrast?"))  # fmt: skip
"""Requests on contrast agent, and how they are made plainly."""
LEAST_PIXELS = 25
"""A structure with fewer pixels in the study is not called visible."""
TECHNIQUES = {"DWI": "diffusion-weighted", "ADC": "apparent diffusion coefficient", "T2*": "T2*-weighted gradient-echo"}
"""Names of what is none of `anatomy.SEQUENCES` and yet is something."""
LOOKS = {
    # kind: {sequence or technique: (adjective, what it may be)}
    "glioblastoma": {"T1w-Gd": ("irregularly enhancing", "a high-grade glioma")},
    "glioma": {"T1w-Gd": ("non-enhancing", "a low-grade glioma"), "FLAIR": ("infiltrating", "a glioma")},
    "meningioma": {"T1w-Gd": ("homogeneously enhancing, superficial", "a meningioma")},
    "metastasis": {"T1w-Gd": ("enhancing", "a metastasis")},
    "white-matter hyperintensity": {"FLAIR": ("white-matter", "small-vessel disease"), "T2w": ("white-matter", "small-vessel disease")},
    "acute infarct": {"DWI": ("diffusion-restricted", "an acute infarct"), "ADC": ("diffusion-restricted", "an acute infarct")},
    "old infarct": {"FLAIR": ("cystic", "an old infarct"), "T1w": ("cystic", "an old infarct")},
    "haemorrhage": {"T2*": ("blood-like", "a haemorrhage")},
    "abscess": {"T1w-Gd": ("thin-walled, ring-enhancing", "an abscess"), "DWI": ("diffusion-restricted", "an abscess")},
    "demyelination": {"FLAIR": ("ovoid white-matter", "demyelination"), "T2w": ("ovoid white-matter", "demyelination")},
    "hydrocephalus with transependymal oedema": {"FLAIR": ("periventricular", "oedema around wide ventricles")},
}


@dataclass(frozen=True)
class Facts:
    """What is true of a record."""

    plane: str
    sequence: str
    visible: tuple[str, ...]
    """Structure names."""
    places: tuple[str, ...]
    """Of lesions, by falling volume."""
    kinds: tuple[str, ...]
    """Of lesions, by falling volume."""
    lobes: tuple[str, ...]
    """Of lesions; empty where one lies in none or near a border."""
    technique: str
    signs: tuple[str, ...]
    """Of lesions: `brighter` or `darker` than white matter, or empty."""
    signal: dict[str, str]
    """`cerebrospinal fluid`, `grey matter`, `lesion` -> `brighter`, `much darker`, ... or `similar`, against white matter."""

    @property
    def words(self) -> str:
        """The sequence in words; empty where it cannot be told."""
        return TECHNIQUES.get(self.technique, "") if self.sequence == "other" else SEQUENCE_WORDS[self.sequence]

    def look(self, k: int) -> tuple[str, str]:
        """How the k-th lesion looks on this sequence, and what it may be; empty where the sequence does not tell."""
        looks = LOOKS.get(self.kinds[k], {}) if k < len(self.kinds) else {}
        return looks.get(self.sequence) or looks.get(self.technique) or ("", "")

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
    white = torch.isin(record.labels, torch.tensor(WHITE_CLASSES, device=record.labels.device))
    white &= record.lesions == 0
    level = record.images[:, 1]
    signs = tuple("" if not bool(white.any()) else "brighter" if level[record.lesions == r].median() > level[white].median() else "darker"
                  for r in range(1, 1 + len(record.lesion_places or ())))
    assert record.sequence is not None
    return Facts(record.plane, record.sequence, visible, record.lesion_places or (), record.lesion_kinds or (), record.lesion_lobes or (),
                 record.technique, signs, signal)


def article(word: str) -> str:
    """The word with `a` or `an`."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def upper(text: str) -> str:
    """The text with its first letter in upper case, the others as they are."""
    return text[0].upper() + text[1:]


def level1(v: Voice, f: Facts) -> str:
    """Modality, plane and sequence."""
    if not f.words:
        return v.say((f"{f.plane.capitalize()} MRI of the brain; the sequence cannot be told from the image.",
                      f"Brain MRI in the {f.plane} plane with an unclassified contrast."),
                     (f"{f.plane.capitalize()} brain MRI of unknown weighting.",
                      f"MRI of the brain, {f.plane}; the weighting cannot be told."))
    return v.say((f"{f.plane.capitalize()} {f.words} MRI of the brain.", f"Brain MRI, {f.plane} plane, {f.words} sequence.",
                  f"{upper(f.words)} images of the brain in the {f.plane} plane."),
                 (f"{f.plane.capitalize()} {f.words} brain MRI.", f"Technique: {f.plane} {f.words} MRI.",
                  f"MRI head, {f.plane}, {f.words}.",
                  f"{upper(article(f.words))} MRI of the brain in {f.plane} slices.",
                  f"The study is {article(f.words)} series in the {f.plane} plane."))


def level2(v: Voice, f: Facts) -> str:
    """Visible anatomy."""
    if not f.groups:
        return "No brain structure is fully shown."
    listed = join(f.groups)
    return v.say((f"The slices show the {listed}.", f"Visible are the {listed}.", f"The study covers the {listed}."),
                 (f"Included are the {listed}.", f"The images cover the {listed}.", f"Seen are the {listed}.", f"The {listed} are shown."))


def level3(v: Voice, f: Facts) -> str:
    """Tissue signal against white matter."""
    return signal_sentence(f.signal)


def finding(v: Voice, f: Facts, k: int) -> str:
    """The k-th lesion with its slots and its `<segment>`: words vary, what is told does not. What it may be is for the impression."""
    signal, place = f.signal.get("lesion", ""), f.places[k]
    sign = {"brighter": "hyperintense", "darker": "hypointense"}.get(f.signs[k] if f.signs[k] in signal else "", "")
    adjective = f.look(k)[0] if v.wide else ""
    look = adjective if re.search("enhancing|restricted", adjective) else " ".join(filter(None, (sign, adjective)))
    a = article(f"<size> {look} lesion".replace("  ", " ")).replace("an <size>", "a <size>")
    return v.say((f"There is {a} in the {place} <segment>, <mm> mm in diameter and <ml> ml in volume.",
                  f"{upper(a)} lies in the {place} <segment>; it measures <mm> mm and <ml> ml.",
                  f"In the {place} there is {a} <segment> of <mm> mm and <ml> ml."),
                 (f"{upper(a)} in the {place} <segment>, <mm> mm, <ml> ml.",
                  f"The {place} holds {a} <segment> of <mm> mm and <ml> ml.",
                  f"{upper(a)} is seen in the {place} <segment>, <mm> mm across, <ml> ml."))


def level4(v: Voice, f: Facts) -> str:
    """Findings, the largest first; at most four are spelled out."""
    if not f.places:
        return v.say(("No lesion is found.", "No focal lesion is seen.", "There is no focal lesion."),
                     ("No focal lesion.", "No lesion is visible on this sequence.", "There is no lesion to be seen."))
    return " ".join(finding(v, f, k) for k in range(min(len(f.places), len(COUNT_WORDS) - 1)))


def level5(v: Voice, f: Facts) -> str:
    """Impression."""
    if not f.places:
        return v.say(("Impression: no focal lesion.", "Impression: no lesion was found."),
                     ("Impression: no lesion on this sequence.", "In summary, no focal lesion."))
    may_be = f.look(0)[1] if v.wide else ""
    maybe = f", perhaps {may_be}" if may_be else ""
    if len(f.places) == 1:
        return f"Impression: a single lesion in the {f.places[0]}{maybe}."
    return f"Impression: <count> lesions, the largest in the {f.places[0]}{maybe}."


def report(v: Voice, f: Facts, *, terse: float = 0.2) -> str:
    """All five levels; a terse one has only findings and impression.

    Args:
        terse: How often a wide voice is terse.
    """
    levels = (level4, level5) if v.wide and uniform(v.g, 0, 1) < terse else (level1, level2, level3, level4, level5)
    return " ".join(t for t in (level(v, f) for level in levels) if t)


def segment_turns(v: Voice, f: Facts) -> list[Message]:
    """Ask for one structure, perhaps the other side after it, for both sides, or for everything."""
    kind = uniform(v.g, 0, 1)
    if kind < (0.28 if v.wide else 0.2):
        answer = v.say(("Every structure is outlined <segment>.",), ("All structures are outlined <segment>.",
                                                             "Outlined: every structure <segment>."))
        return [Message("user", v.ask("all")), Message("assistant", answer)]
    pairs = [n.removeprefix("left ") for n in f.visible if n.startswith("left") and n.replace("left", "right", 1) in f.visible]
    if v.wide and pairs and kind < 0.38:
        stem = pick(v.g, pairs)
        answer = f"The left {stem} <segment> has <ml> ml, the right {stem} <segment> <ml> ml."
        return [Message("user", v.ask("both sides", stem)), Message("assistant", answer)]
    absent = [n for n in NAMES if n not in f.visible]
    name = pick(v.g, absent) if absent and uniform(v.g, 0, 1) < 0.15 else pick(v.g, f.visible or NAMES)
    if v.wide and "brain-stem" in f.visible and uniform(v.g, 0, 1) < 0.06:
        name = "brain-stem"  # of whose visibility is asked so often that it would be all that is heard
    turns = []
    for n in (name, name.replace("left", "\0").replace("right", "left").replace("\0", "right")):
        ask = v.ask("other side", n.split()[0]) if turns else v.ask("one", n)
        if n in f.visible:
            answer = v.say((f"Outlined: the {n} <segment>, <ml> ml.", f"Outlined is the {n} <segment> of <ml> ml."),
                           (f"The {n} <segment> has a volume of <ml> ml.", f"This is the {n} <segment>, <ml> ml.",
                            f"Here is the {n} <segment>: <ml> ml."))
        else:
            answer = v.say((f"The {n} is not visible in these slices.",),
                           (f"These slices do not show the {n}.", f"I cannot see the {n} here."))
        turns += [Message("user", ask), Message("assistant", answer)]
        if n == name and (not name.startswith(("left", "right")) or uniform(v.g, 0, 1) < 0.7):
            break
    return turns


def detect_turns(v: Voice, f: Facts) -> list[Message]:
    """Ask for lesions, and perhaps on about what was found; or at once for their number, the largest, or its lobe."""
    if v.wide and uniform(v.g, 0, 1) < 0.35:
        return pick(v.g, (count_turns, largest_turns, lobe_turns), (0.25, 0.25, 0.5))(v, f)
    if not f.places:
        answer = v.say(("<detect> No lesion is found.", "<detect> There is no focal lesion."),
                       ("<detect> No focal lesion is seen on this sequence.",))
    elif len(f.places) == 1:
        answer = f"<detect> There is one lesion. {finding(v, f, 0)}"
    else:
        shown = " ".join(finding(v, f, k) for k in range(min(len(f.places), len(COUNT_WORDS) - 1)))
        answer = f"<detect> There are <count> lesions. {shown}"
    turns = [Message("user", v.ask("lesions")), Message("assistant", answer)]
    more = uniform(v.g, 0, 1)
    if f.places and more < 0.3:
        side = f.places[0].split()[0]
        told = f"The largest lesion is on the {side}." if side in ("left", "right") else "It lies in the midline."
        turns += [Message("user", v.ask("side")), Message("assistant", told)]
    elif v.wide and more < 0.6:
        turns += pick(v.g, (count_turns, largest_turns, lobe_turns))(v, f)
    return turns


def count_turns(v: Voice, f: Facts) -> list[Message]:
    """How many lesions."""
    told = "No lesion is found." if not f.places else "There is one lesion." if len(f.places) == 1 else "There are <count> lesions."
    return [Message("user", v.ask("count")), Message("assistant", f"<detect> {told}")]


def largest_turns(v: Voice, f: Facts) -> list[Message]:
    """The size of the largest lesion."""
    told = f"The largest lesion lies in the {f.places[0]} <segment>: <mm> mm, <ml> ml." if f.places else "No lesion is found."
    return [Message("user", v.ask("largest")), Message("assistant", f"<detect> {told}")]


def lobe_turns(v: Voice, f: Facts) -> list[Message]:
    """The lobe of the largest lesion."""
    lobe = f.lobes[0] if f.lobes else ""
    told = ("No lesion is found." if not f.places else f"The largest lesion lies in the {lobe}." if lobe
            else f"The lobe cannot be told; the largest lesion lies in the {f.places[0]}.")
    return [Message("user", v.ask("lobe")), Message("assistant", f"<detect> {told}")]


def report_turns(v: Voice, f: Facts) -> list[Message]:
    """Ask for the whole report."""
    return [Message("user", v.ask("report")), Message("assistant", f"<report> {report(v, f)}")]


def reconstruct_turns(v: Voice, f: Facts) -> list[Message]:
    """Ask for a reconstruction."""
    return [Message("user", v.ask("reconstruct")), Message("assistant", "<reconstruct> The image is reconstructed from the k-space.")]


def question_turns(v: Voice, f: Facts) -> list[Message]:
    """Questions answered in words."""
    words, plane = f.words, f.plane
    kinds = {"both": 0.16, "sequence": 0.14, "plane": 0.1, "weighting": 0.1, "contrast": 0.1, "visible": 0.14, "signal": 0.08,
             "level": 0.06, "parameter": 0.06, "off": 0.06}
    if v.wide:  # what is asked rarely is learnt all the same
        kinds |= {"limits": 0.05, "organ": 0.18, "modality": 0.1, "knowledge": 0.12, "off": 0.26, "level": 0.36, "both": 0.26,
                  "contrast": 0.14}
    kind = pick(v.g, tuple(kinds), tuple(kinds.values()))
    if kind == "both":
        ask = v.ask("sequence and plane")
        answer = v.say((f"This is {article(plane)} {words} image.",), (f"The plane is {plane}, the sequence {words}.",)) if words else (
            f"The plane is {plane}; the sequence cannot be told.")
    elif kind == "sequence":
        ask = v.ask("sequence")
        answer = "The sequence cannot be told from the image."
        if words:
            answer = v.say((f"This is {article(words)} MRI.",), (f"It is {article(words)} sequence.",))
    elif kind == "plane":
        ask = v.ask("plane")
        answer = v.say((f"The plane is {plane}.",), (f"These are {plane} slices.", f"The slices are {plane}."))
    elif kind == "weighting":
        guess = pick(v.g, ("T1w", "T2w", "FLAIR", "PDw"))
        name = SEQUENCE_WORDS[guess]
        if v.wide:
            name = pick(v.g, (name, name.replace("-weighted", ""), name.replace("-", " ")))
        ask = v.ask("weighting", name)
        same = guess == f.sequence or (guess == "T1w" and f.sequence == "T1w-Gd")
        answer = f"{'Yes' if same else 'No'}, it is {words}." if words else "I cannot tell the sequence."
    elif kind == "contrast":
        request, ask = pick(v.g, CONTRAST)
        ask = v.ask(request) if v.wide else ask
        given = f.sequence == "T1w-Gd"
        yes = given == (request == "contrast")
        answer = f"{'Yes' if yes else 'No'}, {'a' if given else 'no'} contrast agent was given."
        if f.sequence == "other":
            answer = "I cannot tell."
        if v.wide and f.sequence not in ("T1w", "T1w-Gd"):
            answer = "Whether contrast agent was given cannot be told from this sequence."
    elif kind == "visible":
        group = pick(v.g, tuple(GROUPS))
        verb = "is" if group in ("cerebellum", "brain-stem") else "are"
        plain = (f"{verb.capitalize()} the {group} visible?", f"Can the {group} be seen?", f"Do you see the {group}?")
        ask = v.ask("visible", group) if v.wide else v.say(plain)
        seen = group in f.groups
        answer = f"{'Yes' if seen else 'No'}, the {group} {verb} {'' if seen else 'not '}visible."
    elif kind == "signal":
        ask = v.ask("signal")
        answer = level3(v, f) or "I cannot tell."
    elif kind == "level":
        levels = (level2, "anatomy"), (level5, "impression"), (level4, "findings"), (level1, "technique")
        level, request = pick(v.g, levels, (0.3, 0.2, 0.2, 0.3) if v.wide else None)
        ask, answer = v.ask(request), level(v, f)
    elif kind == "parameter":
        name, short, slot = pick(v.g, (("echo time", "TE", "<te> ms"), ("repetition time", "TR", "<tr> ms"),
                                       ("inversion time", "TI", "<ti> ms"), ("field strength", "magnetic field", "<tesla> T")))
        ask = v.say((f"What is the {name}?",), (f"{upper(name)}?", f"What {short} was used?", f"Tell me the {name}.", f"{short}?",
                                               f"How long is the {name}?" if "time" in name else "How many tesla?"))
        answer = f"The {name} is {slot}."
    elif kind == "limits":
        ask, needed = pick(v.g, (("Is there an acute stroke?", "DWI"), ("Does it enhance?", "T1w-Gd"), ("Are there microbleeds?", "T2*"),
                                 ("Is diffusion restricted?", "DWI"), ("Is there old blood?", "T2*")))
        series = {"DWI": "Diffusion-weighted", "T1w-Gd": "Contrast-enhanced", "T2*": "T2*-weighted"}[needed]
        if needed in (f.sequence, f.technique):
            return detect_turns(v, f)
        answer = f"{series} images are needed to tell that."
    elif kind == "organ":
        ask, answer = v.ask("organ"), v.say(("This is the head; the brain is shown.", "The brain is shown."))
    elif kind == "modality":
        ask = v.ask("modality")
        answer = f"This is {article(words)} MRI." if words else "This is an MRI; the sequence cannot be told."
    elif kind == "knowledge":
        name, questions, answer = pick(v.g, KNOWLEDGE)
        bare = name.removeprefix("a ").removeprefix("an ").removeprefix("the ")
        ask = v.typed(pick(v.g, (f"What is {name}?", f"Explain {name}.", f"What does {bare} mean?", f"Tell me about {name}.",
                                 f"Define {bare}.", f"What do you mean by {bare}?", f"Explain what {name} is.", f"{bare}: what is that?",
                                 f"In general, what is {name}?", *questions, *questions)))
    else:
        ask = v.ask("off")
        answer = NOT_SHOWN
    return [Message("user", ask), Message("assistant", answer)]


TURNS = (segment_turns, detect_turns, report_turns, reconstruct_turns, question_turns)


def describe(record: Record, g: torch.Generator, *, wide: bool = False) -> Record:
    """Add caption, facts and conversations: drawn exchanges, of which reports take most of the words.

    Args:
        wide: In every wording, with what lesions may be; or plainly.
    """
    assert record.labels is not None
    assert record.lesions is not None
    if not record.signal:  # told once more otherwise
        record = replace(record, signal=signal_words(normalise(record.images)[:, 1], record.labels, record.lesions))
    f, v = facts_of(record), Voice(g, wide)
    shares, most = ((0.25, 0.19, 0.1, 0.08, 0.38), (4, 6, 8, 10, 12)) if wide else ((0.27, 0.18, 0.14, 0.12, 0.29), (2, 4, 6, 8, 10))
    exchanges = [pick(g, TURNS, shares)(v, f) for _ in range(pick(g, most))]
    return replace(
        record,
        caption=report(v, f),
        conversations=tuple(tuple(e) for e in exchanges),
        facts=(f.plane, f.sequence, *f.groups, *f.places),
    )
