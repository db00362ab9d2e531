from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.judging.rouge import References, rouge_l, tokenize, unigram_recall

words = st.lists(st.sampled_from("abcde"), max_size=40)


def plain_lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(words, st.lists(words, max_size=6))
def test_the_bit_parallel_lcs_is_the_dynamic_programme_for_every_reference(candidate, references) -> None:
    assert References(references).lcs(candidate) == [plain_lcs(candidate, reference) for reference in references]


@given(words, words)
def test_swapping_candidate_and_reference_swaps_precision_and_recall(a, b) -> None:
    there, back = rouge_l(a, b), rouge_l(b, a)
    assert (there.precision, there.recall, there.f1) == (back.recall, back.precision, back.f1)


@given(words, words)
def test_f1_is_the_harmonic_mean_inside_the_unit_interval(a, b) -> None:
    score = rouge_l(a, b)
    assert 0 <= score.f1 <= 1
    if score.f1:
        assert score.f1 == pytest.approx(2 * score.precision * score.recall / (score.precision + score.recall))


def test_a_known_pair_has_the_known_score() -> None:
    # the example of the ROUGE paper: LCS "police the gunman"
    candidate, reference = tokenize("police kill the gunman"), tokenize("police killed the gunman")
    assert rouge_l(candidate, reference) == (0.75, 0.75, 0.75)


def test_tokens_are_lower_case_letters_and_digits_as_in_rouge_score() -> None:
    assert tokenize("It's 2 o'clock,\nSIR - na\u00efve_x!") == ["it", "s", "2", "o", "clock", "sir", "na", "ve", "x"]
    assert tokenize(" \u2014 ") == []


@given(words, words)
def test_unigram_recall_is_the_share_of_the_reference_that_is_covered_whatever_the_order(candidate, reference) -> None:
    left, covered = list(candidate), 0
    for token in reference:
        if token in left:
            left.remove(token)
            covered += 1
    assert unigram_recall(candidate, reference) == (covered / len(reference) if reference else 0)
    assert unigram_recall(candidate[::-1], reference) >= rouge_l(candidate, reference).recall


def test_texts_without_tokens_score_zero() -> None:
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == rouge_l([], []) == (0, 0, 0)
