"""Factcheck: what the language model wrote of a study, held against masks, affine and header, sentence by sentence.

A text here still has its slots and task tokens. What measurement knows better is said as measured; what nothing shows is removed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .anatomy import GROUPS, LESION, MIRROR, NAMES, SEQUENCE_WORDS, groups_of, join, names_in
from .answer import sentences
from .lesions import Lesion
from .measure import signal_sentence

MOST_SPELLED = 4
"""Lesions that a text tells of one by one."""
UNJUDGED = "Whether there are lesions cannot be told: this checkpoint finds too few of them."
UNKNOWN_SEQUENCE = "The sequence cannot be told from the image."
_NONE = re.compile(r"\bno (focal )?lesions?\b", re.IGNORECASE)
_ONE = re.compile(r"\b(one|a single) lesion\b", re.IGNORECASE)
_MANY = re.compile(r"<count> lesions|\bseveral lesions\b|\bmultiple lesions\b", re.IGNORECASE)
_DISEASE = re.compile(r"\b(mass|tumou?r|\w*glioma|meningioma|metasta\w+|infarct|stroke|ha?emorrhage|bleed|abscess|demyelination"
                      r"|small-vessel)\b", re.IGNORECASE)
_INTENSITY = re.compile(r"\bhyp(?:er|o)intense\b")
_LOBE = re.compile(r"^The (?:largest lesion lies in the .*\blobe\b|lobe cannot be told)")
_SIDE = re.compile(r"^(?:The largest lesion is on the (?:left|right)|It lies in the midline)\.$")
_OF_ONE = re.compile(r"The (?:largest lesion|lobe|side)|Impression|In summary|It lies")
_SUMMARY = re.compile(r"^(?:Impression|In summary)\b")
_PLANE = re.compile(r"\b(axial|coronal|sagittal|oblique)\b", re.IGNORECASE)
_ASKS_PLANE = re.compile(r"\b(plane|orientation)\b", re.IGNORECASE)
_GROUP = "|".join(map(re.escape, GROUPS))
_GROUP_LIST = re.compile(rf"(?:{_GROUP})(?:(?:, | and )(?:{_GROUP}))*", re.IGNORECASE)
_SEEN = re.compile(rf"(?:Yes|No), the ({_GROUP}) (is|are) (?:not )?visible\.")
_UNSEEN = re.compile(r"(?:The (.+?) (?:is|are) not visible in these slices|These slices do not show the (.+?)|I cannot see the (.+?) here)"
                     r"\.?")
_SIGNAL = re.compile(
    r"(cerebrospinal fluid|grey matter) is ((?:much )?(?:brighter|darker)|similar) (?:than|to) white matter", re.IGNORECASE)
_NEEDED = "images are needed to tell that"
_NAME = re.compile(r"(?:contrast-enhanced )?T1-weighted|T2\*?-weighted(?: gradient-echo)?|proton-density-weighted|FLAIR|diffusion-weighted"
                   r"|apparent diffusion coefficient|unclassified", re.IGNORECASE)
_UNNAMED = re.compile(r"(sequence|weighting) cannot be told|cannot tell the sequence|unknown weighting|unclassified contrast")
_OF_SEQUENCE = re.compile(r"\b(contrast-enhanced|[Cc]ontrast agent|T1|T2|FLAIR|[Pp]roton|PD|[Dd]iffusion-weighted|[Aa]pparent diffusion)")
_IS = re.compile(r"^(?:Yes|No), it is .*\.$")
_ASKED_SEQUENCE = {"FLAIR": r"\bflair\b", "T1w": r"\bt1", "T2w": r"\bt2(?!\*|\W{0,3}flair)", "PDw": r"\b(?:pd|proton)"}
_ASKED_CONTRAST = re.compile(r"contrast|gado|\bgad\b|\bgd\b|enhanced|\bpost\b|\bplain\b|\bnative\b", re.IGNORECASE)
_CONTRAST = re.compile(r"^(?:(?:Yes|No), (?:a|no) contrast agent was given|Whether contrast agent was given cannot be told.*)\.$")
_ENHANCING = re.compile(r"(?:[\w-]+ly |non-|(?:thin-walled, )?ring-)?enhancing(?:, superficial)? ")
_RESTRICTED = re.compile(r"(?:diffusion-restricted|blood-like) ")
_PERHAPS = re.compile(r", perhaps (?:an? )?([^.]+)")
_MAY_BE = {
    "T1w-Gd": ("high-grade glioma", "low-grade glioma", "meningioma", "metastasis", "abscess"),
    "FLAIR": ("glioma", "small-vessel disease", "old infarct", "demyelination", "oedema around wide ventricles"),
    "T2w": ("small-vessel disease", "demyelination"),
    "T1w": ("old infarct",),
    "other": ("acute infarct", "haemorrhage", "abscess"),
}
"""What a lesion may be by how it looks on a sequence; where the sequence is not known, what only others than the named ones show."""
_NEEDS = (
    (r"\bstrokes?\b|infarct|isch(?:a?e)mi|\bcva\b|restricted diffusion|diffusion restrict", "Diffusion-weighted"),
    (r"bleed|\bbled\b|ha?emorrhag|ha?ematoma|\b(?:old|any) blood\b", "T2*-weighted"),
    (r"\b(?:non-?)?enhanc", "Contrast-enhanced"),
)
"""What people ask for that the named sequences do not rule out, and the images that would."""
NOT_SHOWN = "I can only speak about what this study shows."
_ELSEWHERE = re.compile(r"\b(?:liver|kidneys?|lungs?|heart|spleen|pancreas|stomach|bowels?|prostate|breasts?|uterus|ovar(?:y|ies)|bladder"
                        r"|knees?|hips?|shoulders?|abdomen|chest|thyroid|teeth)\b", re.IGNORECASE)
_BESIDE_THE_BRAIN = re.compile(r"\b(?:aneurysms?|carotids?|pituitary|sinus(?:es|itis)|mastoid\w*|orbit(?:s|al)?|eyes?|optic"
                               r"|spine|spinal|vertebra\w*|(?:neck|cervical)\b(?! (?:cancer|carcinoma|tumou?r))"
                               r"|(?:bone|skull) (?:lesion|metastas[ei]s|marrow)|skull base|fractur\w+)\b",
                               re.IGNORECASE)
BRAIN_ALONE = ("Lesions are looked for in the tissue of the brain alone: vessels, bone, orbits, sinuses, pituitary gland, neck and spine "
               "are not judged.")
_OF_THE_BRAIN = re.compile(r"brain|cerebr|cranial|metasta|lesion|cancer|primary", re.IGNORECASE)
_ONE_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Grounded:
    """A text of which every sentence has its pixels."""

    raw: str
    lesions: tuple[Lesion, ...]
    """The lesion of each lesion `<segment>` in `raw`, in order."""
    notes: tuple[str, ...]


Checked = tuple[str, tuple[str, ...]]
"""The text, and notes on what was changed."""


def ground_words(question: str, before: str, raw: str, *, sequence: tuple[str, str], plane: str, visible: Collection[str]) -> Checked:
    """What the model wrote, with sequence, contrast agent, plane and structures as they are known.

    Args:
        before: The answer before this question; empty where there is none.
        sequence: One of `anatomy.SEQUENCES`, and whether `header` or `image` told it.
        plane: From the affine.
        visible: Structures that have a mask.
    """
    if raw.startswith("<detect>") and _BESIDE_THE_BRAIN.search(question):
        return BRAIN_ALONE, ("the question is about what lies beside the brain",)
    if raw.startswith("<detect>") and _ELSEWHERE.search(question) and not _OF_THE_BRAIN.search(question):
        return NOT_SHOWN, ("the question is about another organ",)  # "no lesion" would be taken for its health
    notes: list[str] = []
    if sequence[0] == "T1w-Gd":  # these are
        raw = raw.replace(f"Contrast-enhanced {_NEEDED}", "I cannot tell from this study")
    for step in (lambda x: ground_contrast(x, *sequence), lambda x: ground_sequence(question, x, sequence[0], plane),
                 lambda x: ground_plane(question, x, plane),
                 lambda x: ground_structures(structures_asked(question, before), x, visible)):  # fmt: skip
        raw, more = step(raw)
        notes += more
    return raw, tuple(notes)


def ground_findings(question: str, text: str, task: str, lesions: tuple[Lesion, ...], *, sequence: str, visible: Collection[str],
                    signal: Mapping[str, str], can_deny: bool) -> Grounded:  # fmt: skip
    """What the model wrote of anatomy and lesions, with what masks show and this sequence can show.

    Args:
        text: Without its task token.
        task: As chosen: reports and detections tell of every lesion, unless they are about one.
    """
    notes: list[str] = []
    for step in (lambda x: ground_anatomy(x, visible, signal), lambda x: ground_looks(x, sequence), lambda x: ground_place(x, lesions)):
        text, more = step(text)
        notes += more
    whole = task == "report" or (task == "detect" and not _OF_ONE.match(text))
    found = ground_lesions(text, lesions, exhaustive=whole, can_deny=can_deny)
    raw = ground_limits(question, found.raw, sequence) if task == "detect" else found.raw
    return Grounded(raw, found.lesions, (*notes, *found.notes))


def of_lesions(raw: str) -> bool:
    """Whether a text without a task token speaks of lesions: findings, a summary, a side."""
    return LESION in raw or bool(_SUMMARY.match(raw) or _SIDE.match(raw))


def ground_lesions(raw: str, lesions: tuple[Lesion, ...], *, exhaustive: bool, can_deny: bool = True) -> Grounded:
    """Hold a text against the lesion masks.

    The k-th lesion `<segment>` is the k-th lesion by volume; a sentence whose lesion has no mask is removed, so is one
    that denies or miscounts lesions that have masks. A summary gives way to one that is as measured.

    Args:
        exhaustive: The answer is to tell of every lesion (report, detection): those it forgot are added, the largest in words.
        can_deny: Whether this checkpoint's sensitivity lets an empty mask mean "no lesion".
    """
    kept: list[str] = []
    shown: list[Lesion] = []
    notes: list[str] = []
    for sentence in sentences(raw):
        number = sentence.count("<segment>") if LESION in sentence else 0
        lesional = LESION in sentence or bool(_DISEASE.search(sentence)) or bool(_SIDE.search(sentence))
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
            if number == 1 and (word := _INTENSITY.search(sentence)) and (measured := lesions[len(shown)].signal) != word[0]:
                sentence = _INTENSITY.sub(measured, sentence) if measured else re.sub(rf"{word[0]} ", "", sentence)
                notes.append("how bright a lesion is was replaced by what its mask measures")
            if number and "<ml>" not in sentence:
                sentence = sentence.replace("<mm> mm across", "<mm> mm across, <ml> ml")
            shown += lesions[len(shown) : len(shown) + number]
            kept.append(sentence)
        elif _SUMMARY.match(sentence) and (lesions or can_deny):
            notes.append(f"the summary was replaced because it {reason}")
            kept.append(_summary(lesions))
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
    if not kept and notes and lesions:
        kept, shown = [f"The largest lesion lies in the {lesions[0].place} <segment>: <mm> mm, <ml> ml."], [lesions[0]]
    elif not kept and notes and can_deny:
        kept.append("No lesion is found.")
    elif not kept and not can_deny:
        kept.append(UNJUDGED)
    return Grounded(" ".join(kept) or "I cannot tell from this study.", tuple(shown), tuple(dict.fromkeys(notes)))


def _summary(lesions: Sequence[Lesion]) -> str:
    if not lesions:
        return "Impression: no lesion was found."
    place = lesions[0].place
    return f"Impression: {'a single lesion' if len(lesions) == 1 else '<count> lesions, the largest'} in the {place}."


def _place_fits(sentence: str, lesion: Lesion) -> bool:
    """Whether the place and side in a sentence are those of the lesion, where it names any."""
    named = [n for n in NAMES if n in sentence]
    if named:
        return lesion.place in named
    sides = set(re.findall(r"\b(left|right)\b", sentence))
    return not sides or lesion.side in sides or lesion.side == "midline"


def ground_looks(text: str, sequence: str) -> Checked:
    """The text without looks and diagnoses that a sequence cannot show.

    Args:
        sequence: One of `anatomy.SEQUENCES`.
    """
    said = text if sequence == "T1w-Gd" else _ENHANCING.sub("", text)
    said = said if sequence == "other" else _RESTRICTED.sub("", said)
    said = _PERHAPS.sub(lambda m: m[0] if m[1] in _MAY_BE.get(sequence, ()) else "", said)
    return (text, ()) if said == text else (said, ("what a lesion may be was left out where this sequence cannot show it",))


def ground_limits(question: str, text: str, sequence: str) -> str:
    """The text, with the images that would be needed where a question asks for what the named sequences do not rule out."""
    if sequence != "other" and _NEEDED not in text:
        for pattern, series in _NEEDS:
            if re.search(pattern, question, re.IGNORECASE) and (sequence, series) != ("T1w-Gd", "Contrast-enhanced"):
                text = f"{text} {series} {_NEEDED}."
    return text


def ground_place(text: str, lesions: tuple[Lesion, ...]) -> Checked:
    """The text with lobe and side of the largest lesion as its mask measures them, whatever the model said."""
    if not lesions:
        return text, ()
    first = lesions[0]
    untold = f"The lobe cannot be told; the largest lesion lies in the {first.told_place}."
    where = f"{first.lobe.partition(' ')[2]} on both sides" if first.side == "midline" else first.lobe
    lobe = f"The largest lesion lies in the {where}." if first.lobe else untold
    side = {"unknown": "The side cannot be told.", "midline": "The largest lesion lies on both sides of the midline."}.get(
        first.side, f"The largest lesion is on the {first.side}.")
    before = list(sentences(text))
    after = [lobe if _LOBE.search(s) else side if _SIDE.search(s) else s for s in before]
    return (text, ()) if after == before else (" ".join(after), ("where the largest lesion lies is told as its mask measures it",))


def ground_plane(question: str, raw: str, plane: str) -> Checked:
    """Hold a text's plane against the affine's: another plane's name is corrected, and a question about the plane is answered.

    Args:
        plane: From the affine: axial, coronal, sagittal or oblique.
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


