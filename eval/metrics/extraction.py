"""Facts of an MRI report by rules: what it asserts, suspects and denies, where, how large, how many, and on which sequence.

Terms are those of `lexicon.tsv`, negation is NegEx (Chapman et al., J. Biomed. Inform. 2001) as negspacy has it. What a fact is, and
how far it reaches, is the annotation guide's (`tests/golden/facts.md`).
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

SEQUENCE_KINDS = ("T1w", "T1w-Gd", "T2w", "PDw", "FLAIR", "DWI", "ADC", "T2*", "SWI")
NUMBERS = {
    "single": 1,
    "solitary": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "pair of": 2,
}
MULTIPLE = r"several|multiple|numerous|many|scattered|a few|few|innumerable|countless|multifocal"
UNIT_MM = {"mm": 1.0, "millimetre": 1.0, "millimeter": 1.0, "cm": 10.0, "centimetre": 10.0, "centimeter": 10.0}
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)"
_NUMBER = r"\d+(?:[.,]\d+)?"
_AXIS = r"(?: ?\(?(?:AP|TV|CC|TR|SI|ML|craniocaudal|transverse|anteroposterior)\)?)?"
SIZE = re.compile(
    rf"(?<![\w.])(?P<first>{_NUMBER})(?:[- ]?{_UNIT})?{_AXIS}(?:\s?(?:x|by|×|-|to)\s?{_NUMBER}(?:[- ]?{_UNIT})?{_AXIS}){{0,2}}[- ]?(?P<unit>{_UNIT})\b",
    re.IGNORECASE,
)
VOLUME = re.compile(rf"(?<![\w.])({_NUMBER}) ?(?:ml|cc|cm3|cm³|millilit(?:er|re)s?)\b", re.IGNORECASE)
SIDE = re.compile(
    r"\b(left(?:[- ]sided|wards?)?|right(?:[- ]sided|wards?)?|bilateral(?:ly)?|both|either|each|midline|lt|rt|[LR](?=[ -])|b/l)\b(?! shift)",
    re.IGNORECASE,
)
SIDE_NAMES = {"l": "left", "r": "right", "b": "both", "e": "both", "m": "midline"}
PLANE = re.compile(r"(?<![-\w])(axial|transverse|transaxial|coronal|sagittal)(?![-\w])", re.IGNORECASE)
CLAUSE = re.compile(
    r";|(?<=[a-z)]):(?= (?:no|there)\b)|,? \bbut\b|,? \bwhereas\b|,? \bwhile\b|,? \bhowever\b,?|,? and (?=(?:there (?:is|are)|no\b))|\. (?=[A-Z])"
    r"|, (?=no\b|there (?:is|are)\b)",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|\n+")
ABBREVIATION = re.compile(r"\b(?:approx|Lt|Rt|L|R|vs|ca|No|Dr|e\.g|i\.e|incl|resp)\.$")
DIAGNOSIS = re.compile(
    r"(?:in keeping with|consistent with|compatible with|suggest(?:ive of|ing|s)|suspicious for|likely|probably|possibly|perhaps|presumably|represent(?:s|ing)?|"
    r"reflect(?:s|ing)?|favou?r(?:s|ing)?|be|concerning for|worrisome for|typical of|characteristic of|diagnostic of|as|due to|from|"
    r"indicat(?:es|ing|ive of)|cannot exclude)(?: (?:an?|the|old|acute|subacute|chronic|small|new|late|early|high-grade|low-grade|\w+))?(?: \w+)? $",
    re.IGNORECASE,
)
LINKS = re.compile(
    r"\b(?:in|of|within|with|without|and|or|nor|is|are|was|were|at|on|along|over|to|from|seen|has|have|involv\w+|near|shows?|noted|measur\w+|lies|no|not|there|"
    r"which|that|around|into|affecting|extending|than|for|by|abutting|causing|exerting|surrounding)\b|[,;:(]",
    re.IGNORECASE,
)
WORSE = re.compile(
    r"\b(?:worse|greater|larger|more(?: (?:so|marked(?:ly)?|pronounced|prominent|extensive|severe))?|predominantly|mainly|mostly) (?:on|in) (?:the )?(left|right)\b"
    r"|\b(left|right)(?: side)? (?:greater|more|worse|larger) than",
    re.IGNORECASE,
)
PRONOUN = re.compile(
    r"(?:It|This|They|These|Its|Their|The largest|The larger|The same|A similar|An identical|Another|A second|A further|A third|None|All|Both|Each)\b"
)
REFERRED = "it"
"""Type of what a sentence speaks about without naming it: the finding before."""
AGAIN = re.compile(
    r"\b(?:another|a second|a third|a further|the other|one)\b(?= (?:of [\d_]|in|at|on|[\d_]|lies|is|measur|\())", re.IGNORECASE
)
NEARBY = re.compile(
    r"\b(?:surrounding|associated|adjacent|perilesional|accompanying|internal|intralesional|central|peripheral)\b[ \w-]*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Finding:
    """One thing asserted, suspected or denied."""

    type: str
    negated: bool = False
    certainty: str = "definite"
    side: str | None = None
    location: tuple[str, ...] = ()
    size_mm: tuple[float, ...] = ()
    volume_ml: float | None = None
    number: int | str | None = None
    signal: tuple[tuple[str, str], ...] = ()
    """(sequence or empty, value)"""
    severity: str | None = None
    worse: str | None = None
    """The side on which it is worse."""
    seen_on: tuple[str, ...] = ()
    """Sequences named in its clause."""


@dataclass(frozen=True)
class Structure:
    """Normal anatomy that a text speaks about."""

    name: str
    side: str | None = None
    state: str = "normal"
    signal: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a text says."""

    sequences: tuple[str, ...] = ()
    planes: tuple[str, ...] = ()
    structures: tuple[Structure, ...] = ()
    findings: tuple[Finding, ...] = ()


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


