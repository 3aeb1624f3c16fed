"""Scoring: predictions beside the truth and beside their controls, as tables of estimates. No model is needed.

A table has one row a figure and one column a system: the model, the same model with random weights, a trivial baseline, a peer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from omnimri.anatomy import STRUCTURES
from omnimri.measure import rank_components
from omnimri.volume import Study

from . import predict
from .cases import GREY, WHITE, Case, Truth, open_case
from .metrics.classification import auroc, draw_reliability, expected_calibration_error
from .metrics.detection import Detected, average_precision, froc
from .metrics.reconstruction import MEASURES as IMAGE_MEASURES
from .metrics.reconstruction import measure_images
from .metrics.report import METRICS
from .metrics.segmentation import MEASURES as MASK_MEASURES
from .metrics.segmentation import dice, measure_masks, pooled_dice
from .reports import Texts, score
from .resampling import Estimate, mean_estimate

MIXTURE, BRIGHT, ALL, CONSTANT, ZERO_FILLED, DEEPBET, WAVELET = (
    "three Gaussians",
    "bright voxels",
    "all positive",
    "one report for all",
    "zero-filled",
    "deepbet",
    "sigpy L1-wavelet",
)
CONSTANT_REPORT = (
    "Axial T1-weighted MRI of the brain. The slices show the cerebral hemispheres and lateral ventricles. No focal lesion is seen. "
    "Impression: no focal lesion."
)
IOUS = (0.1, 0.3, 0.5)
LEAST_ML = 0.1
"""Smaller components of a baseline are no findings."""
NO_LESION = re.compile(r"\bno (?:focal )?lesions?\b", re.IGNORECASE)


@dataclass
class Table:
    """Figures of one kind in one suite."""

    suite: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, what: str, metric: str, direction: str, values: dict[str, Estimate | str], range_: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """A row: system -> figure, or k of n as text."""
        self.rows.append(
            {
                "what": what,
                "metric": metric,
                "direction": direction,
                "range": list(range_),
                "values": {k: v if isinstance(v, str) else vars(v) for k, v in values.items()},
            }
        )


@dataclass(frozen=True)
class Scored:
    """One case with what the systems said of it."""

    case: Case
    study: Study
    truth: Truth
    told: dict[str, dict[str, Any]]
    """System -> answer.json."""
    labels: dict[str, np.ndarray]
    """System -> label map."""


def load(case: Case, out: Path, systems: Sequence[str]) -> Scored:
    """Read a case and its predictions.

    Raises:
        ValueError: one is not there, or it failed.
    """
    told, labels = {}, {}
    for system in systems:
        told[system], found = predict.read(out, system, case)
        if found is not None:
            labels[system] = found
    wrong = told[predict.MODEL].get("failed") or told[predict.MODEL].get("refused")
    if wrong:
        raise ValueError(wrong)
    study, truth = open_case(case)
    return Scored(case, study, truth, told, labels)


def image_of(s: Scored) -> np.ndarray:
    """(X, Y, Z) intensities."""
    return s.study.primary.voxels[0].numpy()


def as_truth(labels: np.ndarray) -> np.ndarray:
    """A label map with lesions told as the white matter that they lie in."""
    out = labels.copy()
    out[labels == 25], out[labels == 57] = 2, 41
    return out


def mixture_of(s: Scored) -> np.ndarray:
    """The baseline of three Gaussians, its grey and white matter sided at the scanner's midline."""
    volume = s.study.primary
    labels = predict.mixture_labels(image_of(s), s.truth)
    axes = [np.arange(n) for n in labels.shape]
    right = (
        sum(float(volume.affine[0, k]) * a.reshape([-1 if d == k else 1 for d in range(3)]) for k, a in enumerate(axes))
        + float(volume.affine[0, 3])
        > 0
    )
    return np.where((labels == 2) & right, 41, np.where((labels == 3) & right, 42, labels))


def means(values: dict[str, list[float]], patients: list[str]) -> dict[str, Estimate | str]:
    """System -> mean of its cases with interval by patient."""
    return {k: mean_estimate(v, patients) for k, v in values.items()}


