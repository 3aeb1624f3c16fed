"""Metrics of generated reports: the table, and one `evaluate.Metric` for all of them.

`evaluate.load("eval/metrics/report.py", "CIDEr-D")` works in a checkout, without the hub.
"""

from __future__ import annotations

from functools import partial

import datasets
import evaluate

from eval.metrics.facts import FACT_METRICS
from eval.metrics.meteor import meteor
from eval.metrics.metric import Metric, mean_score
from eval.metrics.ngram import (
    bleu_13a,
    bleu_13a_score,
    bleu_coco,
    bleu_coco_score,
    chrf,
    chrf_score,
    cider,
    ptb_like,
    rouge_l,
    rouge_l_coco,
    rouge_n,
)

_PTB = "lower-case Treebank tokens without punctuation"
_WORDS = "whitespace tokens, case and punctuation kept"
NGRAM_METRICS: tuple[Metric, ...] = (
    *(
        Metric(f"BLEU-{n} (13a)", f"sacrebleu, order {n}, 13a tokens, exponential smoothing", bleu_13a, bleu_13a_score(n), (0.0, 100.0))
        for n in range(1, 5)
    ),
    *(Metric(f"BLEU-{n} (COCO)", f"COCO captions, order {n}, {_WORDS}", bleu_coco, bleu_coco_score(n)) for n in range(1, 5)),
    Metric("BLEU-4 (COCO, PTB-like)", f"COCO captions, order 4, {_PTB}", partial(bleu_coco, tokenizer=ptb_like), bleu_coco_score(4)),
    Metric("ROUGE-1", "F1 of single words, rouge-score, no stemming", rouge_n(1), mean_score),
    Metric("ROUGE-2", "F1 of word pairs, rouge-score, no stemming", rouge_n(2), mean_score),
    Metric("ROUGE-L", "F1 of the longest common subsequence, rouge-score, no stemming", rouge_l, mean_score),
    Metric("ROUGE-L (COCO)", f"COCO captions, beta 1.2, {_WORDS}", rouge_l_coco, mean_score),
    Metric("METEOR", "exact and Porter-stem matches, no synonyms, alpha 0.9, beta 3, gamma 0.5, lower case", meteor, mean_score),
    Metric("CIDEr", f"cosine of tf-idf n-grams, {_WORDS}, times 10", partial(cider, penalised=False), mean_score, (0.0, 10.0)),
    Metric(
        "CIDEr-D", f"as COCO captions (there called CIDEr), {_WORDS}, times 10", partial(cider, penalised=True), mean_score, (0.0, 10.0)
    ),
    Metric("chrF", "sacrebleu, chrF2, characters to six", chrf, chrf_score, (0.0, 100.0)),
)
METRICS: dict[str, Metric] = {m.name: m for m in (*NGRAM_METRICS, *FACT_METRICS)}


class ReportMetric(evaluate.Metric):
    """Any of `METRICS`; its configuration name says which."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(f"expected a metric from {', '.join(METRICS)}, got {self.config_name!r}")
        metric = METRICS[self.config_name]
        text = datasets.Value("string")
        low, high = metric.range
        return evaluate.MetricInfo(
            description=f"{metric.definition}; {metric.direction} is better, range {low:g} to {high:g}.",
            citation="",
            inputs_description="predictions: texts; references: for each a list of texts",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """The figure of the corpus."""
        return {self.config_name: METRICS[self.config_name](predictions, references)}
