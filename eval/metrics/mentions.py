"""Mentions: terms of a report at their places in a sentence, and what is denied, suspected, and on which side.

Terms are those of `lexicon.tsv`; negation is NegEx (Chapman et al., J. Biomed. Inform. 2001) as negspacy has it.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

_COUNTED = "one two three four five six seven eight nine ten eleven twelve"
NUMBERS = {word: k for k, word in enumerate(_COUNTED.split(), 1)} | {"single": 1, "solitary": 1, "pair of": 2}
MULTIPLE = r"several|multiple|numerous|many|scattered|a few|few|innumerable|countless|multifocal"
UNIT_MM = {"mm": 1.0, "millimetre": 1.0, "millimeter": 1.0, "cm": 10.0, "centimetre": 10.0, "centimeter": 10.0}
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)"
_NUMBER = r"\d+(?:[.,]\d+)?"
_AXIS = r"(?: ?\(?(?:AP|TV|CC|TR|SI|ML|craniocaudal|transverse|anteroposterior)\)?)?"
SIZE = re.compile(
    rf"(?<![\w.]){_NUMBER}(?:[- ]?{_UNIT})?{_AXIS}(?:\s?(?:x|by|-|to)\s?{_NUMBER}(?:[- ]?{_UNIT})?{_AXIS}){{0,2}}[- ]?{_UNIT}\b",
    re.IGNORECASE,
)
VOLUME = re.compile(rf"(?<![\w.])({_NUMBER}) ?(?:ml|cc|cm3|cm³|millilit(?:er|re)s?)\b", re.IGNORECASE)
SIDE = re.compile(
    r"\b(left(?:[- ]sided|wards?)?|right(?:[- ]sided|wards?)?|bilateral(?:ly)?|both|either|each|midline|lt|rt"
    r"|[LR](?=[ -])|b/l)\b(?! shift)",
    re.IGNORECASE,
)
SIDE_NAMES = {"l": "left", "r": "right", "b": "both", "e": "both", "m": "midline"}
PLANE = re.compile(r"(?<![-\w])(axial|transverse|transaxial|coronal|sagittal)(?![-\w])", re.IGNORECASE)
CLAUSE = re.compile(
    r";|(?<=[a-z)]):(?= (?:no|there)\b)|,? \bbut\b|,? \bwhereas\b|,? \bwhile\b|,? \bhowever\b,?"
    r"|,? and (?=(?:there (?:is|are)|no\b))|\. (?=[A-Z])"
    r"|, (?=no\b|there (?:is|are)\b)",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|\n+")
ABBREVIATION = re.compile(r"\b(?:approx|Lt|Rt|L|R|vs|ca|No|Dr|e\.g|i\.e|incl|resp)\.$")
DIAGNOSIS = re.compile(
    r"(?:in keeping with|consistent with|compatible with|suggest(?:ive of|ing|s)|suspicious for|likely|probably|possibly|"
    r"perhaps|presumably|represent(?:s|ing)?|"
    r"reflect(?:s|ing)?|favou?r(?:s|ing)?|be|concerning for|worrisome for|typical of|characteristic of|diagnostic of|as|due to|from|"
    r"indicat(?:es|ing|ive of)|cannot exclude)(?: [\w-]+){0,2} $",
    re.IGNORECASE,
)
LINKS = re.compile(
    r"\b(?:in|of|within|with|without|and|or|nor|is|are|was|were|at|on|along|over|to|from|seen|has|have|involv\w+|near|shows?|noted|measur\w+|lies|no|not|there|"
    r"which|that|around|into|affecting|extending|than|for|by|abutting|causing|exerting|surrounding)\b|[,;:(]",
    re.IGNORECASE,
)
WORSE = re.compile(
    r"\b(?:worse|greater|larger|more(?: (?:so|marked(?:ly)?|pronounced|prominent|extensive|severe))?|predominantly|mainly|mostly)"
    r" (?:on|in) (?:the )?(left|right)\b"
    r"|\b(left|right)(?: side)? (?:greater|more|worse|larger) than",
    re.IGNORECASE,
)
PRONOUN = re.compile(
    r"(?:It|This|They|These|Its|Their|The largest|The larger|The same|A similar|An identical|Another|A second|A further|A third"
    r"|None|All|Both|Each)\b"
)
REFERRED = "it"
"""Type of what a sentence speaks about without naming it: the finding before."""
AGAIN = re.compile(
    r"\b(?:another|a second|a third|a further|the other|one)\b(?= (?:of [\d_]|in|at|on|[\d_]|lies|is|measur|\())", re.IGNORECASE
)
NEARBY = re.compile(
    r"\b(?:surrounding|associated|adjacent|perilesional|accompanying|internal|intralesional|central|peripheral)\b[ \w-]*$", re.IGNORECASE
)


@dataclass
class Mention:
    """A term at its place in the text; findings gather what belongs to them."""

    kind: str
    name: str
    start: int
    end: int
    side: str | None = None
    negated: bool = False
    possible: bool = False
    diagnosis: bool = False
    places: list[Mention] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


def _rows() -> list[dict[str, str]]:
    with (Path(__file__).parent / "lexicon.tsv").open(encoding="utf-8") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


@lru_cache(1)
def lexicon() -> dict[str, list[tuple[str, re.Pattern]]]:
    """Kind -> (name, pattern), as `lexicon.tsv` lists them."""
    out: dict[str, list[tuple[str, re.Pattern]]] = {}
    for row in _rows():
        if row["kind"].startswith("negex"):
            continue
        # Compounds as "frontoparietal" hold two places.
        begin, end = r"(?:(?<!\w)|(?<=fronto)|(?<=parieto)|(?<=temporo))", r"(?!\w)"
        if row["pattern"] == r"\?":
            begin = end = ""
        elif row["pattern"].endswith("))") and "(?=" in row["pattern"]:
            end = ""
        out.setdefault(row["kind"], []).append((row["name"], re.compile(f"{begin}(?:{row['pattern']}){end}", re.IGNORECASE)))
    return out


def terms_of_negation() -> dict[str, list[str]]:
    """What is added to NegEx's own terms, and what is dropped from them."""
    out: dict[str, list[str]] = {"preceding": [], "following": [], "termination": [], "pseudo": [], "dropped": []}
    for row in _rows():
        if row["kind"].startswith("negex"):
            out[row["kind"].removeprefix("negex ")].append(row["pattern"])
    return out