def ground_sequence(question: str, raw: str, sequence: str, plane: str) -> Checked:
    """Hold a text's sequence against the one that is known; where none is, every sentence that names one says so instead.

    Args:
        sequence: One of `anatomy.SEQUENCES`, from the header or read off the image.
        plane: From the affine; said where such a sentence said a plane.
    """
    task = re.match(r"(<\w+> )?", raw)[0]  # type: ignore[index]
    before = [*sentences(raw.removeprefix(task))]
    if sequence != "other":
        after = [_as_known(question, s, SEQUENCE_WORDS[sequence], sequence, plane) for s in before]
        return (raw, ()) if after == before else (task + " ".join(after), ("a sequence in the text was replaced by the known one",))
    kept = [s for s in before if not _OF_SEQUENCE.search(s) or _NEEDED in s or _CONTRAST.match(s)]
    if len(kept) == len(before):
        return raw, ()
    told = [UNKNOWN_SEQUENCE]
    if any(_PLANE.search(s) for s in before if s not in kept):
        told = [f"{plane.capitalize()} MRI of the brain.", UNKNOWN_SEQUENCE]
    return task + " ".join([*told, *kept]), ("a sequence was named that this checkpoint cannot tell; the sentence was removed",)


def _as_known(question: str, sentence: str, words: str, sequence: str, plane: str) -> str:
    """A sentence with the sequence that is known."""
    if _NEEDED in sentence or _CONTRAST.match(sentence) or _DISEASE.search(sentence):
        return sentence
    if _UNNAMED.search(sentence):
        return f"{plane.capitalize()} {words} MRI of the brain." if _PLANE.search(sentence) else f"This is a {words} MRI."
    if _IS.match(sentence):
        asked = [s for s, pattern in _ASKED_SEQUENCE.items() if re.search(pattern, question, re.IGNORECASE)]
        untold = len(asked) != 1 or _ASKED_CONTRAST.search(question)
        yes = "" if untold else "Yes, it" if asked[0] == sequence.removesuffix("-Gd") else "No, it"
        return f"{yes or 'It'} is {words}."
    said = _NAME.sub(lambda m: m[0] if m[0].lower() == words.lower() else words, sentence)
    return said if said == sentence else re.sub(r"\b([Aa])n (?=T1|T2|contrast|proton|FLAIR)", r"\1 ", said[0].upper() + said[1:])