class Structures:
    """Structures by FreeSurfer labels: every measure of every structure of every case."""

    def __init__(self, suite: str, *, pooled: bool) -> None:
        self.suite, self.pooled = suite, pooled
        self.found: dict[str, list[dict[int, dict[str, float]]]] = {}
        self.patients: list[str] = []
        self.pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def see(self, s: Scored) -> None:
        """Measure one case."""
        truth = s.truth.labels
        if truth is None or predict.MODEL not in s.labels:
            return
        self.patients.append(s.case.patient)
        spacing = s.study.primary.spacing_mm
        for system, labels in {**{k: as_truth(v) for k, v in s.labels.items()}, MIXTURE: mixture_of(s)}.items():
            rows = {}
            for structure in STRUCTURES:
                said, true = labels == structure.label, truth == structure.label
                rows[structure.label] = measure_masks(said, true, spacing) if system == predict.MODEL else {"dice": dice(said, true)}
                if self.pooled and system == predict.MODEL:
                    self.pairs.setdefault(structure.label, []).append((said, true))
            self.found.setdefault(system, []).append(rows)

    def table(self) -> Table:
        """Means over structures, then each structure."""
        t = Table(self.suite, "Structures (foreground alone, each case on its own)")
        for measure, (direction, range_) in MASK_MEASURES.items():
            values = {}
            for system, cases in self.found.items():
                if measure in next(iter(cases[0].values())):
                    each = [np.array([row[measure] for row in c.values()]) for c in cases]
                    values[system] = [float(np.nanmean(v)) if not np.isnan(v).all() else float("nan") for v in each]
            t.add("mean of the structures of a case", measure, direction, means(values, self.patients), range_)
        for structure in STRUCTURES:
            values = {system: [c[structure.label]["dice"] for c in cases] for system, cases in self.found.items()}
            t.add(structure.name, "dice", "higher", means(values, self.patients))
        for label, pairs in self.pairs.items():
            value = pooled_dice(pairs)
            t.add(
                next(s.name for s in STRUCTURES if s.label == label),
                "dice, all voxels of all cases pooled",
                "higher",
                {predict.MODEL: Estimate(value, float("nan"), float("nan"), len(pairs))},
            )
        return t