@lru_cache(1)
def _negex():  # a blank English pipeline: tokens and NegEx
    import spacy
    from negspacy.negation import Negex
    from negspacy.termsets import termset

    own = terms_of_negation()
    terms = {
        kind: [t for t in known if t not in own["dropped"]] + own[kind.removesuffix("_negations").removesuffix("s")]
        for kind, known in termset("en_clinical").get_patterns().items()
    }
    nlp = spacy.blank("en")
    return nlp, Negex(nlp, "negex", terms, span_keys=["facts"])


def matches(kind: str, text: str) -> list[Mention]:
    """Terms of a kind, the longest first where they overlap, by place."""
    spans = [
        Mention(kind, name, m.start(), m.end()) for name, pattern in lexicon()[kind] for m in pattern.finditer(text) if m.end() > m.start()
    ]
    spans.sort(key=lambda s: (s.start - s.end, s.start))
    kept: list[Mention] = []
    for span in spans:
        if all(span.end <= k.start or span.start >= k.end for k in kept):
            kept.append(span)
    return sorted(kept, key=lambda s: s.start)


def blank(text: str, spans: list[Mention]) -> str:
    """The text with spans replaced by `_`, so that nothing else is read in them and they do not part a phrase."""
    for s in spans:
        text = text[: s.start] + "_" * (s.end - s.start) + text[s.end :]
    return text


def sentences(text: str) -> list[str]:
    """Sentences of a report; decimals and abbreviations do not end one."""
    out: list[str] = []
    for part in SENTENCE.split(text):
        if out and ABBREVIATION.search(out[-1]):
            out[-1] += " " + part
        elif part.strip():
            out.append(part.strip())
    return out


def negate(text: str, spans: list[Mention]) -> None:
    """Mark what NegEx finds denied."""
    nlp, negex = _negex()
    doc = nlp.make_doc(text)
    doc[0].is_sent_start = True
    for token in doc[1:]:
        token.is_sent_start = text[: token.idx].rstrip().endswith((".", ";")) and token.text[:1].isupper()
    found = [(s, doc.char_span(s.start, s.end, alignment_mode="expand")) for s in spans]
    doc.spans["facts"] = [span for _, span in found if span is not None]
    negex(doc)
    for mention, marked in zip([m for m, span in found if span is not None], doc.spans["facts"], strict=True):
        mention.negated = bool(marked._.negex)


def doubt(text: str, findings: list[Mention]) -> None:
    """Mark what is only suspected, and diagnoses given for a finding named before."""
    before, after = matches("possible-before", text), matches("possible-after", text)
    for k, f in enumerate(findings):
        lead = text[: f.start]
        f.diagnosis = k > 0 and bool(DIAGNOSIS.search(lead[max(findings[k - 1].end, f.start - 60) :]))
    for cue in before:
        following = [f for f in findings if f.start >= cue.end]
        if any(a.start <= cue.start < a.end and (a.end - a.start > cue.end - cue.start or not following) for a in after):
            continue
        if "differential" in text[cue.start : cue.end].lower() or re.search(r"ddx?", text[cue.start : cue.end], re.IGNORECASE):
            for f in following:
                f.possible = True
            continue
        last = None
        for f in following:
            between = text[(last.end if last else cue.end) : f.start]
            if (last is None and not re.search(r";|\. ", between)) or (
                last is not None and re.fullmatch(r"(?:,? ?(?:or|versus|vs\.?)(?: an?| \w+)? ?|, (?=.*\bor\b)|, )", between)
            ):
                f.possible = True
            else:
                break
            last = f
            f.diagnosis = f.diagnosis or (
                f is not findings[0] and bool(re.search(r"\b(?:or|versus|vs)\b", between)) and findings[findings.index(f) - 1].diagnosis
            )
    for cue in after:
        earlier = [f for f in findings if f.end <= cue.start and not re.search(r";|\. ", text[f.end : cue.start])]
        told_before = any(b.start == cue.start and b.end == cue.end and any(f.start >= cue.end for f in findings) for b in before)
        if earlier and not told_before:
            earlier[-1].possible = True
            if re.match(r"(?:no|not)\b", cue.name) or "exclud" in text[cue.start : cue.end]:
                earlier[-1].negated = False