def ground_contrast(raw: str, sequence: str, source: str) -> Checked:
    """Whether contrast agent was given, as far as it is known: a T1-weighted image alone does not tell.

    Args:
        sequence: One of `anatomy.SEQUENCES`.
        source: `header` or `image`.
    """
    if not _CONTRAST.match(raw):
        return raw, ()
    if sequence == "T1w-Gd":
        return "A contrast agent was given.", ()
    if sequence == "T1w" and source == "header":
        return "The header records no contrast agent.", ()
    return "Whether contrast agent was given cannot be told from this study.", ()


def ground_anatomy(raw: str, visible: Collection[str], signal: Mapping[str, str]) -> Checked:
    """Hold what a text says of normal anatomy against the masks: only what has one is listed, and signal is as measured.

    Args:
        visible: Structures that have a mask.
        signal: Tissue -> brightness against white matter, see `measure.signal_words`.
    """
    shown, kept, notes = groups_of(visible), [], []
    for sentence in sentences(raw):
        if asked := _SEEN.fullmatch(sentence):
            group, verb = asked.groups()
            kept.append(f"Yes, the {group} {verb} visible." if group in shown else f"No, the {group} {verb} not visible.")
            if kept[-1] != sentence:
                notes.append("whether anatomy is visible is told as the masks show it")
            continue
        if sentence == "No brain structure is fully shown." and shown:
            kept.append(f"The slices show the {join(shown)}.")
            notes.append("anatomy that has a mask was listed")
            continue
        told = {k.lower(): v.lower() for k, v in _SIGNAL.findall(sentence)}
        if any(signal.get(k) != v for k, v in told.items()):
            notes.append("a sentence on signal was replaced by what the masks measure")
            sentence = signal_sentence(signal)
        about_one = "<segment>" in sentence or LESION in sentence or _UNSEEN.fullmatch(sentence)
        listed = None if about_one else _GROUP_LIST.search(sentence)
        if listed and any(g not in shown for g in re.findall(_GROUP, listed[0].lower())):
            notes.append("anatomy without a mask was removed from a sentence")
            left = [g for g in re.findall(_GROUP, listed[0].lower()) if g in shown]
            sentence = sentence[: listed.start()] + join(left) + sentence[listed.end() :] if left else ""
        kept.append(sentence)
    return " ".join(s for s in kept if s), tuple(dict.fromkeys(notes))