def _blank(text: str, spans: list[Mention]) -> str:
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


@lru_cache(100_000)
def extract(text: str) -> Facts:
    """All facts of a report. A sentence that tells more of something without naming it speaks of the finding before."""
    parts = [extract_sentence(s) for s in sentences(text.replace("–", "-").replace("\xa0", " ").replace("×", "x"))]
    findings: list[Finding] = []
    for part in parts:
        for f in part.findings:
            if f.type != REFERRED:
                findings.append(f)
            elif replace(f, seen_on=()) != Finding(REFERRED, f.negated, f.certainty) or (findings and f.seen_on):
                before = next((x.type for x in reversed(findings) if not x.negated), "lesion")
                findings.append(replace(f, type=before))
    return Facts(
        tuple(dict.fromkeys(s for p in parts for s in p.sequences)),
        tuple(dict.fromkeys(s for p in parts for s in p.planes)),
        tuple(s for p in parts for s in p.structures),
        tuple(findings),
    )


def extract_sentence(text: str) -> Facts:
    """Facts of one sentence."""
    sequences = matches("sequence", text)
    planes = [m for m in PLANE.finditer(text) if not any(s.start <= m.start() < s.end for s in sequences)]
    planes += [m for s in sequences for m in PLANE.finditer(text, s.start, s.end)]
    rest = _blank(text, sequences)
    sizes = [Mention("size", m[0], m.start(), m.end()) for m in SIZE.finditer(rest)]
    volumes = [Mention("volume", m[1], m.start(), m.end()) for m in VOLUME.finditer(rest)]
    rest = _blank(rest, sizes + volumes)
    early = [m for m in matches("signal", rest) if m.name in ("non-enhancing",) or "diffusion" not in rest[m.start : m.end + 12].lower()]
    findings = matches("finding", rest)
    signals = [m for m in early if not any(f.start < m.end and m.start < f.end for f in findings)]
    # "ring-enhancing" and the like are told of another finding; a lone "high signal" is a finding itself.
    rest = _blank(rest, findings + signals)
    places = [
        p
        for p in matches("place", rest)
        if not re.search(r"(?:_|compared|relative) (?:to|with) (?:the )?(?:adjacent |normal )?$", rest[: p.start])
    ]
    clause_ends = [m.end() for m in CLAUSE.finditer(rest)] + [len(text)]
    worse = [(m.start(), m.end(), (m[1] or m[2]).lower()) for m in WORSE.finditer(rest)]
    sides = [
        Mention("side", SIDE_NAMES[m[0][0].lower()], m.start(), m.end())
        for m in SIDE.finditer(rest)
        if not any(a <= m.start() < b for a, b, _ in worse)
    ]
    numbers = [
        Mention("number", m[0].lower(), m.start(), m.end())
        for m in re.finditer(
            rf"\b(?:{'|'.join(NUMBERS)}|{MULTIPLE}|\d{{1,2}})\b(?![.,/]\d)(?! ?(?:T|tesla|years?|weeks?|months?|days?|score)\b)",
            rest,
            re.IGNORECASE,
        )
    ]
    severities = matches("severity", rest)
    for m in AGAIN.finditer(rest):
        before = [f for f in findings if f.end <= m.start()]
        if before and not any(0 <= f.start - m.end() < 25 and not LINKS.search(rest[m.end() : f.start]) for f in findings):
            findings.append(Mention("finding", before[-1].name, m.start(), m.end()))
    findings.sort(key=lambda f: f.start)
    if (PRONOUN.match(text) and all(f.name in ("enhancement", "diffusion restriction") for f in findings)) or not findings:
        findings.insert(0, Mention("finding", REFERRED, 0, 0))
    _negate(text, findings + [s for s in signals if s.name in ("enhancing", "restricted")])
    _doubt(text, findings)
    _pair(rest, sides, places)
    sides = [s for s in sides if s.name != "both" or rest[s.start : s.end].lower().startswith(("bilateral", "b/l"))]
    structures: list[Structure] = []
    out: list[Finding] = []
    begin = 0
    earlier: list[Mention] = []
    for end in clause_ends:
        inside = {
            k: [m for m in v if begin <= m.start < end]
            for k, v in (
                ("finding", findings),
                ("place", places),
                ("side", sides),
                ("size", sizes),
                ("volume", volumes),
                ("number", numbers),
                ("signal", signals),
                ("severity", severities),
                ("sequence", sequences),
            )
        }
        structures += _structures(text, rest, begin, end, inside)
        _attach(text, rest, inside, earlier)
        told = [f for f in inside["finding"] if not f.diagnosis]
        for f in told or earlier[-1:]:
            f.found["seen_on"] = [*f.found.get("seen_on", []), *(s.name for s in inside["sequence"])]
        for at, _, side in worse:
            before = [f for f in told if f.end <= at]
            if begin <= at < end and before:
                before[-1].found["worse"] = side
        earlier += told
        begin = end
    for f in findings:
        if not f.found.get("dropped"):
            within = matches("severity", text[f.start : f.end])
            out += _finished(f, within[0].name if within else f.found.get("severity"))
    if structures or len(text) > 2000:
        out = [f for f in out if f.type != REFERRED]
    return Facts(
        tuple(dict.fromkeys(s.name for s in sequences)),
        tuple(dict.fromkeys("axial" if "trans" in m[0].lower() else m[0].lower() for m in sorted(planes, key=lambda m: m.start()))),
        tuple(structures),
        tuple(out),
    )


