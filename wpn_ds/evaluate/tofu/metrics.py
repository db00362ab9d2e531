"""The equations of the TOFU metrics, on the numbers of items; no model, no files.

The loss of an answer is the mean negative log-likelihood of its tokens, EOS included, in nats a token, as in the code
of TOFU (github.com/locuslab/tofu: data_module.py appends EOS to the labels, evaluate_util.py divides by their number)
and of AltPO (github.com/molereddy/Alternate-Preference-Optimization, evaluate_util.py and utils.py).

Everything is computed from log R rather than R: what overflows in exp would be lost, and both means and the
Kolmogorov-Smirnov test, which only sees the order of its numbers, are the same.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wpn_ds.errors import UserError
from wpn_ds.judging.rouge import rouge_l


def probability(loss: float) -> float:
    """P(y|x)^(1/|y|) = exp(-loss) of one answer."""
    return float(np.exp(-loss))


def chosen_probability(loss: float, perturbed: Sequence[float]) -> float:
    """P / (P + sum_k P_k), P = exp(-loss) of the true answer, P_k of the perturbed ones: what stands for the
    probability where a question has few possible answers (real authors and world facts)."""
    losses = np.array([loss, *perturbed], dtype=np.float64)
    return float(np.exp(-loss - np.logaddexp.reduce(-losses)))


def log_truth_ratio(paraphrased: float, perturbed: Sequence[float]) -> float:
    """log R = loss(paraphrased answer) - mean_k loss(perturbed answer k), of one item.

    R is the perturbed answers' geometric mean probability over the paraphrased one's: 1 where false and true are as
    likely, below 1 where the model knows the truth.
    """
    return paraphrased - float(np.mean(perturbed))


def forget_truth_ratio(log_ratios: Sequence[float]) -> float:
    """mean_i min(R_i, 1 / R_i) over [items]: 1 where the model knows nothing either way."""
    return float(np.exp(-np.abs(log_ratios)).mean())


def kept_truth_ratio(log_ratios: Sequence[float]) -> float:
    """mean_i max(0, 1 - R_i) over [items] of what is to be kept: 1 where the model is sure of the truth."""
    return float((1 - np.exp(np.minimum(log_ratios, 0.0))).mean())


def exact_memorization(hits: Sequence[bool]) -> float:
    """The share of the answer's tokens that are the likeliest ones after the true tokens before them.

    ``hits``: [tokens], EOS left out (github.com/locuslab/open-unlearning, memorization.py, tokenwise_vocab_logprobs).
    """
    return sum(hits) / len(hits)


def extraction_strength(hits: Sequence[bool]) -> float:
    """1 - k / n, k the fewest of the answer's ``n`` tokens that must be given for all the others to be the likeliest.

    ``hits`` as in :func:`exact_memorization`. As in open-unlearning's code, k is n - 1 at most: an answer of which not
    even the last token is right has 1 / n, not 0.
    """
    right = next((at for at, hit in enumerate(reversed(hits)) if not hit), len(hits))
    return max(1, right) / len(hits)


def rouge_l_recall(answer: str, reference: str) -> float:
    """The share of the reference's stemmed words in its longest common subsequence with the answer: rouge_score's
    recall with its Porter stemmer, as TOFU has it.

    Raises:
        UserError: the package isn't installed.
    """
    words = _stemmer()
    return rouge_l(words.tokenize(answer), words.tokenize(reference)).recall


@dataclass(frozen=True)
class KSTest:
    """The two-sample Kolmogorov-Smirnov test: ``p`` of the ``statistic`` (the distributions' greatest distance) between
    ``n`` numbers of this model and as many of the retain-only one. Where they differ, p falls with n: compare it at the
    same n alone."""

    p: float
    statistic: float
    n: int


def ks_test(sample: Sequence[float], retain: Sequence[float]) -> KSTest:
    """Whether the model's numbers could be those of the model that never saw the forget set; as many of both.

    Raises:
        UserError: scipy isn't installed.
    """
    assert len(sample) == len(retain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where the exact p can't be computed it is the asymptotic one
        found = _scipy_stats().ks_2samp(sample, retain)
    return KSTest(float(found.pvalue), float(found.statistic), len(sample))


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean of {ROUGE-L recall, probability, truth ratio} x {retain, real authors, world facts}; 0 if one
    of them is."""
    return statistics.harmonic_mean(parts)


def check_installed() -> None:
    """Raises UserError if what the metrics need isn't there, before anything is computed."""
    _stemmer()
    _scipy_stats()


def _stemmer() -> Any:
    try:
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise UserError("the suite tofu needs rouge-score: pip install 'wpn_ds[eval]'") from error
    return DefaultTokenizer(use_stemmer=True)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("the suite tofu needs scipy: pip install 'wpn_ds[eval]'") from error
    return stats
