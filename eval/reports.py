"""Generated reports: read predictions, score them, compare systems. Nothing is written before everything has been read."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .metrics.embedding import Encoder
from .metrics.extraction import extract
from .metrics.facts import by_kind, count, fact_f1, plainly
from .metrics.metric import Metric, mean_of, mean_score
from .metrics.ngram import sacrebleu_signatures
from .metrics.report import METRICS
from .resampling import DRAWS, SHUFFLES, Estimate, compare, estimate, holm

NOTICE = "Research use only. Not a medical device."
MAX_BYTES = 2**29


@dataclass(frozen=True)
class Texts:
    """Predictions of one system beside their references."""

    ids: tuple[str, ...]
    predictions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    patients: tuple[str, ...] | None
    """For resampling; None where the file names none."""


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSONL or CSV file.

    Raises:
        ValueError: no such file, not UTF-8, or a line that is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"expected a file of predictions, got {path.name!r} that is none")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"expected a file of at most {MAX_BYTES >> 20} MiB, got {path.name!r} of {path.stat().st_size >> 20} MiB; split it"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got {path.name!r} with another byte at {error.start}") from None
    if path.suffix.lower() == ".csv":
        return _csv_rows(text, path)
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"expected one JSON object a line, got something else on line {n} of {path.name!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__} on line {n} of {path.name!r}")
        rows.append((n, row))
    return rows


def _csv_rows(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of CSV text whose first line names the columns; empty cells are left out."""
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"expected each column once, got one twice in {path.name!r}")
        for cells in reader:
            if len(cells) != len(names):
                raise ValueError(
                    f"expected {len(names)} cells, got {len(cells)} on line {reader.line_num} of {path.name!r}; quote texts with commas"
                )
            rows.append((reader.line_num, {k: v for k, v in zip(names, cells, strict=True) if v != "" or k == "prediction"}))
    except csv.Error as error:
        raise ValueError(f"expected CSV, got a damaged line {reader.line_num} in {path.name!r} ({error})") from None
    return rows