def _negate(text: str, spans: list[Mention]) -> None:
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


def _doubt(text: str, findings: list[Mention]) -> None:
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
            if (last is None and not re.search(r";|\. ", between)) or (last is not None and re.fullmatch(r"(?:,? ?(?:or|versus|vs\.?)(?: an?| \w+)? ?|, (?=.*\bor\b)|, )", between)):
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
    r"part|portion|pole|head|body|parts|half|nucleus|nuclei|subinsular|-)*",
    re.IGNORECASE,
)


def _pair(rest: str, sides: list[Mention], places: list[Mention]) -> None:
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


def _structures(text: str, rest: str, begin: int, end: int, inside: dict[str, list[Mention]]) -> list[Structure]:
    """Places of a clause that are called normal, visible or not visible, taken out of it."""
    clause = text[begin:end]
    findings = [f for f in inside["finding"] if f.name != REFERRED]
    compared = re.search(
        r"\b(?:brighter|darker|hyperintense|hypointense|isointense)\b(?: than| to| compared (?:to|with)| relative to)", clause
    )
    taken: list[Mention] = []
    out: list[Structure] = []
    if compared and not findings:
        subject = [p for p in inside["place"] if p.end <= begin + compared.start()]
        word = compared[0].split()[0]
        value = {"brighter": "hyperintense", "darker": "hypointense"}.get(word, word)
        out = [Structure(name, p.side, "visible", value) for p in subject for name in p.name.split("+")]
        inside["place"] = []
        return out
    for state in ("not visible", "normal", "visible"):
        if state == "visible" and re.search(r"\bMRI?\b|\bstudy\b|\bexamination\b", clause):
            continue
        cues = [m for m in matches(state, clause) if not any(f.start < begin + m.end and begin + m.start < f.end for f in findings)]
        if not cues or (state == "visible" and findings):
            continue
        cue = cues[0]
        left = [
            p
            for p in inside["place"]
            if p.end <= begin + cue.start
            and not any(p.start < f.end <= begin + cue.start or f.start < p.start for f in findings if f.start < begin + cue.start)
        ]
        right = [
            p
            for p in inside["place"]
            if p.start >= begin + cue.end
            and not any(
                f.start < p.start or LINKS.sub("", rest[p.end : f.start]).strip() == rest[p.end : f.start].strip()
                for f in findings
                if f.start >= begin + cue.end
            )
        ]
        chosen = (left or right) if state != "visible" else (right or left)
        if not chosen:
            continue
        lone = [s for s in inside["side"] if s.name == "both"]
        for p in chosen:
            out += [Structure(name, p.side or (lone[0].name if lone else None), state) for name in p.name.split("+")]
        taken = chosen
        break
    inside["place"] = [p for p in inside["place"] if p not in taken]
    return out