class Tissue:
    """Grey matter, white matter with brain-stem, and the brain mask."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.values: dict[str, dict[str, list[float]]] = {}
        self.patients: list[str] = []

    def see(self, s: Scored) -> None:
        """Measure one case."""
        truth = s.truth
        grey = truth.grey if truth.grey is not None else None if truth.labels is None else np.isin(truth.labels, GREY)
        white = truth.white if truth.white is not None else None if truth.labels is None else np.isin(truth.labels, WHITE)
        if predict.MODEL not in s.labels or (grey is None and truth.brain is None):
            return
        self.patients.append(s.case.patient)
        if grey is not None and white is not None:
            for system, labels in {**{k: as_truth(v) for k, v in s.labels.items()}, MIXTURE: mixture_of(s)}.items():
                self._put("grey matter", system, dice(np.isin(labels, GREY), grey))
                self._put("white matter and brain-stem", system, dice(np.isin(labels, WHITE), white))
        if truth.brain is not None:
            for system, labels in s.labels.items():
                self._put("brain mask", system, dice(ndimage.binary_fill_holes(labels > 0), truth.brain))
            image = image_of(s)
            self._put("brain mask", "whole head", dice(ndimage.binary_fill_holes(image > 0.1 * np.percentile(image, 99)), truth.brain))
            peer = predict.deepbet_mask(s.study)
            if peer is not None:
                self._put("brain mask", DEEPBET, dice(peer, truth.brain))

    def _put(self, what: str, system: str, value: float) -> None:
        self.values.setdefault(what, {}).setdefault(system, []).append(value)

    def table(self) -> Table:
        """One row a tissue."""
        t = Table(self.suite, "Tissue and brain mask")
        for what, values in self.values.items():
            t.add(what, "dice", "higher", means(values, self.patients))
        return t


def boxes_of(mask: np.ndarray, s: Scored) -> tuple[tuple, tuple[float, ...]]:
    """Boxes in mm (voxel edges) of the components of a mask from `LEAST_ML` on, and their volumes in ml."""
    volume = s.study.primary
    ranks, sizes = rank_components(torch.from_numpy(np.ascontiguousarray(mask)), least=max(1, round(LEAST_ML / volume.voxel_ml)))
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
        self.present: list[tuple[bool, float, float]] = []
        self.confidence: list[tuple[bool, float]] = []
        self.sides: list[bool] = []

    def see(self, s: Scored) -> None:
        """Measure one case."""
        if predict.MODEL not in s.labels:
            return
        findings = s.told[predict.MODEL]["detect"]["findings"]
        if s.truth.lesion is not None:
            controls = s.told.get(predict.RANDOM, {}).get("detect", {}).get("findings", [])
            self.present.append((s.truth.lesion, *(max((f["confidence"] for f in found), default=0.0) for found in (findings, controls))))
        if s.truth.side in ("left", "right") and findings:
            self.sides.append(findings[0]["side"] == s.truth.side)
        truth = s.truth.lesions
        if truth is None:
            return
        masks = {k: np.isin(v, (25, 57)) for k, v in s.labels.items()}
        image = image_of(s)
        masks |= {BRIGHT: predict.bright_lesions(image), ALL: image > image.min()}
        true_boxes, _ = boxes_of(truth, s)
        self.patients.append(s.case.patient)
        for system, mask in masks.items():
            self.overlap.setdefault(system, []).append(dice(mask, truth))
            if system in s.told:
                told = s.told[system]["detect"]["findings"]
                boxes, scores = tuple(tuple(map(tuple, f["box_mm"])) for f in told), tuple(f["confidence"] for f in told)
            else:
                boxes, scores = boxes_of(mask, s)
            self.detected.setdefault(system, []).append(Detected(boxes, scores, true_boxes))
        true = truth.astype(bool)
        ranks, sizes = rank_components(torch.from_numpy(np.ascontiguousarray(masks[predict.MODEL])))
        for rank, f in zip(range(1, len(sizes) + 1), findings, strict=False):
            self.confidence.append((bool(true[(ranks == rank).numpy()].any()), f["confidence"]))

    def table(self, figures: Path) -> Table:
        """Overlap, detection, presence, calibration."""
        t = Table(self.suite, "Lesions")
        if self.overlap:
            t.add("lesion of a case", "dice", "higher", means(self.overlap, self.patients))
            for least in IOUS:
                t.add(
                    f"findings at 3-D IoU {least}",
                    "average precision",
                    "higher",
                    {k: self._detection(v, lambda c, least=least: average_precision(c, least)) for k, v in self.detected.items()},
                )
            for most in (1.0, 4.0):
                t.add(
                    f"sensitivity at {most:g} false positives a scan (IoU 0.1)",
                    "FROC",
                    "higher",
                    {k: self._detection(v, lambda c, most=most: froc(c, 0.1)[most]) for k, v in self.detected.items()},
                )
        if self.present:
            labels = np.array([p for p, _, _ in self.present])
            values: dict[str, Estimate | str] = {}
            for k, system in enumerate((predict.MODEL, predict.RANDOM), 1):
                values[system] = Estimate(*auroc(labels, np.array([p[k] for p in self.present])), len(labels))
            t.add("lesion present in a study, by the surest finding", "AUROC (DeLong)", "higher", values)
            said = np.array([p[1] > 0 for p in self.present])
            t.add(
                "studies with a lesion that get a finding",
                "k of n",
                "higher",
                {predict.MODEL: f"{int((said & labels).sum())} of {int(labels.sum())}"},
            )
            t.add(
                "normal studies with a false finding",
                "k of n",
                "lower",
                {predict.MODEL: f"{int((said & ~labels).sum())} of {int((~labels).sum())}"},
            )
        if self.sides:
            t.add("side of the largest finding", "k of n right", "higher", {predict.MODEL: f"{sum(self.sides)} of {len(self.sides)}"})
        if self.confidence:
            right, sure = (np.array(x) for x in zip(*self.confidence, strict=True))
            t.add(
                "confidence of findings",
                "expected calibration error",
                "lower",
                {predict.MODEL: Estimate(expected_calibration_error(right, sure), float("nan"), float("nan"), len(right))},
            )
            figures.mkdir(parents=True, exist_ok=True)
            draw_reliability(right, sure, figures / f"{self.suite}-reliability.png", f"{self.suite}: findings")
        return t

    def _detection(self, cases: list[Detected], figure: Callable[[Sequence[Detected]], float], draws: int = 200) -> Estimate:
        """A figure of detections with a bootstrap over patients."""
        names = sorted(set(self.patients))
        groups = {n: [c for c, p in zip(cases, self.patients, strict=True) if p == n] for n in names}
        rng = np.random.default_rng(0)
        drawn = [figure([c for k in rng.integers(0, len(names), len(names)) for c in groups[names[k]]]) for _ in range(draws)]
        low, high = np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else (float("nan"),) * 2
        return Estimate(figure(cases), float(low), float(high), len(cases))


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
        known |= {f"{f['volume_ml']:.1f} ml", f"{f['volume_ml']:.2f} ml", f"{f['diameter_mm']:.0f} mm"}
        known.add(f"{int(f['diameter_mm'] + 0.5)} mm")
    for value in re.findall(r"\d+(?:\.\d+)? (?:ml|mm)\b", told["text"]):
        total += 1
        right += value in known
    return right, total


class Honesty:
    """What is said against what is there, in every case of every suite."""

    def __init__(self) -> None:
        self.grounded: list[float] = []
        self.grounded_patients: list[str] = []
        self.numbers = [0, 0]
        self.false_findings: list[float] = []
        self.normal_patients: list[str] = []
        self.denied = [0, 0]
        self.refused: list[tuple[str, str]] = []
        self.scope: list[tuple[bool, float]] = []
        self.facts: dict[str, list[int]] = {"plane": [0, 0], "sequence, where one is named": [0, 0], "sequence, of all": [0, 0]}
        self.sequences: list[str] = []

    def see(self, s: Scored) -> None:
        """Look at one case."""
        told = s.told[predict.MODEL]
        if s.case.suite == "refused":
            if "refused" in told:
                self.refused.append((s.case.name, f"refused when read: {told['refused'][:120]}"))
            else:
                self.scope.append((True, told["report"]["scope"]["score"]))
                inside = told["report"]["scope"]["in_scope"]
                self.refused.append((s.case.name, "ANSWERED" if inside else "abstained"))
            return
        if predict.MODEL not in s.labels:
            return
        report, labels = told["report"], s.labels[predict.MODEL]
        self.scope.append((False, report["scope"]["score"]))
        right, total = numbers_agree(report, labels, s)
        self.numbers[0] += right
        self.numbers[1] += total
        if s.truth.plane:
            self._fact("plane", told["what"]["study"]["plane"] == s.truth.plane)
        if s.truth.sequence:
            said = told["what"]["study"]["sequence"]
            same = said == s.truth.sequence or (said, s.truth.sequence) == ("T1w", "T1w-Gd")
            self._fact("sequence, of all", same)
            if said not in ("other", "unknown"):
                self._fact("sequence, where one is named", same)
            if s.case.suite != "synthetic":
                self.sequences.append(f"{s.case.name}: {said} ({s.truth.sequence})")
        if s.truth.lesion:
            self.denied[1] += 1
            self.denied[0] += bool(NO_LESION.search(report["text"]))
        if s.truth.lesion is False:
            self.false_findings.append(float(len(report["findings"])))
            self.normal_patients.append(s.case.patient)
        if s.truth.lesions is not None and report["findings"]:
            ranks, sizes = rank_components(torch.from_numpy(np.isin(labels, (25, 57))))
            for rank in range(1, min(len(sizes), len(report["findings"])) + 1):
                self.grounded.append(float(s.truth.lesions[(ranks == rank).numpy()].any()))
                self.grounded_patients.append(s.case.patient)

    def _fact(self, name: str, right: bool) -> None:
        self.facts[name][0] += right
        self.facts[name][1] += 1

    def table(self) -> Table:
        """All of it."""
        t = Table("all cases", "Grounding and honesty")
        if self.grounded:
            t.add(
                "findings whose mask touches a true lesion",
                "share",
                "higher",
                {predict.MODEL: mean_estimate(self.grounded, self.grounded_patients)},
            )
        t.add(
            "measured numbers in reports that are their masks'",
            "k of n",
            "higher",
            {predict.MODEL: f"{self.numbers[0]} of {self.numbers[1]}"},
        )
        if self.false_findings:
            t.add(
                "false findings a normal scan",
                "mean",
                "lower",
                {predict.MODEL: mean_estimate(self.false_findings, self.normal_patients)},
                (0.0, float("inf")),
            )
        t.add('"no lesion" said of a study with one', "k of n", "lower", {predict.MODEL: f"{self.denied[0]} of {self.denied[1]}"})
        for name, (right, total) in self.facts.items():
            if total:
                t.add(name, "k of n right", "higher", {predict.MODEL: f"{right} of {total}"})
        if self.refused:
            kept = sum("ANSWERED" not in what for _, what in self.refused)
            t.add(
                "images that are no brain MRI: refused or abstained", "k of n", "higher", {predict.MODEL: f"{kept} of {len(self.refused)}"}
            )
            labels, scores = (np.array(x) for x in zip(*self.scope, strict=True))
            t.add(
                "scope score, no brain MRI against brain",
                "AUROC (DeLong)",
                "higher",
                {predict.MODEL: Estimate(*auroc(labels, scores), len(labels))},
            )
            t.notes += [f"{name}: {what}" for name, what in self.refused]
        t.notes += self.sequences
        return t


def reports_table(seen: Sequence[tuple[str, str, str, str]]) -> Table:
    """Reports of the synthetic suite against their references.

    Args:
        seen: (case, said, said by random weights, reference).
    """
    t = Table("synthetic", "Reports against the reference, by rules and n-grams")
    ids, said, control, true = zip(*seen, strict=True)
    systems = {predict.MODEL: said, predict.RANDOM: control, CONSTANT: [CONSTANT_REPORT] * len(ids)}
    scored = {
        k: score(Texts(ids, tuple(v), tuple((r,) for r in true), None), list(METRICS.values()))["metrics"] for k, v in systems.items()
    }
    for name, m in METRICS.items():
        t.add(
            "reports",
            name,
            m.direction,
            {k: Estimate(v[name]["value"], v[name]["low"], v[name]["high"], v[name]["n"]) for k, v in scored.items()},
            m.range,
        )
    return t


class Reconstructions:
    """Images from undersampled k-space."""

    WEIGHTS = (0.001, 0.005, 0.02)
    """Of the wavelet norm; the first cases choose."""
    CHOOSING = 3

    def __init__(self) -> None:
        self.cases: list[tuple[dict[str, np.ndarray], np.ndarray, str]] = []

    def see(self, s: Scored, out: Path) -> None:
        """Collect every system's image of one case."""
        if s.study.kspace is None or s.truth.image is None:
            return
        from omnimri.physics import estimate_coils, ifft2c

        found = {}
        for system in s.told:
            path = out / "predictions" / system / s.case.name / "reconstruction.npy"
            if path.exists():
                found[system] = np.load(path, allow_pickle=False)
        data = s.study.kspace.data
        found[ZERO_FILLED] = (ifft2c(data) * estimate_coils(data).conj()).sum(1).abs().numpy()
        for weight in self.WEIGHTS:
            peer = predict.wavelet_reconstruction(s.study, weight)
            if peer is not None:
                found[f"{WAVELET} {weight}"] = peer
        self.cases.append((found, s.truth.image, s.case.patient))

    def table(self) -> Table:
        """Means over the cases after the choosing ones."""
        t = Table("synthetic", "Reconstruction of undersampled k-space (coil maps estimated by one method for all)")
        first = self.cases[: self.CHOOSING]
        chosen = max(
            self.WEIGHTS,
            key=lambda w: np.mean(
                [measure_images(c[0][f"{WAVELET} {w}"], c[1])["psnr_db"] for c in first if f"{WAVELET} {w}" in c[0]] or [0]
            ),
        )
        t.notes.append(f"{WAVELET}: weight {chosen}, chosen on {len(first)} other cases")
        rest = self.cases[self.CHOOSING :]
        values: dict[str, dict[str, list[float]]] = {}
        for found, truth, _ in rest:
            for system, image in found.items():
                if system.startswith(WAVELET) and system != f"{WAVELET} {chosen}":
                    continue
                name = WAVELET if system.startswith(WAVELET) else system
                for measure, v in measure_images(image, truth).items():
                    values.setdefault(measure, {}).setdefault(name, []).append(v)
        for measure, by in values.items():
            t.add("images", measure, IMAGE_MEASURES[measure][1], means(by, [p for _, _, p in rest]), IMAGE_MEASURES[measure][2])
        return t