def _by_id(path: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Rows of a file by their id."""
    out: dict[str, tuple[int, dict[str, Any]]] = {}
    for n, row in read_rows(path):
        key = row.get("id")
        if not isinstance(key, str | int) or key == "":
            raise ValueError(f"expected an 'id' (a string or a whole number), got none on line {n} of {path.name!r}")
        if str(key) in out:
            raise ValueError(f"expected each id once, got {str(key)[:60]!r} again on line {n} of {path.name!r}")
        out[str(key)] = n, row
    if not out:
        raise ValueError(f"expected at least one line, got none in {path.name!r}")
    return out


def _references(row: dict[str, Any], n: int, path: Path) -> tuple[str, ...] | None:
    """References of a row; None where it has none."""
    told = next((row[k] for k in ("references", "reference") if row.get(k) is not None), None)
    if told is None:
        return None
    told = [told] if isinstance(told, str) else told
    if not isinstance(told, list) or not told or not all(isinstance(t, str) for t in told):
        raise ValueError(f"expected 'reference' (text) or 'references' (a list of texts), got another kind on line {n} of {path.name!r}")
    return tuple(told)


def read_texts(predictions: Path, references: Path | None = None) -> Texts:
    """Predictions with their references, from one file or two.

    Raises:
        ValueError: what cannot be read, or ids that are missing, doubled or without a partner.
    """
    said = _by_id(predictions)
    others = _by_id(references) if references else said
    for a, b, name in ((said, others, predictions), (others, said, references or predictions)):
        alone = [k for k in a if k not in b]
        if alone:
            raise ValueError(f"expected the same ids in both files, got {len(alone)} in {name.name!r} alone, the first {alone[0][:60]!r}")
    texts, truths, patients = [], [], []
    for key, (n, row) in said.items():
        if not isinstance(row.get("prediction"), str):
            raise ValueError(f"expected 'prediction' as text, got none on line {n} of {predictions.name!r}")
        line, other = others[key]
        found = _references(other, line, references or predictions)
        if found is None:
            raise ValueError(f"expected 'reference' or 'references', got neither on line {line} of {(references or predictions).name!r}")
        texts.append(row["prediction"])
        truths.append(found)
        named = {str(r["patient"]) for r in (row, other) if r.get("patient") is not None}
        if len(named) > 1:
            raise ValueError(f"expected one 'patient' for an id, got two on line {n} of {predictions.name!r}")
        patients.append(next(iter(named), None))
    known = sum(p is not None for p in patients)
    if known not in (0, len(patients)):
        raise ValueError(f"expected 'patient' on every line or on none, got it on {known} of {len(patients)}")
    return Texts(tuple(said), tuple(texts), tuple(truths), tuple(map(str, patients)) if known else None)


def load_scorer(name: str) -> Metric:
    """A metric from `module:function`, where function(predictions, references) gives one number a report.

    RadGraph-F1, CheXbert, RaTEScore and GREEN plug in so; `function.higher_is_better = False` turns the direction round.

    Raises:
        ValueError: no such module or function, or it gives something else.
    """
    module, _, function = name.partition(":")
    try:
        score: Callable = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"expected --scorer module:function that can be imported, got {name!r}") from None

    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        try:
            values = np.asarray(score(list(predictions), [list(r) for r in references]), dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected {len(predictions)} numbers from {name!r}, got {type(error).__name__}: {error}") from None
        if values.shape != (len(predictions),) or not np.isfinite(values).all():
            raise ValueError(f"expected {len(predictions)} finite numbers from {name!r}, got an array of shape {values.shape} or others")
        return mean_of(values)

    return Metric(
        name,
        "mean of a scorer given on the command line",
        statistics,
        mean_score,
        range=(float("-inf"), float("inf")),
        higher_is_better=bool(getattr(score, "higher_is_better", True)),
    )


def chosen_metrics(encoder: Path | None, scorers: Sequence[str]) -> tuple[list[Metric], list[str]]:
    """The metrics of a run, and what was left out with the reason."""
    metrics = [*METRICS.values(), *(load_scorer(s) for s in scorers)]
    if encoder is None:
        return metrics, ["BERTScore, embedding similarity: no --encoder FOLDER was given"]
    return [*metrics, *Encoder(encoder).metrics()], []


def score(texts: Texts, metrics: Sequence[Metric], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Every metric with its interval, and the facts by kind."""
    rows = {}
    kept: dict[Any, np.ndarray] = {}
    for m in metrics:
        if m.statistics not in kept:
            kept[m.statistics] = m.statistics(texts.predictions, texts.references)
        rows[m.name] = _row(m, estimate(m, kept[m.statistics], texts.patients, draws=draws, seed=seed))
    counts = [count(plainly(extract(p)), plainly(extract(r[0]))) for p, r in zip(texts.predictions, texts.references, strict=True)]
    facts: dict[str, dict[str, float]] = by_kind(counts)
    for kind, told in facts.items():
        table = np.array([[sum(c.values()) if kind == "all" else c[kind] for c in of_text] for of_text in counts], dtype=float)
        e = estimate(Metric(kind, "", METRICS["fact F1"].statistics, fact_f1), table, texts.patients, draws=draws, seed=seed)
        told |= {"low": e.low, "high": e.high, "n": e.n}
    return {
        "n": len(texts.ids),
        "patients": len(set(texts.patients)) if texts.patients else None,
        "draws": draws,
        "seed": seed,
        "signatures": sacrebleu_signatures(),
        "metrics": rows,
        "facts": facts,
    }


def _row(m: Metric, e: Estimate) -> dict[str, Any]:
    return {
        "value": e.value,
        "low": e.low,
        "high": e.high,
        "n": e.n,
        "direction": m.direction,
        "range": list(m.range),
        "definition": m.definition,
    }


def to_json(results: Any) -> str:
    """JSON in which what is not defined is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    return json.dumps(plain(results), indent=1)


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def row(*cells: Any) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def _cell(x: float) -> str:
    return "-" if np.isnan(x) else f"{x:.4g}"


def report_markdown(results: dict[str, Any]) -> str:
    """results.md of `score`."""
    by = f"{results['patients']} patients" if results["patients"] else "reports"
    lines = [
        "# Metrics of generated reports",
        "",
        f"{NOTICE} n = {results['n']}; 95 % intervals from {results['draws']} draws of {by}, seed {results['seed']}.",
        "",
        *(f"- {k}: `{v}`" for k, v in results["signatures"].items()),
        *(f"- left out: {s}" for s in results.get("left_out", [])),
        "",
        "| metric | value | 95 % interval | n | better | range | definition |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, m in results["metrics"].items():
        low, high = m["range"]
        interval = f"{_cell(m['low'])} to {_cell(m['high'])}"
        lines.append(row(name, _cell(m["value"]), interval, m["n"], m["direction"], f"{low:g} to {high:g}", m["definition"]))
    lines += [
        "",
        "## Facts by kind (against the first reference)",
        "",
        "| kind | precision | recall | F1 | 95 % interval | n | said | true |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        row(
            k,
            *(_cell(v[x]) for x in ("precision", "recall", "f1")),
            f"{_cell(v['low'])} to {_cell(v['high'])}",
            v["n"],
            v["said"],
            v["true"],
        )
        for k, v in results["facts"].items()
    ]
    return "\n".join(lines) + "\n"


def compare_systems(
    systems: dict[str, Texts], metrics: Sequence[Metric], *, draws: int = DRAWS, shuffles: int = SHUFFLES, seed: int = 0
) -> dict[str, Any]:
    """Each further system against the first, by every metric; p values corrected over all of them together (Holm).

    Raises:
        ValueError: the systems are not on the same ids and references.
    """
    (first, a), *others = systems.items()
    order = {k: i for i, k in enumerate(a.ids)}
    tests = []
    for name, b in others:
        if set(b.ids) != set(order):
            raise ValueError(
                f"expected the same ids in {first!r} and {name!r}, got {len(set(b.ids) ^ set(order))} that only one of them has"
            )
        index = sorted(range(len(b.ids)), key=lambda k: order[b.ids[k]])
        said = [b.predictions[k] for k in index]
        if [b.references[k] for k in index] != list(a.references):
            raise ValueError(f"expected the same references in {first!r} and {name!r}, got others")
        if (b.patients and [b.patients[k] for k in index]) != (a.patients and list(a.patients)):
            raise ValueError(f"expected the same patients in {first!r} and {name!r}, got others")
        kept: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        for m in metrics:
            if m.statistics not in kept:
                kept[m.statistics] = m.statistics(a.predictions, a.references), m.statistics(said, a.references)
            sa, sb = kept[m.statistics]
            c = compare(m, sa, sb, a.patients, draws=draws, shuffles=shuffles, seed=seed)
            tests.append(
                {
                    "a": first,
                    "b": name,
                    "metric": m.name,
                    "direction": m.direction,
                    "value_a": float(m.score(sa.sum(0))),
                    "value_b": float(m.score(sb.sum(0))),
                    "difference": c.difference.value,
                    "low": c.difference.low,
                    "high": c.difference.high,
                    "n": c.difference.n,
                    "p_bootstrap": c.p_bootstrap,
                    "p_randomisation": c.p_randomisation,
                }
            )
    for kind in ("bootstrap", "randomisation"):
        for test, p in zip(tests, holm([t[f"p_{kind}"] for t in tests]), strict=True):
            test[f"p_{kind}_holm"] = p
    unit = f"{len(set(a.patients))} patients" if a.patients else f"{len(a.ids)} reports"
    return {"draws": draws, "shuffles": shuffles, "unit": unit, "seed": seed, "signatures": sacrebleu_signatures(), "tests": tests}


def compare_markdown(results: dict[str, Any]) -> str:
    """results.md of `compare_systems`."""
    lines = [
        "# Systems compared",
        "",
        (
            f"{NOTICE} Paired bootstrap ({results['draws']} draws) and approximate randomisation ({results['shuffles']} shuffles), "
            f"two-sided, over {results['unit']}, Holm's correction over {len(results['tests'])} tests, seed {results['seed']}."
        ),
        "",
        *(f"- {k}: `{v}`" for k, v in results["signatures"].items()),
        "",
        "| A | B | metric | better | A | B | B - A | 95 % interval | n | p bootstrap (Holm) | p randomisation (Holm) |",
        "|" + "---|" * 11,
    ]
    for t in results["tests"]:
        p_values = [f"{t[f'p_{kind}']:.3g} ({t[f'p_{kind}_holm']:.3g})" for kind in ("bootstrap", "randomisation")]
        figures = [_cell(t[k]) for k in ("value_a", "value_b", "difference")]
        interval = f"{_cell(t['low'])} to {_cell(t['high'])}"
        lines.append(row(t["a"], t["b"], t["metric"], t["direction"], *figures, interval, t["n"], *p_values))
    return "\n".join(lines) + "\n"
