"""Facts of an MRI report by rules: what it asserts, suspects and denies, where, how large, how many, and on which sequence.

What a fact is, and how far it reaches, is the annotation guide's (`tests/golden/facts.md`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from .mentions import (
    AGAIN,
    CLAUSE,
    LINKS,
    MULTIPLE,
    NEARBY,
    NUMBERS,
    PLANE,
    PRONOUN,
    REFERRED,
    SIDE,
    SIDE_NAMES,
    SIZE,
    VOLUME,
    WORSE,
    Mention,
    blank,
    contrasts_of,
    doubt,
    matches,
    millimetres,
    negate,
    pair_sides,
    sentences,
)

TECHNIQUE = re.compile(r"\b(?:MRI?|study|examination)\b")
"""What speaks of how the images were made."""


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


@lru_cache(100_000)
def extract(text: str) -> Facts:
    """All facts of a report. A sentence that tells more of something without naming it speaks of the finding before."""
    split = sentences(text.replace("–", "-").replace("\xa0", " ").replace("×", "x"))
    parts = [extract_sentence(s) for s in split]
    findings: list[Finding] = []
    for sentence, part in zip(split, parts, strict=True):
        for f in part.findings:
            # "Axial MRI of the left thalamus" tells of a place and of no finding, and so does a place before any finding.
            technique = TECHNIQUE.search(sentence) or all(x.negated for x in findings)
            bare = technique and not PRONOUN.match(sentence)
            told = replace(f, seen_on=()) if not bare else replace(f, side=None, location=(), seen_on=())
            if f.type != REFERRED:
                findings.append(f)
            elif told != Finding(REFERRED, f.negated, f.certainty) or (findings and f.seen_on and not bare):
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
    rest = blank(text, sequences)
    sizes = [Mention("size", m[0], m.start(), m.end()) for m in SIZE.finditer(rest)]
    volumes = [Mention("volume", m[1], m.start(), m.end()) for m in VOLUME.finditer(rest)]
    rest = blank(rest, sizes + volumes)
    early = [m for m in matches("signal", rest) if m.name == "non-enhancing" or "diffusion" not in rest[m.start : m.end + 12].lower()]
    findings = matches("finding", rest)
    signals = [m for m in early if not any(f.start < m.end and m.start < f.end for f in findings)]
    # "ring-enhancing" and the like are told of another finding; a lone "high signal" is a finding itself.
    rest = blank(rest, findings + signals)
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
    negate(text, findings + [s for s in signals if s.name in ("enhancing", "restricted")])
    doubt(text, findings)
    pair_sides(rest, sides, places)
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
    if structures:
        out = [f for f in out if f.type != REFERRED]
    return Facts(
        tuple(dict.fromkeys(s.name for s in sequences)),
        tuple(dict.fromkeys("axial" if "trans" in m[0].lower() else m[0].lower() for m in sorted(planes, key=lambda m: m.start()))),
        tuple(structures),
        tuple(out),
    )


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
        covers = not inside["sequence"] and re.search(r"\b(?:cover|inclu)", clause, re.IGNORECASE)
        if state == "visible" and TECHNIQUE.search(clause) and not covers:
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
            if (owners and f.name == "enhancement") or (
                owners and re.search(r"\b(?:with|show\w*|demonstrat\w*|exhibit\w*|has|have)\b", rest[owners[-1].end : f.start])
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
