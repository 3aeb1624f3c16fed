"""Seconds of report metrics beside pycocoevalcap's, in one process and taking turns, and of a bootstrap of all n-gram metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .metrics.metric import mean_score
from .metrics.ngram import bleu_coco, bleu_coco_score, cider, rouge_l_coco
from .metrics.report import NGRAM_METRICS
from .resampling import estimate

REPORTS, WORDS, VOCABULARY, TURNS = 2000, 90, 1500, 3


def drawn_reports(seed: int, count: int = REPORTS, words: int = WORDS) -> tuple[list[str], list[list[str]]]:
    """Predictions and references of drawn words, as frequent as in a language (Zipf); half of a prediction's are its reference's."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, VOCABULARY + 1)
    names = np.array([f"word{k}" for k in range(VOCABULARY)])
    true = names[rng.choice(VOCABULARY, (count, words), p=share / share.sum())]
    other = names[rng.choice(VOCABULARY, (count, words), p=share / share.sum())]
    said = np.where(np.repeat(rng.random((count, words // 5)) < 0.5, 5, axis=1), true, other)
    return [" ".join(s) for s in said], [[" ".join(t)] for t in true]


def benchmark() -> dict[str, Any]:
    """Median seconds of ours and theirs, and their ratio.

    Raises:
        ValueError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise ValueError("expected pycocoevalcap to measure against, got none; pip install pycocoevalcap") from None
    said, true = drawn_reports(0)
    results, references = {i: [s] for i, s in enumerate(said)}, dict(enumerate(true))
    pairs: dict[str, tuple[Callable[[], float], Callable[[], Any]]] = {
        "BLEU": (
            lambda: float(bleu_coco_score(4)(bleu_coco(said, true).sum(0))),
            lambda: Bleu(4).compute_score(references, results, verbose=0)[0][3],
        ),
        "ROUGE-L": (lambda: float(mean_score(rouge_l_coco(said, true).sum(0))), lambda: Rouge().compute_score(references, results)[0]),
        "CIDEr": (
            lambda: float(mean_score(cider(said, true, penalised=True).sum(0))),
            lambda: Cider().compute_score(references, results)[0],
        ),
    }
    out: dict[str, Any] = {"reports": REPORTS, "words": WORDS}
    for name, (ours, theirs) in pairs.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        values = [0.0, 0.0]
        for _ in range(TURNS):
            for k, run in enumerate((ours, theirs)):
                tick = time.perf_counter()
                values[k] = float(run())
                seconds[k].append(time.perf_counter() - tick)
        a, b = (float(np.median(s)) for s in seconds)
        out[name] = {"seconds": round(a, 3), "pycocoevalcap_seconds": round(b, 3), "times_as_fast": round(b / a, 1), "values": values}
    tick = time.perf_counter()
    for metric in NGRAM_METRICS:
        estimate(metric, metric.statistics(said, true))
    out["all n-gram metrics with 1000 bootstrap draws, seconds"] = round(time.perf_counter() - tick, 1)
    return out
