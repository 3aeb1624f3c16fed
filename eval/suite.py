"""Suites: predict what is not predicted yet, score everything, write results.json, results.md and figures."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from omnimri.anatomy import CLASS_OF_LABEL, STRUCTURES
from omnimri.assistant import Assistant
from omnimri.grid import closest_axes
from omnimri.volume import Study, Volume

from . import predict
from .cases import Case, Truth, template
from .findings import Honesty, Lesions
from .metrics.segmentation import dice
from .reports import NOTICE, to_json, write_atomic
from .scoring import Reconstructions, Scored, Structures, Table, Tissue, beside, by_rule, load, reports_table

VERSION = 9
"""Of the suites: figures of different versions are not compared."""
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "monai", "scikit-image", "scikit-learn", "sacrebleu", "spacy", "negspacy")


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; empty outside a checkout."""
    run = {"capture_output": True, "text": True, "cwd": Path(__file__).parent, "check": False}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        return head + ("+" if head and subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip() else "")
    except OSError:
        return ""


def library_versions() -> dict[str, str]:
    """Versions of `LIBRARIES` that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(cases: Sequence[Case], out: Path, *, checkpoint: str | None, score_only: bool, controls: bool, pooled: bool) -> dict[str, Any]:
    """Predict and score the cases of one or several suites.

    Raises:
        ValueError: the checkpoint cannot be loaded; with `score_only`, nothing was predicted.
    """
    record = out / "run.json"
    if score_only:
        if not record.exists():
            raise ValueError(f"expected predictions in {out.name!r}, got none; run without --score-only")
        known = json.loads(record.read_text(encoding="utf-8"))
        controls = known["controls"]
    else:
        assistant = Assistant(checkpoint)
        name = "embedded" if checkpoint is None else Path(checkpoint).name
        chosen = hashlib.sha256(assistant.model.config.to_json_string().encode()).hexdigest()  # its thresholds
        key = f"{VERSION}:{assistant.digest}:{chosen}"
        known = {"checkpoint": name, "checkpoint_sha256": assistant.digest, "key": key, "controls": controls}
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(known))
        predict.predict(assistant, predict.MODEL, cases, out, key=known["key"])
        if controls:
            asked = [c for c in cases if controlled(c)]
            predict.predict(predict.random_weights(assistant), predict.RANDOM, asked, out, key=known["key"])
        del assistant
    for case in cases:  # nothing is written before every prediction is there
        for system in systems_of(case, controls=controls):
            told, _ = predict.read(out, system, case)
            if told["key"] != known["key"]:
                raise ValueError(f"expected predictions of one checkpoint, got another's of {case.name!r}; run without --score-only")
    results = score(cases, out, controls=controls, pooled=pooled)
    results = {"suite_version": VERSION, "commit": commit(), **known, "libraries": library_versions(), **results}
    write_atomic(out / "results.json", to_json(results))
    write_atomic(out / "results.md", markdown(results))
    return results


def controlled(case: Case) -> bool:
    """Whether random weights are asked too."""
    return case.suite not in ("refused", "individuals")


def systems_of(case: Case, *, controls: bool) -> list[str]:
    """The systems that predict a case."""
    return [predict.MODEL, *([predict.RANDOM] if controls and controlled(case) else [])]


def score(cases: Sequence[Case], out: Path, *, controls: bool, pooled: bool) -> dict[str, Any]:
    """Tables of all suites among the cases; cases that cannot be scored are listed."""
    tables: list[Table] = []
    failures: list[str] = []
    honesty = [Honesty(predict.MODEL), *([Honesty(predict.RANDOM)] if controls else [])]
    seconds, figures = {"segment": [], "report": []}, out / "figures"
    peak = 0.0
    for suite in dict.fromkeys(c.suite for c in cases):
        structures, tissue, lesions, images = Structures(suite, pooled=pooled), Tissue(suite), Lesions(suite), Reconstructions()
        texts, ranked = [], []
        for case in (c for c in cases if c.suite == suite):
            try:
                s = load(case, out, systems_of(case, controls=controls)) if suite != "refused" else load_refused(case, out)
            except Exception as error:  # a case that cannot be read is listed and does not stop the rest
                failures.append(f"{case.name}: {error if isinstance(error, ValueError) else type(error).__name__}")
                continue
            for table in (structures, tissue, lesions, *honesty):
                table.see(s)
            images.see(s, out)
            told = s.told[predict.MODEL]
            if "report" in told and suite != "refused":
                seconds["segment"].append(told["seconds"]["segment"])
                seconds["report"].append(told["seconds"]["segment"] + told["seconds"]["report"])
                peak = max(peak, told["peak_memory_gib"])
                if s.truth.report is not None:
                    control = s.told[predict.RANDOM]["report"]["text"] if predict.RANDOM in s.told else None
                    texts.append((case.name, case.patient, told["report"]["text"], control, by_rule(s), s.truth.report))
                ranked.append((figure_of_merit(s), case))
        tables += [
            t
            for t in (tissue.table(), structures.table() if structures.found else None, lesions.table(figures))
            if t is not None and t.rows
        ]
        if texts:
            tables.append(reports_table(texts))
        if images.cases:
            tables.append(images.table())
        if ranked:
            ranked.sort(key=lambda r: r[0])
            chosen = {ranked[k][1].name: (name, ranked[k][1]) for name, k in (("best", -1), ("median", len(ranked) // 2), ("worst", 0))}
            draw({f"{name}: {c.name}": load(c, out, [predict.MODEL]) for name, c in reversed(chosen.values())}, figures / f"{suite}.png")
    tables.append(beside([h.table() for h in honesty]))
    return {
        "cases": len(cases),
        "failures": failures,
        "seconds": {k: round(float(np.median(v)), 1) for k, v in seconds.items() if v},
        "peak_memory_gib": peak,
        "tables": [vars(t) for t in tables],
    }


def load_refused(case: Case, out: Path) -> Scored:
    """A case whose file may be refused: its truth is that it is no brain MRI."""
    told, _ = predict.read(out, predict.MODEL, case)
    if "failed" in told:
        raise ValueError(told["failed"])
    return Scored(case, Study(), Truth(), {predict.MODEL: told}, {})


def figure_of_merit(s: Scored) -> float:
    """By what cases are ranked for the figures: Dice of the brain, or of the lesion."""
    said, truth = s.labels[predict.MODEL], s.truth
    if s.case.suite == "brats" and truth.lesions is not None:
        return float(np.nan_to_num(dice(np.isin(said, (25, 57)), truth.lesions)))
    if truth.labels is not None:
        values = [dice(said == x.label, truth.labels == x.label) for x in STRUCTURES]
        return float(np.nanmean(values))
    brain = truth.brain if truth.brain is not None else None if truth.grey is None or truth.white is None else truth.grey | truth.white
    return float(np.nan_to_num(dice(said > 0, brain))) if brain is not None else float((said > 0).sum())


def colours(labels: np.ndarray) -> np.ndarray:
    """A colour index from 1 to 32 for each structure, 33 for lesions, 0 for background."""
    table = np.zeros(max(256, int(labels.max()) + 1), dtype=np.int32)
    for s in STRUCTURES:
        table[s.label] = 1 + (CLASS_OF_LABEL[s.label] * 13) % 32
    table[[25, 57]] = 33
    return table[labels]


def draw_planes(axes: Any, volume: Volume, labels: np.ndarray, truth: np.ndarray | None) -> None:
    """Three planes through the middle with the label map, and the truth's outline in white; radiological, with letters."""
    order = closest_axes(volume.affine)
    image = volume.voxels[0].numpy()
    signs = [float(volume.affine[k, order[k]]) for k in range(3)]
    for axis, across in zip(axes, (2, 1, 0), strict=True):
        if image.shape[order[across]] < 2 and across != 2:
            axis.axis("off")
            continue
        seen = np.argwhere(labels > 0)
        middle = int(np.median(seen[:, order[across]])) if len(seen) else image.shape[order[across]] // 2
        rest = [k for k in (0, 1, 2) if k != across]
        turned = [
            np.transpose(np.take(x, [middle], order[across]), (order[rest[1]], order[rest[0]], order[across]))[..., 0]
            for x in (image, labels)
        ]
        if truth is not None:
            turned.append(np.transpose(np.take(truth, [middle], order[across]), (order[rest[1]], order[rest[0]], order[across]))[..., 0])
        # Up is superior or anterior; left of the picture is the patient's right, or anterior on a sagittal one.
        turned = [x[:: -1 if signs[rest[1]] > 0 else 1, :: (-1 if signs[rest[0]] > 0 else 1)] for x in turned]
        aspect = volume.spacing_mm[order[rest[1]]] / volume.spacing_mm[order[rest[0]]]
        axis.imshow(turned[0], cmap="gray", vmax=np.percentile(image, 99.7), aspect=aspect)
        axis.imshow(
            np.ma.masked_equal(colours(turned[1]), 0),
            cmap="nipy_spectral",
            vmin=0,
            vmax=33,
            alpha=0.5,
            interpolation="nearest",
            aspect=aspect,
        )
        if truth is not None and turned[2].any():
            axis.contour(turned[2], [0.5], colors="white", linewidths=0.8)
        for place, letter in ((0.02, "R" if across else "A"), (0.94, "L" if across else "P")):
            axis.text(place, 0.5, letter, color="yellow", transform=axis.transAxes)
        axis.axis("off")