_ADJECTIVES = re.compile(
    r"(?:[\s-]|sided?|of|the|anterior|posterior|superior|inferior|medial|mesial|lateral|high|deep|mid|upper|lower|middle|paramedian|dorsal|ventral|central|aspect|cerebral|hemisphere|"
    r"part|portion|pole|head|body|parts|half|nucleus|nuclei|subinsular)*",
    re.IGNORECASE,
)


def pair_sides(rest: str, sides: list[Mention], places: list[Mention]) -> None:
    """Give sides to the places that they stand at; places in one list share the first's side."""
    used = []
    for p in places:
        inner = SIDE.search(rest, p.start, p.end)
        p.side = SIDE_NAMES[inner[0][0].lower()] if inner else None
    for s in sides:
        after = [p for p in places if p.start >= s.end]
        before = [p for p in places if p.end <= s.start]
        if after and _ADJECTIVES.fullmatch(rest[s.end : after[0].start]):
            after[0].side = s.name
            used.append(s)
        elif (
            before
            and re.fullmatch(r",? (?:on (?:the|both) |of the |side )*", rest[before[-1].end : s.start])
            and (s.name == "both" or "on the" in rest[before[-1].end : s.start])
        ):
            before[-1].side = before[-1].side or s.name
            used.append(s)
    for a, b in pairwise(places):
        between = rest[a.end : b.start]
        if a.side and not b.side and re.fullmatch(r"[\s/-]*|,? (?:and|or) (?:the )?|, |(?: \w+)? (?:of|in) (?:the )?|-", between):
            b.side = a.side
        elif (
            b.side
            and not a.side
            and re.fullmatch(
                r"(?: \w+)? (?:of|in) (?:the |both )?|[\s/-]*", between.replace("both", "").replace("left", "").replace("right", "")
            )
        ) or (b.side and not a.side and re.fullmatch(r" (?:of|in) (?:the )?(?:left|right|both) ", between)):
            a.side = b.side
    sides[:] = [s for s in sides if s not in used]


def millimetres(text: str) -> list[float]:
    """Lengths in a size as told, in mm."""
    parts = re.findall(rf"({_NUMBER})[- ]?({_UNIT})?", text, re.IGNORECASE)
    unit = next(u for _, u in reversed(parts) if u).lower().rstrip("s")
    return [round(float(n.replace(",", ".")) * UNIT_MM[(u or unit).lower().rstrip("s")], 3) for n, u in parts]


def contrasts_of(g: Mention, value: str, text: str, rest: str, sequences: list[Mention]) -> list[str]:
    """The sequences that a signal is told on; one empty name where none is."""
    if value in ("enhancing", "non-enhancing"):
        given = [s.name for s in sequences if s.name == "T1w-Gd"]
        return given[:1] or [""]
    before = [s for s in sequences if s.end <= g.start]
    near: list[str] = []
    if before and re.fullmatch(r"[\s/-]*(?:signal )?", rest[before[-1].end : g.start].replace("_", "")):
        near = [before[-1].name]
        for a, b in zip(reversed(before[:-1]), reversed(before[1:]), strict=True):
            if re.fullmatch(r" ?(?:/|and|-) ?", rest[a.end : b.start]):
                near.append(a.name)
            else:
                break
        return near[::-1]
    after = [s for s in sequences if s.start >= g.end]
    if after and re.match(
        r"[- ]?(?:\w+ ){0,3}(?:on|in|at) (?:the |both |axial |coronal |sagittal )*$", rest[g.end : after[0].start].replace("_", "") or "!"
    ):
        near = [after[0].name]
        for a, b in pairwise(after):
            if re.fullmatch(
                r"(?:,|,? ?and|/|,? ?or|as well as|) ?(?:on |in |the )*(?:images |sequences )?(?:and ?)?", rest[a.end : b.start].strip()
            ):
                near.append(b.name)
            else:
                break
        return near
    if after and re.fullmatch(r" ?(?:signal )?(?:on )?", rest[g.end : after[0].start]):
        return [after[0].name]
    led = [
        s
        for s in before
        if re.search(r"(?:\bon|\bin|^)\s*(?:the |axial |coronal |sagittal |transverse )*$", text[: s.start], re.IGNORECASE)
    ]
    return [led[-1].name] if led and len({s.name for s in sequences}) == 1 else [""]
