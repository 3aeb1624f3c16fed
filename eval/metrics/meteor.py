"""METEOR with exact and stemmed matches, without synonyms: no WordNet, no Java."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .metric import mean_of

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
"""Weight of precision, and the penalty on chunks: NLTK's values (Lavie and Agarwal, 2007)."""


@lru_cache(100_000)
def stem(word: str) -> str:
    """Porter's stem."""
    return _porter().stem(word)


@lru_cache(1)
def _porter():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def align(hypothesis: Sequence[str], reference: Sequence[str]) -> list[tuple[int, int]]:
    """Matched (place in hypothesis, place in reference), by hypothesis; words first, then stems, each from the end as NLTK does."""
    pairs: list[tuple[int, int]] = []
    left, right = list(enumerate(hypothesis)), list(enumerate(reference))
    for form in (str, stem):
        open_places = defaultdict(list)
        for j, word in right:
            open_places[form(word)].append(j)
        unmatched = []
        for i, word in reversed(left):
            places = open_places[form(word)]
            if places:
                pairs.append((i, places.pop()))
            else:
                unmatched.append((i, word))
        taken = {j for _, j in pairs}
        left, right = unmatched[::-1], [(j, w) for j, w in right if j not in taken]
    return sorted(pairs)


def single_meteor(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR of tokens against one reference's."""
    pairs = align(hypothesis, reference)
    if not pairs:
        return 0.0
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(pairs))
    precision, recall = len(pairs) / len(hypothesis), len(pairs) / len(reference)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - GAMMA * (chunks / len(pairs)) ** BETA)


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean over samples of the best METEOR over references; lower-case whitespace tokens."""
    return mean_of(
        np.array(
            [
                max(single_meteor(said.lower().split(), r.lower().split()) for r in refs)
                for said, refs in zip(predictions, references, strict=True)
            ]
        )
    )
