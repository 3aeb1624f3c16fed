"""Facts of reports: the frozen annotated sentences, what contradicts and what is unsupported, and the ranking of errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.metrics.extraction import extract
from eval.metrics.facts import FACT_METRICS, KINDS, contradictions, plainly, score_gold
from eval.metrics.report import METRICS
from eval.perturbation import ERRORS, edit_length, expand, parse, rank, trials

GOLD = Path(__file__).parent / "golden" / "facts.jsonl"


def test_annotated_sentences():
    rows = [json.loads(line) for line in GOLD.read_text().splitlines()]
    assert len(rows) == 120
    found = score_gold(rows)
    assert found["all"]["f1"] >= 0.90
    assert found["negation"]["f1"] >= 0.95
    assert found["side"]["f1"] >= 0.95
    assert {k for k in KINDS if k not in ("severity",)} <= set(found)
    broken = [{**row, "findings": [{**f, "negated": not f["negated"]} for f in row["findings"]]} for row in rows]
    assert score_gold(broken)["negation"]["f1"] < 0.1


def test_facts_of_a_sentence():
    facts = extract(
        "On axial FLAIR there are two hyperintense lesions in the left frontal lobe, the largest 1.2 x 0.8 cm, without mass effect."
    )
    assert (facts.sequences, facts.planes) == (("FLAIR",), ("axial",))
    lesion, effect = facts.findings
    assert (lesion.type, lesion.side, lesion.location, lesion.size_mm, lesion.number) == (
        "lesion",
        "left",
        ("frontal lobe",),
        (12.0, 8.0),
        2,
    )
    assert lesion.signal == (("FLAIR", "hyperintense"),)
    assert (effect.type, effect.negated) == ("mass effect", True)
    again = extract("There is a mass in the right pons. It measures 14 mm.")
    assert [f.type for f in again.findings] == ["mass", "mass"]
    assert again.findings[1].size_mm == (14.0,)
    # What a study covers is anatomy in any words; the technique is no finding of the brain.
    shown = ("The study covers the thalami.", "Seen are the thalami.", "The thalami are shown.", "Included are the thalami.")
    assert {extract(s).structures for s in shown} == {extract(shown[0]).structures}
    assert [(s.name, s.state) for s in extract(shown[0]).structures] == [("thalamus", "visible")]
    assert not any(extract(s).findings for s in (*shown, "Axial T1-weighted brain MRI.", "A FLAIR MRI of the brain in axial slices."))
    assert extract("") == extract("   ")
    assert extract("Left " + "-" * 300 + " x frontal lobe lesion.").findings  # a line of hyphens takes no time


@pytest.mark.parametrize(
    ("said", "true", "wrong", "unsupported"),
    [
        ("There is an infarct in the left pons.", "There is an infarct in the left pons.", 0, 0),
        ("There is no infarct.", "There is an infarct in the left pons.", 1, 0),
        ("There is an infarct in the right pons.", "There is an infarct in the left pons.", 1, 0),
        ("A 20 mm mass in the left frontal lobe.", "A 10 mm mass in the left frontal lobe.", 1, 0),
        ("A 11 mm mass in the left frontal lobe.", "A 10 mm mass in the left frontal lobe.", 0, 0),
        ("T2 shows a mass.", "FLAIR shows a mass.", 1, 0),
        ("Axial T1-weighted MRI.", "Axial contrast-enhanced T1-weighted MRI.", 0, 0),
        ("Axial contrast-enhanced T1-weighted MRI.", "Axial T1-weighted MRI.", 1, 0),
        ("There is a mass. There is a haemorrhage.", "There is a mass.", 0, 1),
        ("No haemorrhage.", "There is a mass.", 0, 0),
        ("There is a metastasis in the left thalamus.", "There is a lesion in the left thalamus.", 0, 0),
    ],
)
def test_contradictions_and_unsupported(said, true, wrong, unsupported):
    assert contradictions(plainly(extract(said)), plainly(extract(true))) == (wrong, unsupported)


def test_score_falls_with_every_error():
    reference = ["Axial FLAIR MRI. There is a mild 12 mm lesion in the left frontal lobe. There is no haemorrhage."]
    f1 = METRICS["fact F1"]
    assert f1(reference, [reference]) == 1.0
    for old, new in (
        ("left", "right"),
        ("12", "30"),
        ("no", "a"),
        ("FLAIR", "T2"),
        ("mild", "severe"),
        (" There is no haemorrhage.", ""),
        ("Axial", "Coronal"),
    ):
        assert f1([reference[0].replace(old, new)], [reference]) < 1.0, new
    assert METRICS["contradictions"]([reference[0].replace("left", "right")], [reference]) > 0
    assert [m.direction for m in FACT_METRICS] == ["higher"] * 3 + ["lower"] * 2


def test_markup_of_the_perturbation_reports():
    parts = parse("A {mass~tumour} in the {left|side=right} lobe. {|invented=A cyst.} {No edema.|dropped=}")
    assert expand(parts) == "A mass in the left lobe. No edema."
    assert [p.error for p in parts if not isinstance(p, str)] == [None, "side", "invented", "dropped"]
    assert edit_length("a b c d", "a x c") == 2
    cases = trials()
    assert {t.error for t in cases} == set(ERRORS)
    assert len({t.report for t in cases}) == 30
    assert sum(t.lengths[0] == t.lengths[1] for t in cases) > 0.9 * len(cases)
    assert all(t.wrong != t.reference != t.harmless for t in cases)
    assert not any(c in t.reference + t.wrong + t.harmless for t in cases for c in "{}|~")


def test_the_fact_score_ranks_errors_below_paraphrases(tmp_path, capsys):
    table = rank([METRICS["fact F1"], METRICS["BLEU-4 (COCO)"]], trials())
    assert table["fact F1"]["all"].value >= 0.95
    assert table["BLEU-4 (COCO)"]["all"].value < 0.5
    assert main(["perturb", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(f"| {m} |" in text for m in METRICS)
    assert (tmp_path / "perturbation.png").stat().st_size > 10_000