def draw(cases: dict[str, Scored], path: Path) -> None:
    """One row a case, under its title: worst, median and best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(len(cases), 3, figsize=(9, 3.1 * len(cases)), facecolor="black", squeeze=False)
    for row, (name, s) in zip(axes, cases.items(), strict=True):
        truth = s.truth.lesions if s.truth.lesions is not None and s.truth.lesions.any() else s.truth.brain
        draw_planes(row, s.study.primary, s.labels[predict.MODEL], truth)
        row[0].set_title(f"{name} ({figure_of_merit(s):.2f})", color="white", fontsize=9, loc="left")
    figure.text(0.01, 0.005, f"{NOTICE} White: the truth's lesion or brain.", color="white", fontsize=8)
    figure.subplots_adjust(0, 0.02, 1, 0.97, 0.01, 0.08)
    figure.savefig(path, dpi=70, facecolor="black")
    pyplot.close(figure)


def cell(value: dict[str, Any] | str | None) -> str:
    """A figure with its interval and n, as a table shows it."""
    if value is None or isinstance(value, str):
        return value or ""
    if np.isnan(value["value"]):
        return "not defined"
    interval = "" if np.isnan(value["low"]) else f" [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value['value']:.3g}{interval}, n = {value['n']}"


def markdown(results: dict[str, Any]) -> str:
    """results.md."""
    lines = [
        "# Figures of the suites",
        "",
        (
            f"{NOTICE} Checkpoint {results['checkpoint']} (`{results['checkpoint_sha256'][:16]}`), suites version "
            f"{results['suite_version']}, commit `{results['commit']}`. Means over cases with 95 % intervals by patient (1,000 draws; "
            "200 for average precision, FROC, AUPRC and F1; DeLong by case for AUROC; Wilson for k of n); n counts cases, of which a "
            "patient may have several, and one patient has no interval. The synthetic heads are four, on which the checkpoint's "
            "thresholds were chosen too. Undefined figures are left out of means and of n."
        ),
        "",
        f"{results['cases']} cases; median seconds {results['seconds']}; peak memory {results['peak_memory_gib']} GiB; "
        + ", ".join(f"{k} {v}" for k, v in results["libraries"].items())
        + ".",
        "",
    ]
    if results["failures"]:
        lines += ["Could not be scored:", "", *(f"- {f}" for f in results["failures"]), ""]
    for table in results["tables"]:
        systems = list(dict.fromkeys(k for r in table["rows"] for k in r["values"]))
        lines += [
            f"## {table['suite']}: {table['title']}",
            "",
            f"| what | metric (better; range) | {' | '.join(systems)} |",
            "|" + "---|" * (len(systems) + 2),
        ]
        for r in table["rows"]:
            low, high = r["range"]
            told = (
                f"{r['metric']} ({r['direction']}; {low:g} to {high:g})"
                if "k of n" not in r["metric"]
                else f"{r['metric']} ({r['direction']})"
            )
            lines.append(f"| {r['what']} | {told} | {' | '.join(cell(r['values'].get(s)) for s in systems)} |")
        lines += ["", *(f"- {n}" for n in table["notes"]), ""]
    return "\n".join(lines)


def picture(assistant: Assistant, out: Path) -> dict[str, Any]:
    """Draw the answer to "Write a report." on the MNI152 T1: three planes with the label map, and the text below."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    study, _ = template()
    answer = assistant.answer(study, "Write a report.", task="report")
    labels = assistant.segment(study).labels
    assert labels is not None
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 8.6), facecolor="black")
    for row, shown in zip(axes, (np.zeros(labels.shape, dtype=np.int32), labels.numpy()), strict=True):
        draw_planes(row, study.primary, shown, None)
    words = "\n".join(textwrap.wrap(f"Write a report. -> {answer.text}", 130))
    figure.text(0.02, 0.01, f"{words}\n{answer.notice}", color="white", fontsize=9)
    figure.subplots_adjust(0, 0.14, 1, 1, 0.01, 0.01)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "answer.png", dpi=80, facecolor="black")
    return {"text": answer.text}