def _attach(text: str, rest: str, inside: dict[str, list[Mention]], earlier: list[Mention]) -> None:
    """Give every attribute of a clause to its finding, then share places where a reader would."""
    findings = [f for f in inside["finding"] if not f.diagnosis]
    solid = [f for f in findings if f.name not in ("enhancement", "diffusion restriction")] + (
        [e for e in earlier if not e.negated][-1:] if not findings else []
    )
    for f in list(findings):
        if f.name in ("enhancement", "diffusion restriction"):
            owners = [o for o in (solid or earlier) if o.end <= f.start and (not o.negated)]
            if (
                (owners
                and f.name == "enhancement")
                or (owners and re.search(r"\b(?:with|show\w*|demonstrat\w*|exhibit\w*|has|have)\b", rest[owners[-1].end : f.start]))
            ):
                if not (f.negated and f.name == "diffusion restriction"):
                    value = {"enhancement": "non-enhancing" if f.negated else "enhancing", "diffusion restriction": "restricted"}[f.name]
                    owners[-1].found.setdefault("signals", []).append((f, value))
                f.found["dropped"] = True
                findings.remove(f)
    others = [e for e in earlier if not e.negated][-1:]

    def owner(item: Mention) -> Mention | None:
        left = [f for f in findings if f.end <= item.start]
        right = [f for f in findings if f.start >= item.end]
        if right and not LINKS.search(rest[item.end : right[0].start]):
            return right[0]
        if left:
            return left[-1]
        if right:
            return right[0]
        return others[-1] if others else None

    for p in inside["place"]:
        target = owner(p)
        if target is not None:
            target.places.append(p)
    for s in inside["side"]:
        target = owner(s)
        if target is None:
            continue
        if target.name == "midline shift":
            toward = re.search(r"(?:to|towards?) (?:the )?$", rest[: s.start]) or not target.found.get("side")
            if toward:
                target.found["side"] = s.name
        else:
            target.found.setdefault("side", s.name)
    for shift in (f for f in findings if f.name == "midline shift"):
        word = re.match(r"(left|right)ward", text[shift.start : shift.end], re.IGNORECASE)
        if word:
            shift.found["side"] = word[1].lower()
    for z in inside["size"]:
        target = owner(z)
        if target is not None:
            target.found.setdefault("size_mm", []).extend(millimetres(z.name))
    for v in inside["volume"]:
        target = owner(v)
        if target is not None:
            target.found["volume_ml"] = float(v.name.replace(",", "."))
    for n in inside["number"]:
        right = [f for f in findings if f.start >= n.end and not LINKS.search(rest[n.end : f.start].replace(",", ""))]
        if right and not re.search(r"(?:fazekas|score|grade|type|slice|image|stage)\s*$", rest[: n.start], re.IGNORECASE):
            right[0].found["number"] = NUMBERS.get(n.name, int(n.name) if n.name.isdigit() else "multiple")
        elif (
            re.search(r"\b(?:are|were) $", rest[: n.start])
            and [f for f in findings if f.end <= n.start]
            and n.name not in ("single",)
            and not n.name.isdigit()
        ):
            [f for f in findings if f.end <= n.start][-1].found.setdefault("number", NUMBERS.get(n.name, "multiple"))
    for v in inside["severity"]:
        right = [
            f
            for f in findings
            if f.start >= v.end
            and not re.search(r"[,;:]|\b(?:in|of|with|and)\b", re.sub(r"^ (?:amount|degree|extent|volume) of ", " ", rest[v.end : f.start]))
        ]
        left = [f for f in findings if f.end <= v.start]
        if right:
            right[0].found.setdefault("severity", v.name)
        elif left and re.search(r"\b(?:is|are|was|appears?|remains?|,) ?(?:\w+ )?$", rest[: v.start]):
            left[-1].found.setdefault("severity", v.name)
    for g in inside["signal"]:
        target = owner(g)
        if target is not None:
            value = "non-enhancing" if g.name == "enhancing" and g.negated else g.name
            if not (g.name == "restricted" and g.negated):
                target.found.setdefault("signals", []).append((g, value))
    for f in {id(f): f for f in (*findings, *earlier)}.values():
        for g, value in f.found.pop("signals", []):
            f.found.setdefault("signal", []).extend((c, value) for c in contrasts_of(g, value, text, rest, inside["sequence"]))
    _share(text, findings)


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


