"""N-gram metrics of report generation: BLEU, ROUGE, CIDEr and chrF, by the definitions that their first implementations have.

Every public function takes predictions and the references of each, and gives statistics that add up over samples.
Counts of n-grams are sparse matrices (documents, n-grams). Shapes: N samples, G different n-grams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import sparse

from .metric import mean_of, ratio

ORDER = 4
Tokenizer = Callable[[str], list[str]]
TINY, SMALL = 1e-15, 1e-9
SIGMA = 6.0
"""Width of CIDEr-D's penalty on length, in bigrams."""
BETA = 1.2
"""Weight of recall in ROUGE-L by the COCO captions' definition."""
PTB_DROPPED = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        "-LRB-",
        "-RRB-",
        "-LCB-",
        "-RCB-",
        "-lrb-",
        "-rrb-",
        "-lcb-",
        "-rcb-",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
        '"',
    ]
)


def words(text: str) -> list[str]:
    """Whitespace tokens, case and punctuation kept."""
    return text.split()


def ptb_like(text: str) -> list[str]:
    """Lower case, Treebank tokens without punctuation: near what the COCO captions' Java tokenizer gives."""
    return [t for t in _treebank().tokenize(text.lower()) if t not in PTB_DROPPED]


@lru_cache(1)
def _treebank():
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def alphanumeric(text: str) -> list[str]:
    """Lower-case runs of letters and digits; on ASCII text those of Google's rouge-score without stemming."""
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(texts: Sequence[str], tokenizer: Tokenizer, order: int = ORDER) -> tuple[np.ndarray, list[sparse.csr_matrix]]:
    """Number of tokens of each text, and for each length from 1 to `order` the counts (texts, G) of its n-grams."""
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(t, len(vocabulary)) for t in tokenizer(text)] for text in texts]
    lengths = np.array([len(i) for i in ids], dtype=np.int64)
    first = np.array([k for i in ids for k in i], dtype=np.int64)
    text_of = np.repeat(np.arange(len(texts)), lengths)
    gram, counts = first, []
    for n in range(1, order + 1):
        if n > 1:
            gram = gram[:-1] * max(len(vocabulary), 1) + first[n - 1 :]
        whole = text_of[: len(gram)] == text_of[n - 1 :] if n > 1 else slice(None)
        names, gram = np.unique(gram, return_inverse=True)  # ranks, so that the next length cannot overflow
        counted = sparse.coo_matrix(
            (np.ones(len(gram[whole])), (text_of[: len(gram)][whole], gram[whole])), (len(texts), max(len(names), 1))
        )
        counts.append(counted.tocsr())
    return lengths, counts


def _together(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer, order: int = ORDER):
    """N-grams of predictions and references in one vocabulary, and (N, R) rows of the references, -1 where a sample has fewer."""
    flat = [*predictions, *(r for refs in references for r in refs)]
    rows = np.full((len(predictions), max(map(len, references), default=0)), -1)
    k = len(predictions)
    for i, refs in enumerate(references):
        rows[i, : len(refs)] = np.arange(k, k + len(refs))
        k += len(refs)
    return *ngrams(flat, tokenizer, order), rows


def _chosen(counts: sparse.csr_matrix, rows: np.ndarray) -> sparse.csr_matrix:
    """Rows of counts, empty where the row is -1."""
    keep = sparse.diags((rows >= 0).astype(float))
    return keep @ counts[np.maximum(rows, 0)]


def bleu_coco(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: Tokenizer = words) -> np.ndarray:
    """(N, 10): length, closest reference length, n-grams guessed (4) and right (4). See `bleu_coco_score`."""
    lengths, counts, rows = _together(predictions, references, tokenizer)
    n = len(predictions)
    own, others = lengths[:n], np.where(rows >= 0, lengths[np.maximum(rows, 0)], 10**9)
    closest = np.array([min((abs(int(r) - int(h)), int(r)) for r in row)[1] for h, row in zip(own, others, strict=True)])
    columns = [own, closest, *(np.maximum(own - k, 0) for k in range(ORDER))]
    for count in counts:
        most = _chosen(count, rows[:, 0])
        for column in rows.T[1:]:
            most = most.maximum(_chosen(count, column))
        columns.append(np.asarray(count[:n].minimum(most).sum(1)).ravel())
    return np.stack(columns, 1).astype(float)


def bleu_coco_score(order: int) -> Callable[[np.ndarray], np.ndarray]:
    """BLEU of an order from summed statistics, as pycocoevalcap computes it for a corpus (closest reference length)."""

    def score(sums: np.ndarray) -> np.ndarray:
        length, reference, guessed, right = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
        product = ((right + TINY) / (guessed + SMALL))[..., :order].prod(-1) ** (1 / order)
        short = (length + TINY) / (reference + SMALL)
        return product * np.where(short < 1, np.exp(1 - 1 / np.minimum(short, 1)), 1.0)

    return score


