"""Metrics of reports: published digits, the first implementations' values, intervals, comparison, and input that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import evaluate
import numpy as np
import pytest
from nltk.translate.meteor_score import meteor_score

from eval.__main__ import main
from eval.metrics.meteor import meteor
from eval.metrics.metric import mean_of, mean_score
from eval.metrics.ngram import bleu_13a, bleu_13a_score, bleu_coco, bleu_coco_score, chrf, chrf_score, cider, rouge_l, rouge_l_coco, rouge_n
from eval.metrics.report import METRICS, NGRAM_METRICS
from eval.reports import read_texts
from eval.resampling import compare, estimate, grouped, holm, mean_estimate, wilson
from eval.speed import drawn_reports

VECTORS = json.loads((Path(__file__).parent / "golden" / "vectors.json").read_text())


def pairs(seed, count, most_references=3):
    """Drawn texts with one to three references, punctuation, case and repeated words."""
    rng = np.random.default_rng(seed)
    common = [
        "the",
        "a",
        "of",
        "left",
        "right",
        "mass",
        "in",
        "and",
        "Lesion",
        "lesion,",
        "lesion.",
        "4.2",
        "cm",
        "oedema-like",
        "(T2)",
        "is",
        "not",
    ]
    words = np.array([*common, *(f"w{k}" for k in range(40))])

    def text(like=None):
        n = int(rng.integers(1, 30))
        own = words[rng.integers(0, len(words), n)]
        if like is not None:
            kept = np.array(like.split())[: len(own)]
            own[: len(kept)] = np.where(rng.random(len(kept)) < 0.6, kept, own[: len(kept)])
        return " ".join(own)

    references = [[text() for _ in range(rng.integers(1, most_references + 1))] for _ in range(count)]
    return [text(like=r[0]) for r in references], references


def test_published_digits():
    v = VECTORS["sacrebleu_readme"]
    references = [list(r) for r in zip(*v["references"], strict=True)]
    assert float(bleu_13a_score(4)(bleu_13a(v["hypotheses"], references).sum(0))) == pytest.approx(v["expected"]["bleu_13a"], abs=1e-6)
    v = VECTORS["radeval_regression"]
    references = [[r] for r in v["references"]]
    default, each = v["expected"]["default"], v["expected"]["per_sample"]
    bleu = bleu_coco(v["hypotheses"], references)
    assert float(bleu_coco_score(4)(bleu.sum(0))) == pytest.approx(default["bleu"], abs=5e-5)
    assert bleu_coco_score(4)(bleu) == pytest.approx(each["bleu"], rel=1e-6, abs=1e-18)
    for order in (1, 2, 3):
        assert float(bleu_coco_score(order)(bleu.sum(0))) == pytest.approx(v["expected"]["detailed"][f"bleu_{order}"], abs=5e-5)
    for name, statistics in (("rouge1", rouge_n(1)), ("rouge2", rouge_n(2)), ("rougeL", rouge_l)):
        found = statistics(v["hypotheses"], references)
        assert float(mean_score(found.sum(0))) == pytest.approx(default[name], abs=5e-5)
        assert mean_score(found) == pytest.approx(each[name], abs=1e-9)


def test_as_pycocoevalcap_on_500_pairs():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, true = pairs(0, 500)
    results, references = {i: [s] for i, s in enumerate(said)}, dict(enumerate(true))
    bleu = bleu_coco(said, true)
    corpus, each = Bleu(4).compute_score(references, results, verbose=0)
    for order in range(1, 5):
        assert float(bleu_coco_score(order)(bleu.sum(0))) == pytest.approx(corpus[order - 1], abs=1e-6)
        assert bleu_coco_score(order)(bleu) == pytest.approx(each[order - 1], abs=1e-6)
    for scorer, found in ((Rouge(), rouge_l_coco(said, true)), (Cider(), cider(said, true, penalised=True))):
        value, values = scorer.compute_score(references, results)
        assert mean_score(found) == pytest.approx(values, abs=1e-6)
        assert float(mean_score(found.sum(0))) == pytest.approx(value, abs=1e-6)


def test_as_sacrebleu_rouge_score_and_nltk():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    said, true = pairs(1, 200, most_references=1)
    streams = [[r[0] for r in true]]
    for order in range(1, 5):
        expected = BLEU(max_ngram_order=order).corpus_score(said, streams).score
        assert float(bleu_13a_score(order)(bleu_13a(said, true).sum(0))) == pytest.approx(expected, abs=1e-9)
    short = [["a mass"], ["b"]], ["no mass", "b c"]  # no match of higher orders: smoothed
    for order in range(1, 5):
        expected = BLEU(max_ngram_order=order).corpus_score(short[1], [[r[0] for r in short[0]]]).score
        assert float(bleu_13a_score(order)(bleu_13a(short[1], short[0]).sum(0))) == pytest.approx(expected, abs=1e-9)
    assert float(chrf_score(chrf(said, true).sum(0))) == pytest.approx(CHRF().corpus_score(said, streams).score, abs=1e-9)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for name, statistics in (("rouge1", rouge_n(1)), ("rouge2", rouge_n(2)), ("rougeL", rouge_l)):
        expected = [scorer.score(t[0], s)[name].fmeasure for s, t in zip(said, true, strict=True)]
        assert mean_score(statistics(said, true)) == pytest.approx(expected, abs=1e-9)

    class NoSynonyms:
        @staticmethod
        def synsets(word):
            return []

    said, true = pairs(2, 100)
    expected = [
        meteor_score([r.lower().split() for r in t], s.lower().split(), wordnet=NoSynonyms) for s, t in zip(said, true, strict=True)
    ]
    assert mean_score(meteor(said, true)) == pytest.approx(expected, abs=1e-9)


def test_cider_without_penalty_is_the_cosine_of_tf_idf():
    said, true = ["a b a", "c d"], [["a b c"], ["c d"]]
    idf = {"a": np.log(2), "b": np.log(2), "c": 0.0, "d": np.log(2)}
    one = np.array([2 * idf["a"], idf["b"]]) @ np.array([idf["a"], idf["b"]])
    one /= np.hypot(2 * idf["a"], idf["b"]) * np.hypot(idf["a"], idf["b"])
    two = 1 / np.hypot(1, 1) / np.hypot(1, 1)  # "a b" of {"a b", "b a"} and {"a b", "b c"}, all of one weight
    assert mean_score(cider(said, true, penalised=False))[0] == pytest.approx(10 * (one + two) / 4)
    assert mean_score(cider(said, true, penalised=False))[1] == pytest.approx(10 * 2 / 4)


@pytest.mark.parametrize("name", METRICS)
def test_identity_order_and_odd_texts(name):
    metric = METRICS[name]
    texts = [
        "No mass. A 3 mm infarct lies in the left pons.",
        "Grey matter is darker than white matter on T1.",
        "Œdème, ödem: ca. 2 cm; 脳 MRI ✓.",
    ]
    references = [[t] for t in texts]
    best = metric(texts, references)
    worse = metric(["", "x y z", texts[0]], references)
    assert best >= worse if metric.higher_is_better else best <= worse
    low, high = metric.range
    assert low - 1e-9 <= worse <= high + 1e-9
    assert low - 1e-9 <= best <= high + 1e-9
    if metric.higher_is_better and not name.startswith(("METEOR", "CIDEr")):
        assert best == pytest.approx(high, abs=1e-6 * high)
    said = [texts[1], texts[0], "a mass"]
    assert metric(said, references) == pytest.approx(metric(said[::-1], references[::-1]), abs=1e-12)
    long = " ".join(f"word{k % 700}" for k in range(10_000))
    assert np.isfinite(metric([long, ""], [[long], ["", "a"]]))


def test_metrics_load_from_the_checkout_without_the_hub(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    loaded = evaluate.load("eval/metrics/report.py", "CIDEr-D", keep_in_memory=True)
    said, true = pairs(3, 20)
    assert loaded.compute(predictions=said, references=true)["CIDEr-D"] == pytest.approx(METRICS["CIDEr-D"](said, true))
    assert "higher is better" in loaded.description


def test_every_metric_says_its_direction_range_and_definition():
    for metric in METRICS.values():
        assert metric.direction in ("higher", "lower")
        assert metric.range[0] < metric.range[1]
        assert len(metric.definition) > 10


def test_intervals():
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(400):
        e = mean_estimate(rng.normal(0, 1, 100).tolist(), draws=500, seed=k)
        hits += e.low <= 0 <= e.high
    assert 0.91 * 400 <= hits <= 0.98 * 400
    values = rng.normal(0, 1, 20).tolist()
    patients = [f"p{k}" for k in range(20) for _ in range(10)]
    repeated = [v for v in values for _ in range(10)]
    alone, by_patient, by_sample = mean_estimate(values), mean_estimate(repeated, patients), mean_estimate(repeated)
    assert by_patient.high - by_patient.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert by_sample.high - by_sample.low < 0.6 * (by_patient.high - by_patient.low)
    assert np.isnan(mean_estimate([float("nan")]).value)
    assert mean_estimate([1.0, float("nan"), 3.0]).n == 2
    assert grouped(np.ones((4, 2)), ["b", "a", "b", "a"]).tolist() == [[2, 2], [2, 2]]
    bleu = METRICS["BLEU-4 (COCO)"]
    said, true = pairs(4, 100)
    e = estimate(bleu, bleu.statistics(said, true))
    assert e.low < e.value < e.high


def test_comparison_and_holm():
    said, true = pairs(5, 120)
    better = [t[0] if k % 3 == 0 else s for k, (s, t) in enumerate(zip(said, true, strict=True))]
    metric = METRICS["ROUGE-L"]
    a, b = metric.statistics(said, true), metric.statistics(better, true)
    found = compare(metric, a, b, shuffles=2000)
    assert found.difference.value > 0
    assert found.difference.low > 0
    assert max(found.p_bootstrap, found.p_randomisation) < 0.01
    same = compare(metric, a, a, shuffles=500)
    assert same.p_randomisation == pytest.approx(1.0)
    assert same.p_bootstrap == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    drawn = [[mean_of(rng.normal(size=40)) for _ in range(2)] for _ in range(100)]
    null = [compare(metric, a, b, draws=200, shuffles=200, seed=k).p_randomisation for k, (a, b) in enumerate(drawn)]
    assert 0 <= sum(p < 0.05 for p in null) <= 12
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.01, float("nan"), 0.04])[::2] == pytest.approx([0.02, 0.04])
    few = compare(metric, a[:5], b[:5], ["one"] * 5, shuffles=100)
    assert np.isnan(few.p_bootstrap)
    assert few.p_randomisation > 0.3
    assert np.isnan(mean_estimate([1.0, 2.0], ["one", "one"]).low)
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=2e-3)


def write_lines(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def words_in_common(predictions, references):
    """An example of a scorer."""
    return [len(set(p.split()) & set(r[0].split())) for p, r in zip(predictions, references, strict=True)]


def test_report_and_compare_commands(tmp_path, capsys):
    rows = [
        {"id": k, "prediction": "No mass in the left lobe.", "references": ["No mass.", "A mass."], "patient": f"p{k // 2}"}
        for k in range(4)
    ]
    a = write_lines(tmp_path / "a.jsonl", *rows)
    scorer = f"{__name__}:words_in_common"
    assert main(["report", "--predictions", str(a), "--scorer", scorer, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["patients"] == 2
    assert results["metrics"][scorer]["value"] == 1
    assert set(METRICS) <= set(results["metrics"])
    assert results["facts"]["all"]["low"] <= results["facts"]["all"]["f1"] <= results["facts"]["all"]["high"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "tok:13a" in text
    assert "no --encoder FOLDER was given" in text
    assert all(f"| {m.name} | " in text for m in METRICS.values())
    b = tmp_path / "b.csv"
    b.write_text("id,prediction\n" + "".join(f'{k},"A mass, in the lobe."\n' for k in (3, 2, 1, 0)))
    truth = write_lines(tmp_path / "r.jsonl", *({"id": k, "reference": "A mass.", "patient": f"p{k // 2}"} for k in range(4)))
    assert read_texts(b, truth).references == (("A mass.",),) * 4
    assert main(["compare", str(a), str(b), "--references", str(truth), "--out", str(tmp_path / "c")]) == 0
    tests = json.loads((tmp_path / "c" / "results.json").read_text())["tests"]
    assert len(tests) == len(METRICS)
    assert all(t["p_randomisation_holm"] >= t["p_randomisation"] for t in tests)
    assert all(t["p_bootstrap"] is None for t in tests)  # of two patients
    assert "B - A" in capsys.readouterr().out


BAD = {
    "no such file": ([], "that is none"),
    "invalid JSON": (['{"id": 1, "prediction": "a", "reference": "b"}', "{oops"], "line 2"),
    "no object": (["[1]"], "line 1"),
    "no id": ([{"prediction": "a", "reference": "b"}], "'id'"),
    "doubled id": ([{"id": 1, "prediction": "a", "reference": "b"}] * 2, "'1' again on line 2"),
    "no prediction": ([{"id": 1, "reference": "b"}], "'prediction'"),
    "prediction is a number": ([{"id": 1, "prediction": 5, "reference": "b"}], "'prediction'"),
    "no reference": ([{"id": 1, "prediction": "a"}], "'reference'"),
    "references of another kind": ([{"id": 1, "prediction": "a", "references": [3]}], "a list of texts"),
    "patient on one line": (
        [{"id": k, "prediction": "a", "reference": "b", **({"patient": "x"} if k else {})} for k in range(2)],
        "'patient'",
    ),
    "empty": ([""], "at least one line"),
    "null for a reference": ([{"id": 1, "prediction": "a", "reference": None}], "'reference'"),
    "an endless number": (['{"id": ' + "9" * 5000 + ', "prediction": "a"}'], "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_input_that_cannot_be_used(name, tmp_path, capsys):
    rows, said = BAD[name]
    path = write_lines(tmp_path / "p.jsonl", *rows) if rows else tmp_path / "p.jsonl"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("kept")
    assert main(["report", "--predictions", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected")
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "out" / "results.json").read_text() == "kept"
    assert os.listdir(tmp_path / "out") == ["results.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,prediction,reference\n1,No mass, no bleed,No mass.\n", "3 cells, got 4 on line 2"),
        ("id,prediction,reference\n1,No mass\n", "3 cells, got 2 on line 2"),
        ('id,prediction,reference\n1,"No mass,No mass.\n2,a,b\n', "damaged line"),
        ("id,prediction,prediction\n1,a,b\n", "each column once"),
    ],
)
def test_csv_that_is_not_whole(text, said, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_texts(tmp_path / "p.csv")


def test_csv_keeps_lines_inside_a_cell_and_either_column_of_references(tmp_path):
    (tmp_path / "p.csv").write_text('id,prediction,reference,references\n7,"one\u2028two\nthree",truth,\n8,,truth,\n')
    found = read_texts(tmp_path / "p.csv")
    assert found.predictions == ("one\u2028two\nthree", "")
    assert found.references == (("truth",), ("truth",))
    found = read_texts(write_lines(tmp_path / "p.jsonl", *({"id": k, "prediction": "a", "reference": "b", "patient": k} for k in range(3))))
    assert found.patients == ("0", "1", "2")


def test_files_that_do_not_fit(tmp_path, capsys):
    a = write_lines(tmp_path / "a.jsonl", *({"id": k, "prediction": "a", "reference": "b"} for k in (1, 2)))
    b = write_lines(tmp_path / "b.jsonl", {"id": 1, "reference": "b"}, {"id": 3, "reference": "b"})
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    for arguments, said in (
        (["report", "--predictions", a, "--references", b], "alone, the first '2'"),
        (["report", "--predictions", tmp_path / "c.jsonl"], "UTF-8"),
        (["report", "--predictions", a, "--scorer", "json:nothing"], "--scorer module:function"),
        (["report", "--predictions", a, "--scorer", "builtins:max"], "numbers from 'builtins:max'"),
        (["report", "--predictions", a, "--encoder", tmp_path], "save_pretrained"),
        (["compare", a], "two or more"),
    ):
        assert main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_local_encoder_gives_bertscore(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from eval.metrics.embedding import Encoder

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "no", "mass", "lesion", "left", "right"]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64).save_pretrained(tmp_path)
    BertModel(
        BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.bertscore("left mass", "left mass") == pytest.approx(1.0, abs=1e-5)
    assert encoder.similarity("left mass", "left mass") == pytest.approx(1.0, abs=1e-5)
    assert encoder.bertscore("no lesion", "left mass") < 0.999
    a, b = encoder.tokens("no lesion"), encoder.tokens("left mass right")
    precision, recall = (a @ b.T).max(1).values.mean(), (a @ b.T).max(0).values.mean()
    assert encoder.bertscore("no lesion", "left mass right") == pytest.approx(
        float(2 * precision * recall / (precision + recall)), abs=1e-6
    )
    assert encoder.bertscore("", "left") == 0.0
    assert np.isfinite(encoder.bertscore(" ".join(["mass"] * 10_000), "mass"))
    for metric in encoder.metrics():
        assert metric(["left mass"], [["right mass", "left mass"]]) == pytest.approx(1.0, abs=1e-5)


def test_drawn_reports_share_words_with_their_references():
    said, true = drawn_reports(0, 20, 90)
    assert {len(s.split()) for s in said} == {90}
    assert 0.3 < METRICS["ROUGE-1"](said, true) < 0.95
    assert len(NGRAM_METRICS) > 10