def _share(text: str, findings: list[Mention]) -> None:
    """Findings of a clause without a place take the neighbour's, the one before first."""
    plain = [f for f in findings if f.name != "midline shift"]
    for order in (plain, plain[::-1]):
        for a, b in pairwise(order):
            if (b.places or b.found.get("side")) or not (a.places or a.found.get("side")):
                continue
            nearby = bool(NEARBY.search(text[: b.start][-60:]))
            if a.negated == b.negated or (b.negated and nearby and order is plain):
                b.places, b.found["side"] = list(a.places), a.found.get("side")


def _finished(f: Mention, severity: str | None) -> list[Finding]:
    """The finding of a mention; two where it lies in different places left and right."""
    base = Finding(
        f.name if f.name != "glioblastoma" else "glioma",
        f.negated,
        "possible" if f.possible and not f.negated else "definite",
        f.found.get("side"),
        size_mm=tuple(sorted(f.found.get("size_mm", []), reverse=True)),
        volume_ml=f.found.get("volume_ml"),
        number=f.found.get("number"),
        signal=tuple(dict.fromkeys(f.found.get("signal", []))),
        severity=severity,
        worse=f.found.get("worse"),
        seen_on=tuple(dict.fromkeys(f.found.get("seen_on", []))),
    )
    by_side: dict[str | None, list[str]] = {}
    for p in f.places:
        by_side.setdefault(p.side, []).extend(p.name.split("+"))
    if set(by_side) >= {"left", "right"}:
        if set(by_side["left"]) == set(by_side["right"]):
            return [replace(base, side="both", location=tuple(dict.fromkeys(by_side["left"])))]
        return [replace(base, side=s, location=tuple(dict.fromkeys(by_side[s]))) for s in ("left", "right")]
    told = [s for s in by_side if s]
    names = tuple(dict.fromkeys(n for v in by_side.values() for n in v))
    return [
        replace(
            base,
            side=(told[0] if told else base.side) if f.name != "midline shift" else base.side,
            location=names if f.name != "midline shift" else (),
        )
    ]


def millimetres(text: str) -> list[float]:
    """Lengths in a size as told, in mm."""
    parts = re.findall(rf"({_NUMBER})[- ]?({_UNIT})?", text, re.IGNORECASE)
    unit = next(u for _, u in reversed(parts) if u).lower().rstrip("s")
    return [round(float(n.replace(",", ".")) * UNIT_MM[(u or unit).lower().rstrip("s")], 3) for n, u in parts]
