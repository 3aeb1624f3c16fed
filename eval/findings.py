"""Lesions and honesty: what is found, how sure it is, and what is said against what is there. No model is needed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from omnimri.measure import rank_components

from . import predict
from .metrics.classification import at_threshold, auprc, auroc, best_threshold, draw_reliability, expected_calibration_error
from .metrics.detection import Detected, average_precision, froc
from .metrics.extraction import extract
from .metrics.segmentation import dice
from .resampling import Estimate, figure_estimate, mean_estimate, of
from .scoring import Scored, Table, image_of, means

BRIGHT, ALL = "bright voxels", "all positive"
IOUS = (0.1, 0.3, 0.5)
LEAST_ML = 0.1
"""Smaller components of a baseline are no findings."""
LEAST_TRUE_ML = 0.05
"""Smaller components of the truth are specks of its drawing; they are not looked for, and a table says so."""
DENIED = ("lesion", "mass")


def boxes_of(mask: np.ndarray, s: Scored, *, least_ml: float = LEAST_ML) -> tuple[tuple, tuple[float, ...]]:
    """Boxes in mm (voxel edges) of the components of a mask from `least_ml` on, and their volumes in ml."""
    volume = s.study.primary
    ranks, sizes = rank_components(torch.from_numpy(np.ascontiguousarray(mask)), least=max(1, round(least_ml / volume.voxel_ml)))
    affine, found = volume.affine.numpy(), []
    for r, where in enumerate(ndimage.find_objects(ranks.numpy(), max_label=len(sizes)), 1):
        if where is None or r > len(sizes):
            continue
        corners = np.array(np.meshgrid(*[(p.start - 0.5, p.stop - 0.5) for p in where])).reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3]
        found.append((tuple(corners.min(0)), tuple(corners.max(0))))
    return tuple(found), tuple(n * volume.voxel_ml for n in sizes[: len(found)])


class Lesions:
    """Lesion masks, findings, and what is said of them."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.overlap: dict[str, list[float]] = {}
        self.patients: list[str] = []
        self.detected: dict[str, list[Detected]] = {}
        self.present: list[tuple[bool, dict[str, float]]] = []
        self.present_patients: list[str] = []
        self.confidence: list[tuple[bool, float]] = []
        self.confidence_patients: list[str] = []
        self.sides: list[bool] = []

    def see(self, s: Scored) -> None:
        """Measure one case."""
        if predict.MODEL not in s.labels:
            return
        findings = s.told[predict.MODEL]["detect"]["findings"]
        if s.truth.lesion is not None:
            self.present_patients.append(s.case.patient)
            sure = {k: max((f["confidence"] for f in told["detect"]["findings"]), default=0.0) for k, told in s.told.items()}
            self.present.append((s.truth.lesion, sure))
        if s.truth.side in ("left", "right") and findings:
            self.sides.append(findings[0]["side"] == s.truth.side)
        truth = s.truth.lesions
        if truth is None:
            return
        image = image_of(s)
        masks = {k: np.isin(v, (25, 57)) for k, v in s.labels.items()} | {BRIGHT: predict.bright_lesions(image), ALL: image > image.min()}
        known = np.ones(truth.shape, bool) if s.truth.ignored is None else ~s.truth.ignored
        true_boxes, _ = boxes_of(truth, s, least_ml=LEAST_TRUE_ML)
        self.patients.append(s.case.patient)
        for system, mask in masks.items():
            self.overlap.setdefault(system, []).append(dice(mask & known, truth) if truth.any() else float("nan"))
            if system in s.told:
                told = s.told[system]["detect"]["findings"]
                boxes, scores = tuple(tuple(map(tuple, f["box_mm"])) for f in told), tuple(f["confidence"] for f in told)
            else:
                boxes, scores = boxes_of(mask, s)
            self.detected.setdefault(system, []).append(Detected(boxes, scores, true_boxes))
        true = truth.astype(bool)
        ranks, sizes = rank_components(torch.from_numpy(np.ascontiguousarray(masks[predict.MODEL])))
        for rank, f in zip(range(1, len(sizes) + 1), findings, strict=False):
            self.confidence_patients.append(s.case.patient)
            self.confidence.append((bool(true[(ranks == rank).numpy()].any()), f["confidence"]))

    def table(self, figures: Path) -> Table:
        """Overlap, detection, presence, calibration."""
        t = Table(self.suite, "Lesions")
        if self.overlap:
            t.add("lesion of a case that has one", "dice", "higher", means(self.overlap, self.patients))
            for least in IOUS:
                t.add(
                    f"findings of lesions from {LEAST_TRUE_ML} ml, 3-D IoU {least}",
                    "average precision",
                    "higher",
                    {
                        k: figure_estimate(lambda i, v=v, least=least: average_precision([v[j] for j in i], least), self.patients)
                        for k, v in self.detected.items()
                    },
                )
            for most in (1.0, 4.0):
                t.add(
                    f"sensitivity at {most:g} false positives a scan (IoU 0.1)",
                    "FROC",
                    "higher",
                    {
                        k: figure_estimate(lambda i, v=v, most=most: froc([v[j] for j in i], 0.1)[most], self.patients)
                        for k, v in self.detected.items()
                    },
                )
        if self.present:
            self._presence(t)
        if self.sides:
            t.add("side of the largest finding", "k of n right", "higher", {predict.MODEL: of(sum(self.sides), len(self.sides))})
        if self.confidence:
            right, sure = (np.array(x) for x in zip(*self.confidence, strict=True))
            error = figure_estimate(lambda i: expected_calibration_error(right[i], sure[i]), self.confidence_patients)
            t.add(
                "confidence of findings, right where they touch a true lesion",
                "expected calibration error",
                "lower",
                {predict.MODEL: error},
            )
            figures.mkdir(parents=True, exist_ok=True)
            draw_reliability(right, sure, figures / f"{self.suite}-reliability.png", f"{self.suite}: findings")
        return t

    def _presence(self, t: Table) -> None:
        """Whether a study has a lesion, by the surest finding in it."""
        labels = np.array([p for p, _ in self.present], dtype=bool)
        scores = {k: np.array([sure[k] for _, sure in self.present]) for k in self.present[0][1]}
        said, what = scores[predict.MODEL] > 0, "lesion present in a study, by the surest finding"
        if labels.any() and not labels.all():
            t.add(what, "AUROC (DeLong)", "higher", {k: Estimate(*auroc(labels, v), len(labels)) for k, v in scores.items()})
            areas = {k: figure_estimate(lambda i, v=v: auprc(labels[i], v[i]), self.present_patients) for k, v in scores.items()}
            t.add(what, "AUPRC", "higher", areas | {ALL: figure_estimate(lambda i: float(labels[i].mean()), self.present_patients)})
        tuned, tested = slice(len(labels) // 2), slice(len(labels) // 2, None)
        if labels[tuned].any() and labels[tested].any() and not labels[tested].all():
            for measure in ("f1", "balanced_accuracy"):
                row = {}
                for k, v in scores.items():
                    threshold = best_threshold(labels[tuned], v[tuned])
                    figure = functools.partial(_at, labels[tested], v[tested], threshold, measure)
                    row[k] = figure_estimate(figure, self.present_patients[tested])
                t.add(f"{what}, threshold from the first half of the cases", measure, "higher", row)
        if labels.any():
            t.add(
                "studies with a lesion that get a finding",
                "k of n",
                "higher",
                {predict.MODEL: of(int((said & labels).sum()), int(labels.sum()))},
            )
        if not labels.all():
            t.add(
                "normal studies with a false finding",
                "k of n",
                "lower",
                {predict.MODEL: of(int((said & ~labels).sum()), int((~labels).sum()))},
            )


def _at(labels: np.ndarray, scores: np.ndarray, threshold: float, measure: str, index: np.ndarray) -> float:
    """A measure at a threshold on some of the samples; nan where they are of one class."""
    some = labels[index]
    return at_threshold(some, scores[index], threshold)[measure] if some.any() and not some.all() else float("nan")


def numbers_agree(told: dict[str, Any], labels: np.ndarray, s: Scored) -> tuple[int, int]:
    """(agree, all): numbers with a unit in a report that are a measure of its findings, and findings whose volume is their mask's."""
    volume = s.study.primary
    _, sizes = rank_components(torch.from_numpy(np.isin(labels, (25, 57))))
    volumes = [round(n * volume.voxel_ml, 3) for n in sizes]
    right = total = 0
    known = set()
    for f in told["findings"]:
        total += 1
        right += any(abs(f["volume_ml"] - v) <= 0.002 for v in volumes)
        # Findings carry three digits of what the text rounds on its own.
        known |= {f"{f['volume_ml'] + rounded:.{digits}f} ml" for digits in (1, 2) for rounded in (-0.0005, 0.0005)}
        known |= {f"{f['diameter_mm'] + rounded:.0f} mm" for rounded in (-0.05, 0.05)}
    for value in re.findall(r"\d+(?:\.\d+)? (?:ml|mm)\b", told["text"]):
        total += 1
        right += value in known
    return right, total


class Honesty:
    """What a system says against what is there, in every case of every suite that it was asked about."""

    def __init__(self, system: str) -> None:
        self.system = system
        self.grounded: list[tuple[float, float]] = []
        self.grounded_patients: list[str] = []
        self.numbers = [0, 0]
        self.false_findings: list[float] = []
        self.normal_patients: list[str] = []
        self.denied = [0, 0]
        self.abstained = [0, 0]
        self.refused: list[tuple[str, str]] = []
        self.scope: list[tuple[bool, float]] = []
        self.facts: dict[str, list[int]] = {
            "plane": [0, 0],
            "sequence read off the image, where one is named": [0, 0],
            "sequence read off the image, of all": [0, 0],
            "lobe of the largest finding, simulated heads": [0, 0],
            "lobe of the largest finding, real scans": [0, 0],
        }
        self.told: list[str] = []

    def see(self, s: Scored) -> None:
        """Look at one case."""
        if self.system not in s.told:
            return
        told = s.told[self.system]
        if s.case.suite == "refused":
            if "refused" in told:
                self.refused.append((s.case.name, f"refused when read: {told['refused'][:120]}"))
            else:
                self.scope.append((True, told["report"]["scope"]["score"]))
                inside = told["report"]["scope"]["in_scope"]
                self.refused.append((s.case.name, "ANSWERED" if inside else "abstained"))
            return
        if self.system not in s.labels:
            return
        report, labels = told["report"], s.labels[self.system]
        self.scope.append((False, report["scope"]["score"]))
        self.abstained[1] += 1
        self.abstained[0] += not report["scope"]["in_scope"]
        right, total = numbers_agree(report, labels, s)
        self.numbers[0] += right
        self.numbers[1] += total
        if s.truth.plane:
            self._fact("plane", told["what"]["study"]["plane"] == s.truth.plane)
        if s.truth.sequence:
            said = told["what"]["study"]["sequence"] if told["what"]["study"]["sequence_source"] == "image" else "other"
            same = said == s.truth.sequence or (said, s.truth.sequence) == ("T1w", "T1w-Gd")
            self._fact("sequence read off the image, of all", same)
            if said not in ("other", "unknown"):
                self._fact("sequence read off the image, where one is named", same)
            if s.case.suite != "synthetic":
                self.told.append(f"{s.case.name}: {said} ({s.truth.sequence})")
        if s.truth.lobes and report["findings"]:
            lobe = next(iter(re.findall(r"\b([a-z]+) lobe", told["lobe"]["text"])), "none told")
            where = "simulated heads" if s.case.suite == "synthetic" else "real scans"
            self._fact(f"lobe of the largest finding, {where}", lobe in s.truth.lobes)
            if s.case.suite != "synthetic":
                self.told.append(f"{s.case.name}: {lobe} lobe ({', '.join(s.truth.lobes)})")
        if s.truth.lesion:
            self.denied[1] += 1
            self.denied[0] += any(f.negated and f.type in DENIED for f in extract(report["text"]).findings)
        if s.truth.lesion is False:
            self.false_findings.append(float(len(report["findings"])))
            self.normal_patients.append(s.case.patient)
        if s.truth.lesions is not None and report["findings"]:
            ranks, sizes = rank_components(torch.from_numpy(np.isin(labels, (25, 57))))
            for rank in range(1, min(len(sizes), len(report["findings"])) + 1):
                inside = s.truth.lesions[(ranks == rank).numpy()]
                self.grounded.append((float(inside.any()), float(inside.mean() >= 0.5)))
                self.grounded_patients.append(s.case.patient)

    def _fact(self, name: str, right: bool) -> None:
        self.facts[name][0] += right
        self.facts[name][1] += 1

    def table(self) -> Table:
        """All of it."""
        t = Table("all cases", "Grounding and honesty")
        for k, what in enumerate(("touches a true lesion", "lies in true lesions with half of it or more")):
            if self.grounded:
                values = mean_estimate([g[k] for g in self.grounded], self.grounded_patients)
                t.add(f"findings whose mask {what}", "share", "higher", {self.system: values})
        t.add(
            "measured numbers in reports that are their masks' (so by construction)",
            "k of n",
            "higher",
            {self.system: of(*self.numbers)},
        )
        if self.false_findings:
            t.add(
                "false findings a normal scan",
                "mean",
                "lower",
                {self.system: mean_estimate(self.false_findings, self.normal_patients)},
                (0.0, float("inf")),
            )
        t.add('"no lesion" said of a study with one', "k of n", "lower", {self.system: of(*self.denied)})
        if self.abstained[1]:
            t.add("brain scans that are refused", "k of n", "lower", {self.system: of(*self.abstained)})
        for name, (right, total) in self.facts.items():
            if total:
                t.add(name, "k of n right", "higher", {self.system: of(right, total)})
        if self.refused:
            kept = sum("ANSWERED" not in what for _, what in self.refused)
            t.add("images that are no brain MRI: refused or abstained", "k of n", "higher", {self.system: of(kept, len(self.refused))})
            labels, scores = (np.array(x) for x in zip(*self.scope, strict=True))
            t.add(
                "scope score, no brain MRI against brain",
                "AUROC (DeLong)",
                "higher",
                {self.system: Estimate(*auroc(labels, scores), len(labels))},
            )
            t.notes += [f"{name}: {what}" for name, what in self.refused]
        t.notes += self.told
        return t
