"""ROUGE-1's recall; ROUGE-L by bit-parallel longest common subsequences (Hyyrö 2004), against many references at once.

An integer holds one bit a reference token. One answer token then costs four operations on whole integers, whatever the
number of references.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

_NOT_A_TOKEN = re.compile(r"[^a-z0-9]+")


def tokenize(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits: the rule of the rouge-score package, without stemming."""
    return _NOT_A_TOKEN.sub(" ", text.lower()).split()


class Score(NamedTuple):
    """ROUGE-L of a candidate against one reference; recall is the share of the reference's tokens."""

    precision: float
    recall: float
    f1: float


class References:
    """Tokenised references, laid one after the other into one bit vector with a guard bit after each.

    The guard bit takes the addition's carry, so that no reference sees its neighbour's.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.lengths = [len(tokens) for tokens in references]
        self._positions: dict[str, int] = defaultdict(int)
        bits: dict[str, list[int]] = defaultdict(list)
        start = 0
        used = 0
        for tokens in references:
            for at, token in enumerate(tokens, start):
                bits[token].append(at)
            used |= ((1 << len(tokens)) - 1) << start
            start += len(tokens) + 1
        for token, places in bits.items():
            self._positions[token] = sum(1 << at for at in places)
        self._used, self._size = used, start

    def lcs(self, candidate: Sequence[str]) -> list[int]:
        """The length of the longest common subsequence of ``candidate`` and each reference."""
        state = self._used  # a cleared bit is a token of the common subsequence
        for token in candidate:
            matches = state & self._positions.get(token, 0)
            if matches:
                state = ((state + matches) | (state - matches)) & self._used
        found = f"{self._used & ~state:0{self._size}b}"[::-1] if self._size else ""
        counts, start = [], 0
        for length in self.lengths:
            counts.append(found.count("1", start, start + length))
            start += length + 1
        return counts

    def scores(self, candidate: Sequence[str]) -> list[Score]:
        """ROUGE-L of ``candidate`` against each reference; all zero where either has no tokens."""
        return [
            Score(common / len(candidate), common / length, 2 * common / (len(candidate) + length))
            if common
            else Score(0.0, 0.0, 0.0)
            for common, length in zip(self.lcs(candidate), self.lengths, strict=True)
        ]


def unigram_recall(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-1 recall (Lin 2004): the share of the reference's tokens, each as often as it stands there, that the
    candidate has. 0 of an empty reference."""
    common = Counter(candidate) & Counter(reference)
    return common.total() / len(reference) if reference else 0.0


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> Score:
    """ROUGE-L of one token list against one reference."""
    return References([reference]).scores(candidate)[0]