def ground_structures(asked: Collection[str], raw: str, visible: Collection[str]) -> Checked:
    """The outline of what was asked for, where a text is on another structure or says that one with a mask cannot be seen.

    Args:
        asked: Names of structures; empty where the question names none.
        visible: Structures that have a mask.
    """
    denied = _UNSEEN.fullmatch(raw)
    name = next(filter(None, denied.groups())) if denied else ""
    if denied and (name in visible or (asked and name not in asked)):
        wanted = tuple(asked) or (name,)
        said = [f"Outlined: the {n} <segment>, <ml> ml." if n in visible else f"The {n} is not visible in these slices." for n in wanted]
        return " ".join(said), (f"the model said that the {name} cannot be seen; what has a mask is outlined",)
    about = {n for n in NAMES if n in raw}
    if asked and "<segment>" in raw and not raw.startswith("<") and LESION not in raw and not set(asked) >= about:
        return " ".join(f"Outlined: the {n} <segment>, <ml> ml." for n in asked), (
            "the model began to speak of another structure than was asked for; its sentence was replaced",)
    return raw, ()


def structures_asked(question: str, before: str) -> tuple[str, ...]:
    """Structures that a question names; a follow-up that names a side alone means what was spoken of before.

    Args:
        before: The answer before; empty where there is none.
    """
    asked, sides = names_in(question), {s.lower() for s in _ONE_SIDE.findall(question)}
    if asked or len(sides) != 1 or len(question.split()) > 8:
        return asked
    side = sides.pop()
    return tuple(dict.fromkeys(n if n.startswith(side) else MIRROR[n] for n in names_in(before) if n.startswith(("left", "right"))))
