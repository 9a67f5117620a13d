"""Published metrics, each with a 95 % interval by the bootstrap over examples.

Every metric here is a function of sums over examples: counts of a confusion matrix, of matching
n-grams, of nats. So all of them are resampled in one way, as sacrebleu does it for BLEU
(https://aclanthology.org/W04-3250): examples are drawn with replacement, their sums added up, and
the metric computed from these.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptrt.errors import DataError, DependencyError

Float = NDArray[np.float64]

# Modules whose definitions count.
SACREBLEU = "sacrebleu.metrics"
ROUGE, ROUGE_WORDS = "rouge_score.rouge_scorer", "rouge_score.tokenizers"

_RESAMPLES = 1000
_SEED = 12345  # that of sacrebleu: the draws are the same
_BINS = 15  # of confidence, as in https://arxiv.org/abs/1706.04599


@dataclass(frozen=True)
class Scored:
    """A metric over `count` examples, in percent unless it is a perplexity; `low` and `high` hold
    95 % of what it is over resamples of the examples."""

    name: str
    value: float
    low: float
    high: float
    count: int


def accuracy(found: Sequence[str], wanted: Sequence[str]) -> Scored:
    """The share of answers that are right."""
    right = np.array([a == b for a, b in _pairs(found, wanted)], np.float64)
    return _mean("accuracy", right)


def macro_f1(found: Sequence[str], wanted: Sequence[str]) -> Scored:
    """The mean of F1 over the labels that occur, found or wanted, each counting alike."""
    pairs = _pairs(found, wanted)
    labels = {label: n for n, label in enumerate(sorted({*found, *wanted}))}
    counts = np.zeros((3, len(pairs), len(labels)))  # right, found, wanted
    for n, (a, b) in enumerate(pairs):
        counts[0, n, labels[a]] = a == b
        counts[1, n, labels[a]] = counts[2, n, labels[b]] = 1

    def score(sums: Float) -> float:
        right, given, true = sums.reshape(3, -1)
        occurs = given + true > 0
        return 100 * float(np.mean(2 * right[occurs] / (given + true)[occurs]))

    return _scored("macro-F1", np.concatenate(list(counts), axis=1), score)


def calibration_error(confidence: Sequence[float], right: Sequence[bool]) -> Scored:
    """Expected calibration error over 15 bins of equal width: how far the probability that a model
    gives its answer is from how often such answers are right, in percentage points
    (https://arxiv.org/abs/1706.04599)."""
    pairs = _pairs(confidence, right)
    gaps = np.zeros((len(pairs), _BINS))
    for n, (probability, is_right) in enumerate(pairs):
        # A bin holds its upper bound, not its lower one.
        gaps[n, min(max(math.ceil(probability * _BINS) - 1, 0), _BINS - 1)] = is_right - probability

    def score(sums: Float) -> float:
        return 100 * float(np.abs(sums).sum()) / len(pairs)

    return _scored("calibration error", gaps, score)


def bleu(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> Scored:
    """Corpus BLEU by sacrebleu (https://aclanthology.org/W18-6319), tokenized as mteval-v13a does,
    against one reference or more. Raises DependencyError."""
    return _corpus("BLEU", imported(SACREBLEU).BLEU(), found, wanted)


def chrf(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> Scored:
    """Corpus chrF2 by sacrebleu: n-grams of 1 to 6 characters, recall counting twice
    (https://aclanthology.org/W15-3049). Raises DependencyError."""
    return _corpus("chrF", imported(SACREBLEU).CHRF(), found, wanted)


def rouge(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> list[Scored]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by rouge-score, words stemmed
    (https://aclanthology.org/W04-1013).

    Of several references of an example that with the highest ROUGE-1 counts, for all three, as in
    the evaluation of SciTLDR (https://github.com/allenai/scitldr). Only ASCII letters and digits
    are words. Raises DependencyError.
    """
    kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    tokenizer = imported(ROUGE_WORDS).DefaultTokenizer(use_stemmer=True)
    scorer = imported(ROUGE).RougeScorer(list(kinds), tokenizer=tokenizer)
    best = []
    for text, references in _pairs(found, wanted):
        scores = (scorer.score(reference, text) for reference in references)
        each = ([score[kind].fmeasure for kind in kinds] for score in scores)
        best.append(max(each, key=lambda measures: measures[0]))
    columns = np.array(best, np.float64).T
    return [_mean(name, column) for name, column in zip(kinds.values(), columns, strict=True)]


def answer_perplexity(nll: Sequence[float], tokens: Sequence[int]) -> Scored:
    """The exponential of the mean nats a token, over all tokens of all answers: `nll` are the sums
    over each answer, `tokens` their counts. 1 is certainty; it is no percentage."""
    sums = np.array(_pairs(nll, tokens), np.float64)

    return _scored("perplexity", sums, lambda total: perplexity(float(total[0] / total[1])))


def perplexity(loss: float) -> float:
    """Of a mean in nats a token; infinity where that is beyond what a float holds."""
    return math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf


def imported(module: str) -> Any:
    """A module of an optional package. Raises DependencyError."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise DependencyError(
            f"the package {module.partition('.')[0]} for this metric",
            found="none",
            do="pip install 'gptrt[tasks]'",
        ) from e


def _pairs(left: Sequence[Any], right: Sequence[Any]) -> list[tuple[Any, Any]]:
    if not left or len(left) != len(right):
        raise DataError(
            "as many answers as examples, one or more",
            found=f"{len(left)} and {len(right)}",
            do="give an answer for each",
        )
    return list(zip(left, right, strict=True))


def _corpus(
    name: str, metric: Any, found: Sequence[str], wanted: Sequence[Sequence[str]]
) -> Scored:
    pairs = _pairs(found, wanted)
    count = max(len(references) for _, references in pairs)
    # sacrebleu takes the first reference of every example, then the second; None where there is
    # none. What it sums over examples, and what it makes of sums, has no public name in it.
    streams = [[r[n] if n < len(r) else None for _, r in pairs] for n in range(count)]
    statistics = np.array(metric._extract_corpus_statistics(list(found), streams), np.float64)

    def score(sums: Float) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return _scored(name, statistics, score)


def _mean(name: str, each: Float) -> Scored:
    """Of a number from 0 to 1 for each example."""
    return _scored(name, each[:, None], lambda sums: 100 * float(sums[0]) / len(each))


def _scored(name: str, statistics: Float, score: Callable[[Float], float]) -> Scored:
    """What `score` makes of the sums over examples of statistics [examples, n]: over all of them,
    and over resamples."""
    count, random = len(statistics), np.random.default_rng(_SEED)
    resampled = sorted(
        score(np.bincount(random.integers(count, size=count), minlength=count) @ statistics)
        for _ in range(_RESAMPLES)
    )
    outside = _RESAMPLES // 40  # on each side
    low, high = resampled[outside], resampled[-1 - outside]
    return Scored(name, score(statistics.sum(0)), low, high, count)
