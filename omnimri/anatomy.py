"""The structures the model knows: FreeSurfer label, name, side, and the tissue class of each."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LESION = "lesion"
LESION_LABEL = {"left": 25, "right": 57}


@dataclass(frozen=True)
class Structure:
    """One segmented structure. `label` is FreeSurfer's number, `tissue` one of gm, wm, csf."""

    label: int
    name: str
    tissue: str

    @property
    def side(self) -> str:
        """`left`, `right`, or `midline` where the structure has no side."""
        first = self.name.split()[0]
        return first if first in ("left", "right") else "midline"


_SIDED = (
    (2, 41, "cerebral white matter", "wm"),
    (3, 42, "cerebral cortex", "gm"),
    (4, 43, "lateral ventricle", "csf"),
    (5, 44, "inferior lateral ventricle", "csf"),
    (7, 46, "cerebellum white matter", "wm"),
    (8, 47, "cerebellum cortex", "gm"),
    (10, 49, "thalamus", "gm"),
    (11, 50, "caudate", "gm"),
    (12, 51, "putamen", "gm"),
    (13, 52, "pallidum", "gm"),
    (17, 53, "hippocampus", "gm"),
    (18, 54, "amygdala", "gm"),
    (26, 58, "accumbens area", "gm"),
    (28, 60, "ventral DC", "gm"),
)
_MIDLINE = ((14, "3rd ventricle", "csf"), (15, "4th ventricle", "csf"), (16, "brain-stem", "wm"), (24, "CSF", "csf"))

STRUCTURES: tuple[Structure, ...] = tuple(
    sorted(
        [Structure(left, f"left {name}", t) for left, _, name, t in _SIDED]
        + [Structure(right, f"right {name}", t) for _, right, name, t in _SIDED]
        + [Structure(label, name, t) for label, name, t in _MIDLINE],
        key=lambda s: s.label,
    )
)
"""Class `k` of the model's softmax is `STRUCTURES[k - 1]`; class 0 is background."""

NAMES: tuple[str, ...] = tuple(s.name for s in STRUCTURES)
CLASS_OF_LABEL = {s.label: k + 1 for k, s in enumerate(STRUCTURES)}
CLASS_OF_NAME = {s.name: k + 1 for k, s in enumerate(STRUCTURES)}
WHITE_CLASSES = tuple(k for k, s in enumerate(STRUCTURES, 1) if s.name.endswith("cerebral white matter"))
"""Classes of what brightness is compared with."""
MIRROR = {s.name: s.name.replace("left", "\0").replace("right", "left").replace("\0", "right") for s in STRUCTURES}
"""The name each structure takes when the head is mirrored."""

GROUPS = {
    "cerebral hemispheres": "cerebral white matter",
    "lateral ventricles": "lateral ventricle",
    "thalami": "thalamus",
    "basal ganglia": "putamen",
    "hippocampi": "hippocampus",
    "cerebellum": "cerebellum cortex",
    "brain-stem": "brain-stem",
}
"""What reports call visible anatomy, and the structure that shows it."""

SEQUENCES = ("T1w", "T1w-Gd", "T2w", "PDw", "FLAIR", "other")
SEQUENCE_WORDS = {
    "T1w": "T1-weighted",
    "T1w-Gd": "contrast-enhanced T1-weighted",
    "T2w": "T2-weighted",
    "PDw": "proton-density-weighted",
    "FLAIR": "FLAIR",
    "other": "unclassified",
}
PLANES = ("axial", "coronal", "sagittal")


def join(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def groups_of(visible: Collection[str]) -> list[str]:
    """The `GROUPS` that some structures show."""
    return [group for group, part in GROUPS.items() if any(part in name for name in visible)]


def resolve_names(request: str) -> tuple[str, ...]:
    """Turn `"all"` or `"left hippocampus,lesion"` into names; an unsided name means both sides.

    Raises:
        ValueError: a name is not known; the message lists the known ones.
    """
    if request.strip().lower() == "all":
        return (*NAMES, LESION)
    lower = {n.lower(): n for n in (*NAMES, LESION)}
    chosen: list[str] = []
    for part in (p.strip().lower() for p in request.split(",")):
        both = [lower[f"{side} {part}"] for side in ("left", "right") if f"{side} {part}" in lower]
        if part in lower:
            chosen.append(lower[part])
        elif both:
            chosen += both
        else:
            known = ", ".join(sorted({n.removeprefix("left ").removeprefix("right ") for n in lower.values()}))
            raise ValueError(f"unknown structure {part!r}; expected 'all' or names from: {known} (sided names too)")
    return tuple(dict.fromkeys(chosen))


_BOTH = re.compile(r"\b(left|right),? (and|or|with|to|against|vs\.?|versus) (the )?(left|right) ")
_ALSO_CALLED = (
    (r"\bbrain ?stem", "brain-stem"), (r"\bthird ventricle", "3rd ventricle"), (r"\bfourth ventricle", "4th ventricle"),
    (r"\bhippocampi\b|\bhippocampal\b", "hippocampus"), (r"\bthalami\b|\bthalamic\b", "thalamus"), (r"\bamygdala[es]\b", "amygdala"),
    (r"\bputamina\b", "putamen"), (r"\bglob(?:us|i) pallid(?:us|i)\b|\bpallidus\b", "pallidum"),
)  # fmt: skip
_NO_SIDE = re.compile(r", right\?|\bright (?:now|here|away)\b")


def by_known_names(text: str) -> str:
    """The text with the names of `NAMES` for structures that it calls otherwise."""
    for pattern, name in _ALSO_CALLED:
        text = re.sub(pattern, name, text, flags=re.IGNORECASE)
    return text


def names_in(text: str) -> tuple[str, ...]:
    """Structures that a question names; one named without a side, or with both, means both sides, unless one side stands elsewhere."""
    text = _NO_SIDE.sub("", by_known_names(text.lower()))
    sides = set(re.findall(r"\b(?:left|right)\b", text))
    two_sided = tuple(re.findall(r"\b(?:both|bilateral) (?:the )?(.{0,30})", text))
    text = _BOTH.sub("", text)
    found = [n for n in NAMES if n.lower() in text]
    one = len({n.split(" ", 1)[1] for n in found if n.startswith(("left", "right"))}) == 1
    if one and len(sides) == 2:  # "the left hippocampus and the right one"
        found = [n for n in NAMES if n in found or MIRROR[n] in found]
    for stem in sorted({n.split(" ", 1)[1] for n in NAMES if n.startswith("left ")}, key=len, reverse=True):
        sided = (f"left {stem}", f"right {stem}")
        if stem.lower() in text and not any(n in found for n in sided):
            found += [n for n in sided if len(sides) != 1 or n.split()[0] in sides or any(x.startswith(stem.lower()) for x in two_sided)]
            text = text.replace(stem.lower(), "")
    # "lateral ventricle" stands inside "inferior lateral ventricle".
    stem_of = {n: n.removeprefix("left ").removeprefix("right ") for n in found}
    return tuple(n for n in found if not any(stem_of[n] != stem_of[m] and stem_of[n] in stem_of[m] for m in found))
