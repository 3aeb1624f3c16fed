"""Wording: how people ask. Each request has a few plain wordings and, in `wordings.tsv`, a grammar that makes hundreds.

The phantom asks plainly, because its models learn in minutes; label maps are asked about in every wording.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .recipe import pick, uniform

LEADS = ("", "", "", "", "Please ", "Could you ", "Can you ", "Would you ", "I want you to ", "I need you to ", "Help me: ", "Now ",
         "Next, ", "Kindly ", "For my report, ", "Let us ", "I would like you to ", "Can we ", "Hi, please ", "OK, ", "Then ", "First, ",
         "It would help to ", "Are you able to ", "Try to ", "You should ", "Go and ", "Doctor's request: ",
         "Thanks, and now ")  # fmt: skip
TAILS = ("", "", "", "", " please", " for me", " here", " on this scan", " in this study", " in these images", " now", ", thanks",
         " if you can", " in this MRI", " of this patient", " on the MRI", " again", " as well as you can", " quickly",
         " for the referring doctor")  # fmt: skip
BANK = Path(__file__).parent / "wordings.tsv"
SLIPS = 0.08
"""Share of the requests with a slip of the fingers."""


@dataclass(frozen=True)
class Request:
    """One thing to ask for. `{x}` stands for what it is about."""

    plain: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    """Imperatives that take a lead and a tail."""
    questions: tuple[str, ...] = ()
    """Whole questions."""
    terse: tuple[str, ...] = ()

    def count(self) -> int:
        """How many wordings there are."""
        whole = {*self.plain, *self.questions, *self.terse}
        return sum(map(alternatives, whole)) + sum(map(alternatives, self.verbs)) * len(set(LEADS)) * len(set(TAILS))

    def pattern(self, names: tuple[str, ...]) -> re.Pattern[str]:
        """What fits any wording, whatever its case.

        Args:
            names: What `{x}` may be.
        """
        one_of = lambda texts: f"(?:{'|'.join(texts)})"  # noqa: E731
        x = one_of(map(re.escape, names))

        def part(text: str) -> str:
            pieces = CHOICE.split(text)  # literal, choice, literal, ...
            made = (one_of(map(re.escape, p.split("|"))) if k % 2 else re.escape(p) for k, p in enumerate(pieces))
            return "".join(made).replace(re.escape("{x}"), x)

        whole = [part(t.rstrip(".?!")) for t in (*self.plain, *self.questions, *self.terse)]
        if self.verbs:
            whole.append("".join(one_of(map(part, given)) for given in (set(LEADS), self.verbs, set(TAILS))))
        return re.compile(f"{one_of(whole)}[.?!]?", re.IGNORECASE)


CHOICE = re.compile(r"\[([^\]]*)\]")


def alternatives(text: str) -> int:
    """How many wordings `[a|b]` in a text stand for."""
    return math.prod(len(m.split("|")) for m in CHOICE.findall(text))


def chosen(g: torch.Generator, text: str) -> str:
    """The text with one of each `[a|b]`."""
    return CHOICE.sub(lambda m: pick(g, m[1].split("|")), text)


def _bank() -> dict[str, Request]:
    """The wordings of `wordings.tsv`, in its order."""
    found: dict[str, dict[str, list[str]]] = {}
    with BANK.open(encoding="utf-8") as f:
        for line in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
            found.setdefault(line["request"], {}).setdefault(line["kind"], []).append(line["wording"])
    return {name: Request(**{kind: tuple(texts) for kind, texts in kinds.items()}) for name, kinds in found.items()}


REQUESTS = _bank()


@dataclass(frozen=True)
class Voice:
    """One person who asks, plainly or in any wording."""

    g: torch.Generator
    wide: bool

    def ask(self, request: str, x: str = "") -> str:
        """A wording of a request about `x`."""
        r = REQUESTS[request]
        if not self.wide:
            return pick(self.g, r.plain).format(x=x)
        share = uniform(self.g, 0, 1)
        if r.verbs and share < 0.45:
            lead, verb, tail = pick(self.g, LEADS), chosen(self.g, pick(self.g, r.verbs)).format(x=x), pick(self.g, TAILS)
            asks = lead.startswith(("Could", "Can", "Would", "Are you"))
            said = f"{lead}{verb}{tail}{'?' if asks else pick(self.g, ('.', '.', '', '!'))}"
            return self.typed(said if lead or uniform(self.g, 0, 1) < 0.3 else said[0].upper() + said[1:], x)
        bank = r.plain if share < 0.55 else (r.questions or r.plain) if share < 0.88 else (r.terse or r.plain)
        return self.typed(chosen(self.g, pick(self.g, bank)).format(x=x), x)

    def typed(self, said: str, x: str = "") -> str:
        """As people type: now and then without capitals, without the last sign, or with a slip outside of `x`."""
        if uniform(self.g, 0, 1) < 0.2:
            said = said.lower()
        if uniform(self.g, 0, 1) < 0.15:
            said = said.rstrip(".?!") or said
        if uniform(self.g, 0, 1) < SLIPS:
            words = said.split(" ")
            k = int(torch.randint(len(words), (), generator=self.g))
            if len(words[k]) > 3 and not any(part in words[k].lower() for part in x.lower().split()):
                at = int(torch.randint(len(words[k]) - 2, (), generator=self.g))
                a, b, c = words[k][:at], words[k][at : at + 2], words[k][at + 2 :]
                words[k] = a + pick(self.g, (b[::-1], b[0], b[0] + b)) + c
            said = " ".join(words)
        return said

    def say(self, plain: tuple[str, ...], wide: tuple[str, ...] = ()) -> str:
        """One of several wordings of an answer."""
        return pick(self.g, plain + wide if self.wide else plain)
