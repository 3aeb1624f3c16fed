"""Paraphrases: the same request in other words, of which none was trained on. Is the task the same, are the facts?

`paraphrases.tsv` holds a request, its plain wording, another one, and whose it is: `own`, or `independent`, by a writer who knew the
requests and saw neither grammar nor model (what the grammar happens to hold is left out). Questions that people asked of MR images come
from a file (VQA-Med 2019: `image|category|question|answer`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.describe import LEAST_PIXELS
from data_recipes.wording import REQUESTS
from omnimri.anatomy import GROUPS, NAMES, SEQUENCE_WORDS, STRUCTURES
from omnimri.answer import Answer
from omnimri.assistant import Assistant

from .cases import Case, open_case
from .metrics.extraction import extract
from .metrics.facts import count, plainly
from .reports import NOTICE, row
from .resampling import wilson

BANK = Path(__file__).parent / "paraphrases.tsv"
TASKS = {"all": "segment", "one": "segment", "lesions": "detect", "count": "detect", "largest": "detect", "lobe": "detect",
         "report": "report", "reconstruct": "reconstruct"}  # fmt: skip
"""The task token of a request; every other one is answered in words alone."""
SAID = {"off": "only speak about what", "organ": "brain", "knowledge": "fluid", "modality": "MRI"}
"""What an answer without facts must say."""
ASKED = (
    # Of the file's categories: (pattern of the question, request, plain wording).
    ("organ", "", "organ", "Which part of the body do the images show?"),
    ("plane", "", "plane", "What plane is this?"),
    ("abnormality", "", "lesions", "Find lesions."),
    ("modality", "an mri image|what modality", "modality", "Is this an MR image?"),
    ("modality", "noncontrast|contrast", "contrast", "Was gadolinium given?"),
    ("modality", "^is this a (t[12]) weighted image", "weighting", "Is this a {} weighted image?"),
    ("modality", "", "sequence", "What sequence is this?"),
)


@dataclass(frozen=True)
class Pair:
    """Two wordings of one request."""

    request: str
    plain: str
    other: str
    bank: str = "own"


def pairs(questions: Path | None = None) -> list[Pair]:
    """The bank, and the different questions of a file.

    Raises:
        ValueError: a line of the file has other columns.
    """
    with BANK.open(encoding="utf-8") as f:
        found = [Pair(r["request"], r["plain"], r["paraphrase"], r["bank"]) for r in csv.DictReader(f, delimiter="\t")]
    told = questions.read_text(encoding="utf-8").splitlines() if questions else []
    for line in dict.fromkeys(" ".join(x.split("|", 1)[-1].rsplit("|", 1)[0].split()) for x in told if x.strip()):
        category, _, question = line.partition("|")
        fits = [(r, p, m) for c, pattern, r, p in ASKED if c == category and (m := re.search(pattern, question))]
        if not fits:
            raise ValueError(f"expected lines image|category|question|answer, got the category {category[:40]!r}")
        request, plain, match = fits[0]
        plain = plain.format(*(g.upper() for g in match.groups()))
        if re.findall(r"\w+", plain.lower()) != re.findall(r"\w+", question.lower()):
            found.append(Pair(request, plain, question, "file"))
    return found


def same_facts(a: Answer, b: Answer) -> bool:
    """Whether two answers say the same facts (`metrics.facts`: sizes may differ a little) and outline the same structures."""
    shared, said, true = count(plainly(extract(a.text)), plainly(extract(b.text)))
    outlined = [{s.name for s in x.structures if s.voxels} for x in (a, b)]
    return shared == said == true and outlined[0] == outlined[1]


def compare(pair: Pair, plain: Answer, other: Answer) -> tuple[bool, bool]:
    """Whether the task of the other wording is right, and whether the facts are the same.

    Yes and no are left out: "without contrast?" and "with contrast?" turn them round.
    """
    right = other.task == TASKS.get(pair.request, "text")
    if pair.request in SAID:
        return right, bool(re.search(SAID[pair.request], other.text))
    return right, same_facts(other, plain)


def training_patterns() -> dict[str, re.Pattern[str]]:
    """For each request what fits any wording of the training grammar."""
    weightings = (w.replace("-", sign) for w in SEQUENCE_WORDS.values() for sign in "- ")
    names = (*NAMES, *GROUPS, *weightings)
    return {request: r.pattern(names) for request, r in REQUESTS.items()}


def near_training(wordings: Iterable[str]) -> set[str]:
    """Those that are wordings of the training grammar but for one word too many."""
    known = training_patterns().values()

    def shorter(words: list[str]) -> Iterable[str]:
        return (" ".join(words[:k] + words[k + 1 :]) for k in range(len(words)))

    return {w for w in wordings if any(p.fullmatch(less) for less in shorter(w.split()) for p in known)}


def dealt(every: Sequence[Pair], shown: Sequence[Collection[str]]) -> list[list[Pair]]:
    """The pairs for each case: in turn, but for a structure by its name the next case that shows it, where one does.

    What is not in the slices is rightly not outlined, whatever the wording.

    Args:
        shown: Names of the structures in each case.
    """
    out: list[list[Pair]] = [[] for _ in shown]
    for k, pair in enumerate(every):
        turns = [(k + more) % len(shown) for more in range(len(shown))]
        named = next((n for n in NAMES if n in pair.plain), None)
        out[next((t for t in turns if named is None or named in shown[t]), turns[0])].append(pair)
    return out


def measure(assistant: Assistant, cases: Sequence[Case], questions: Path | None = None) -> dict[str, Any]:
    """Ask every pair of one of the cases."""
    if not cases:
        raise ValueError("expected one study or more to ask about, got none; raise --count")
    rows: list[dict[str, Any]] = []
    truths = [open_case(case)[1].labels for case in cases]
    shown = [{s.name for s in STRUCTURES if t is None or (t == s.label).sum() >= LEAST_PIXELS} for t in truths]
    every = pairs(questions)
    near = near_training(p.other for p in every)
    for case, some in zip(cases, dealt(every, shown), strict=True):
        study, _ = open_case(case)
        asked: dict[str, Answer] = {}
        for pair in some:
            for words in (pair.plain, pair.other):
                if words not in asked:
                    asked[words] = assistant.answer(study, words)
            right, same = compare(pair, asked[pair.plain], asked[pair.other])
            rows.append({"case": case.name, "request": pair.request, "bank": pair.bank, "asked": pair.other, "near": pair.other in near,
                         "task": asked[pair.other].task,
                         "task_right": right, "plain_task_right": compare(pair, asked[pair.plain], asked[pair.plain])[0],
                         "same_facts": same, "plain": asked[pair.plain].text[:300], "other": asked[pair.other].text[:300]})  # fmt: skip
        assistant.forget()
        print(case.name, summary(rows), flush=True)
    return {"rows": rows, **summary(rows)}


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
    """Of each, how many of how many."""
    listed = list(rows)
    return {k: [sum(r[k] for r in listed), len(listed)] for k in ("task_right", "plain_task_right", "same_facts")}


def markdown(results: dict[str, Any]) -> str:
    """A table by request, and what went wrong."""
    lines = ["# The same request in other words", "", f"{NOTICE} None of these wordings was trained on; 95 % intervals by Wilson.", ""]
    lines += [row("request", "task right", "same facts as the plain wording", "n"), row("---", "---", "---", "---")]
    rows = results["rows"]
    told = {request: [r for r in rows if r["request"] == request] for request in dict.fromkeys(r["request"] for r in rows)}
    told |= {f"all of the bank {bank}": [r for r in rows if r["bank"] == bank] for bank in ("own", "file", "independent")}
    told |= {"all": rows, "all that are one word from a training wording": [r for r in rows if r["near"]]}
    for request, some in ((k, v) for k, v in told.items() if v):
        cells = []
        for key in ("task_right", "same_facts"):
            k = sum(r[key] for r in some)
            low, high = wilson(k, len(some))
            cells.append(f"{k / len(some):.2f} [{low:.2f}, {high:.2f}]")
        lines.append(row(request, *cells, len(some)))
    lines += ["", "## Not right", "", row("request", "asked", "task", "answer", "answer to the plain wording"), row(*["---"] * 5)]
    for r in rows:
        if not (r["task_right"] and r["same_facts"]):
            cells = [" ".join(r[k].split()).replace("|", "/")[:160] for k in ("other", "plain")]
            lines.append(row(r["request"], r["asked"], r["task"], *cells))
    return "\n".join([*lines, ""])