def bleu_13a(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, 10): statistics of sacrebleu with its 13a tokenizer. See `bleu_13a_score`."""
    from sacrebleu.metrics import BLEU

    return np.array(BLEU()._extract_corpus_statistics(list(predictions), _streams(references)), dtype=float).reshape(len(predictions), 10)


def bleu_13a_score(order: int) -> Callable[[np.ndarray], np.ndarray]:
    """BLEU from 0 to 100 of an order from summed statistics: sacrebleu's corpus score, exponential smoothing."""

    def score(sums: np.ndarray) -> np.ndarray:
        length, reference, right, total = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + order], sums[..., 6 : 6 + order]
        # The k-th order without a match counts 1 / 2^k.
        smooth = np.where(right > 0, right, 1 / 2.0 ** np.cumsum(right == 0, -1))
        precision = ratio(smooth, total)
        log = np.log(np.maximum(precision, 1e-300)).mean(-1)
        short = np.where(length < reference, np.exp(1 - ratio(reference, length, otherwise=np.inf)), 1.0)
        seen = (right[..., 0] > 0) & (total > 0).all(-1)
        return np.where(seen, 100 * short * np.exp(log), 0.0)

    return score


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, 18): statistics of sacrebleu's chrF2 (characters to six, no words). See `chrf_score`."""
    from sacrebleu.metrics import CHRF

    return np.array(CHRF()._extract_corpus_statistics(list(predictions), _streams(references)), dtype=float).reshape(len(predictions), 18)


def chrf_score(sums: np.ndarray) -> np.ndarray:
    """chrF2 from 0 to 100 from summed statistics, averaged over the orders that both sides have."""
    said, true, match = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (said > 0) & (true > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision, recall = (np.where(both, ratio(match, x), 0.0).sum(-1) / orders for x in (said, true))
    return 100 * ratio(5 * precision * recall, 4 * precision + recall)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the first of every sample, the second of every sample, ..."""
    return [[refs[k] if k < len(refs) else None for refs in references] for k in range(max(map(len, references), default=1))]


def sacrebleu_signatures() -> dict[str, str]:
    """Signatures of sacrebleu's metrics as they are used here; the number of references is the data's."""
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in (("BLEU-13a", BLEU()), ("chrF", CHRF())):
        metric.corpus_score(["a"], [["a"]])
        found[name] = str(metric.get_signature()).replace("nrefs:1|", "")
    return found


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of one integer (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for k, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << k
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hit = row & places.get(token, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def rouge_l_coco(predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: Tokenizer = words) -> np.ndarray:
    """Mean over samples of pycocoevalcap's ROUGE-L: best precision and best recall over references, recall weighted by `BETA`."""
    values = []
    for said, refs in zip(predictions, references, strict=True):
        hypothesis = tokenizer(said)
        truths = [tokenizer(r) for r in refs]
        common = [longest_common(hypothesis, t) for t in truths]
        precision = max(common) / len(hypothesis) if hypothesis else 0.0
        recall = max(c / len(t) if t else 0.0 for c, t in zip(common, truths, strict=True))
        values.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0)
    return mean_of(np.array(values))


def rouge_n(order: int) -> Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]:
    """Mean over samples of the best F1 of n-grams over references, by rouge-score's definition without stemming."""

    def statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        _, counts, rows = _together(predictions, references, alphanumeric, order)
        count, n = counts[order - 1], len(predictions)
        best = np.zeros(n)
        total = np.asarray(count[:n].sum(1)).ravel()
        for column in rows.T:
            truth = _chosen(count, column)
            common = np.asarray(count[:n].minimum(truth).sum(1)).ravel()
            best = np.maximum(best, ratio(2 * common, total + np.asarray(truth.sum(1)).ravel()))
        return mean_of(best)

    return statistics


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean over samples of the best F1 of the longest common subsequence, by rouge-score's definition without stemming."""
    values = []
    for said, refs in zip(predictions, references, strict=True):
        hypothesis = alphanumeric(said)
        truths = [alphanumeric(r) for r in refs]
        values.append(max(2 * longest_common(hypothesis, t) / max(len(hypothesis) + len(t), 1) for t in truths))
    return mean_of(np.array(values))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]], *, penalised: bool, tokenizer: Tokenizer = words) -> np.ndarray:
    """Mean over samples of CIDEr (Vedantam et al., CVPR 2015), times ten.

    Document frequencies are those of these references and stay as they are when samples are drawn again.

    Args:
        penalised: CIDEr-D: counts clipped to the reference's, and a Gaussian penalty on length. It is what pycocoevalcap
            calls CIDEr.
    """
    lengths, counts, rows = _together(predictions, references, tokenizer)
    n = len(predictions)
    bigrams = np.maximum(lengths - 1, 0)
    score = np.zeros(n)
    for count in counts:
        seen = sparse.csr_matrix((n, count.shape[1]))
        for column in rows.T:
            seen = seen.maximum(_chosen(count, column).sign())
        frequency = np.asarray(seen.sum(0)).ravel()
        weight = sparse.diags(np.log(n) - np.log(np.maximum(frequency, 1.0)))
        vectors = (count @ weight).tocsr()
        norm = np.sqrt(np.asarray(vectors.multiply(vectors).sum(1)).ravel())
        said = vectors[:n]
        for column in rows.T:
            truth = _chosen(vectors, column)
            common = said.minimum(truth) if penalised else said
            dot = np.asarray(common.multiply(truth).sum(1)).ravel()
            found = ratio(dot, norm[:n] * norm[np.maximum(column, 0)] * (column >= 0))
            if penalised:
                found = found * np.exp(-((bigrams[:n] - bigrams[np.maximum(column, 0)]) ** 2) / (2 * SIGMA**2))
            score += found
    return mean_of(10 * score / ORDER / np.array([max(len(r), 1) for r in references]))
