"""Review: what a person makes of the findings - accepted, rejected, edited - with an audit trail, and the report that follows from it.

Numbers stay as measured: a place and a comment can be edited, a volume cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from omnimri.anatomy import LESION
from omnimri.answer import NOTICE, UNLIKE, Answer, sentences

STATES = ("open", "accepted", "rejected")
MOST_WORDS = 200
"""Characters of an edited place or comment."""
_OF_LESIONS = re.compile(rf"\b({LESION}s?|mass|tumou?r|infarct|haemorrhage|metasta\w+|glioma|meningioma|abscess)\b"
                         r"|listed with the findings", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One finding under review."""

    number: int
    """Rank by volume, from 1: the finding's mask is that of this lesion."""
    side: str
    place: str
    volume_ml: float
    diameter_mm: float
    slice_index: int
    """From 0, in position order."""
    sop_instance_uid: str | None
    centre_mm: tuple[float, float, float]
    confidence: float
    label: int | None
    state: str = "open"
    comment: str = ""

    def sentence(self, slices: int) -> str:
        """The finding in words, with its measures."""
        ml = f"{self.volume_ml:.1f}" if self.volume_ml >= 0.1 else f"{self.volume_ml:.2f}"
        where = f"largest on slice {self.slice_index + 1} of {slices}"
        told = f"Lesion in the {self.place}: {self.diameter_mm:.0f} mm in diameter, {ml} ml, {where}"
        told += f" (SOPInstanceUID {self.sop_instance_uid})" if self.sop_instance_uid else ""
        return f"{told}.{f' {self.comment}' if self.comment else ''}"


@dataclass(frozen=True)
class Entry:
    """One line of the audit trail."""

    time: str
    finding: int
    change: str
    before: str
    after: str


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _side_in(place: str) -> str:
    """left, right, midline (both) or unknown, as the words of a place say."""
    sides = {s.lower() for s in re.findall(r"\b(?:left|right)\b", place, re.IGNORECASE)}
    both = len(sides) == 2 or re.search(r"\b(?:both|bilateral\w*|mid-?line)\b", place, re.IGNORECASE)
    return "midline" if both else sides.pop() if sides else "unknown"


@dataclass
class Review:
    """The findings of one study and every decision about them."""

    items: dict[int, Item] = field(default_factory=dict)
    audit: list[Entry] = field(default_factory=list)
    description: str = ""
    """What the model said of the study besides its findings."""
    in_scope: bool = True
    """Whether the model could judge the study when it was last asked."""

    def take(self, answer: Answer) -> None:
        """Add an answer's findings; what was decided about a finding before stays."""
        self.in_scope = bool(answer.scope.get("in_scope", True))
        if answer.task == "report":
            self.description = " ".join(s for s in sentences(answer.text) if not _OF_LESIONS.search(s))
        for found in answer.findings:
            told = found.to_json()
            number = found.lesion.rank
            if number not in self.items:
                self.items[number] = Item(
                    number=number,
                    side=told["side"],
                    place=told["location"],
                    volume_ml=told["volume_ml"],
                    diameter_mm=told["diameter_mm"],
                    slice_index=told["slice_index"],
                    sop_instance_uid=told["sop_instance_uid"],
                    centre_mm=found.lesion.measured.centre_mm,
                    confidence=told["confidence"],
                    label=told["label"],
                )

    def decide(self, number: int, state: str) -> None:
        """Accept or reject a finding, or open it again.

        Raises:
            ValueError: no such finding or state.
        """
        if state not in STATES:
            raise ValueError(f"expected one of {', '.join(STATES)}, got another word")
        self._change(number, "state", state)

    def edit(self, number: int, *, place: str, comment: str) -> None:
        """Change the words of a finding.

        Raises:
            ValueError: no such finding, or too long.
        """
        for name, text in (("place", place), ("comment", comment)):
            plain = " ".join(text.split())
            if len(plain) > MOST_WORDS:
                raise ValueError(f"expected at most {MOST_WORDS} characters, got {len(plain)}; shorten it")
            if name == "comment" or plain:
                changed = self._change(number, name, plain)
                if changed and name == "place":  # a side that its new words do not name is nobody's word
                    self._change(number, "side", _side_in(plain))

    def _change(self, number: int, name: str, after: str) -> bool:
        if number not in self.items:
            raise ValueError(f"expected a finding of this study, got number {number}")
        before = str(getattr(self.items[number], name))
        if before != after:
            changed: dict[str, Any] = {name: after}
            self.items[number] = replace(self.items[number], **changed)
            self.audit.append(Entry(now(), number, name, before, after))
        return before != after

    def in_state(self, state: str) -> list[Item]:
        """Findings in a state, the largest first."""
        return [self.items[k] for k in sorted(self.items) if self.items[k].state == state]

    def report(self, slices: int) -> str:
        """The report in Markdown: the description and what was accepted."""
        accepted, waiting, rejected = (self.in_state(s) for s in ("accepted", "open", "rejected"))
        lines = ["# Report", "", f"**{NOTICE}**", ""]
        if self.description:
            lines += ["## Description", "", self.description, ""]
        lines += ["## Findings", ""]
        lines += [f"{k}. {item.sentence(slices)}" for k, item in enumerate(accepted, 1)] or ["No finding was accepted."]
        lines += [] if self.in_scope else ["", UNLIKE]
        lines += ["", f"{len(accepted)} accepted, {len(rejected)} rejected, {len(waiting)} not reviewed (not in this report)."]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, for the session's file."""
        return {
            "items": [asdict(i) for i in self.items.values()],
            "audit": [asdict(e) for e in self.audit],
            "description": self.description,
            "in_scope": self.in_scope,
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Review:
        """What `to_json` wrote."""
        tuple_of: Callable[[dict[str, Any]], dict[str, Any]] = lambda i: i | {"centre_mm": tuple(i["centre_mm"])}  # noqa: E731
        return cls({i["number"]: Item(**tuple_of(i)) for i in told["items"]}, [Entry(**e) for e in told["audit"]], told["description"],
                   told.get("in_scope", True))
