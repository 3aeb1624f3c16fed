"""Which series of a study are used, and why. Runs in the decoding child."""

from __future__ import annotations

from .series import MAX_VOXELS, Series, UnusableError

MOST = 12
"""Most series that are decoded without being asked for."""


def choose(found: list[Series], names: list[str] | None) -> tuple[list[Series], list[str]]:
    """The series to decode, and for every series a sentence on whether it is used.

    Without names: of the patient or study with most images, each plain image's first volume, the largest first; reformats,
    maps and localizers only where there is nothing better.

    Args:
        names: What `--series` asks for: `2`, or `2.3` for a volume of it.

    Raises:
        UnusableError: a name is not there.
    """
    if names:
        wanted = [s for s in found if s.name in names or s.name.split(".")[0] in names]
        missing = [n for n in names if not any(n in (s.name, s.name.split(".")[0]) for s in wanted)]
        if missing:
            raise UnusableError(f"expected series from {', '.join(s.name for s in found[:40])}, got {', '.join(n[:12] for n in missing)}")
        wanted = _within_budget(wanted)
        return wanted, ["used: asked for" if s in wanted else "not used: not asked for" for s in found]
    images = [s for s in found if s.kind == "image"] or [s for s in found if s.kind != "localizer"] or found
    patients = [s.patient for s in images]
    patient = max(dict.fromkeys(patients), key=patients.count) if patients else 0
    first: dict[int, Series] = {}
    for series in images:
        if series.patient == patient:
            first.setdefault(series.group, series)
    wanted = _within_budget(sorted(first.values(), key=_size, reverse=True)[:MOST])
    reasons = []
    for s in found:
        if s in wanted:
            others = [o.name for o in found if o.group == s.group and o is not s]
            reasons.append(f"used: {s.variant}; --series chooses others" if others and s.variant else "used")
        elif s.patient != patient:
            reasons.append("not used: of another patient or study")
        elif s not in images:
            reasons.append(f"not used: {s.kind}")
        elif s is not first[s.group]:
            reasons.append(f"not used: {s.variant or 'another volume of the same series'}; --series {s.name} chooses it")
        else:
            reasons.append(f"not used: more than {MOST} series or too many voxels at once; --series {s.name} chooses it")
    return wanted, reasons


def _size(series: Series) -> int:
    x, y, z = series.shape
    return x * y * z


def _within_budget(wanted: list[Series]) -> list[Series]:
    """As many as fit into the voxel budget together; always the first."""
    kept: list[Series] = []
    total = 0
    for series in wanted:
        total += _size(series)
        if not kept or total <= MAX_VOXELS:
            kept.append(series)
    return kept
