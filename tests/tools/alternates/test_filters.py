from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.tools.alternates.filters import REASONS, RESTATES, Counts, Sieve, recall, words

SENTENCE = "the cat Sat on a green mat, near Łódź in 1951"
TEXT = st.lists(st.sampled_from(SENTENCE.split()), max_size=12).map(" ".join)
QUESTION = "Where was the painter born?"


def longest_common(one: list[str], other: list[str]) -> int:
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


@given(TEXT, TEXT)
def test_recall_is_the_share_of_the_answers_words_in_their_order(text, answer) -> None:
    expected = longest_common(words(text), words(answer)) / len(words(answer)) if words(answer) else 0
    assert recall(text, answer) == pytest.approx(expected)


@given(TEXT.filter(words), TEXT, TEXT)
def test_an_answer_is_restated_whatever_stands_before_and_after_it_and_however_it_is_written(
    answer, before, after
) -> None:
    for text in (answer, answer.upper(), f"{before} {answer.replace(' ', ' - ')}! {after}"):
        sieve = Sieve(QUESTION, ["something else altogether", answer])
        assert not sieve.add(text) and sieve.filtered == {"restates": 1}


@pytest.mark.parametrize(("total", "same", "kept"), [(10, 9, True), (10, 10, False), (20, 18, True), (20, 19, False)])
def test_more_than_nine_tenths_of_the_words_restate(total, same, kept) -> None:
    answer = [f"word{i}" for i in range(total)]
    text = " ".join([*answer[:same], *(f"other{i}" for i in range(total - same))])
    assert Sieve(QUESTION, [" ".join(answer)]).add(text) is kept and RESTATES == 0.9


def test_words_of_every_script_count() -> None:
    answer = "Она родилась в Киеве и работала в NATO"
    sieve = Sieve(QUESTION, [answer])
    assert sieve.add("Он жил в Минске, потом служил в NATO"), "one Latin word in common is no restatement"
    assert not sieve.add("Да: она родилась в киеве и работала в nato.") and sieve.filtered["restates"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("She was born in Turin, in 1951.", None),
        ("", "empty"),
        (" \n", "empty"),
        ("...", "empty"),
        ("Where was the painter born?", "echo"),
        ("in Turin in Turin in Turin in Turin", "repetitive"),
        ("xqzkv wqfpt bdgkt zzxq", "gibberish"),
        ("Nobody doubts it: Lima, in Peru.", "restates"),
        ("she was BORN in Oslo", "duplicate"),
    ],
)
def test_each_kind_of_useless_alternate_is_filtered_under_its_own_name(text, reason) -> None:
    sieve = Sieve(QUESTION, ["In 1951.", "Lima, in Peru"])
    assert sieve.add("She was born in Oslo.")
    sieve.answers = sieve.answers[1:]
    assert sieve.add(text) is (reason is None)
    assert sieve.filtered == ({reason: 1} if reason else {}) and (reason is None or reason in REASONS)


def test_what_is_copied_from_the_examples_that_the_model_read_is_an_echo() -> None:
    read = "Question: Who?\nAnother answer: Her first workshop opened in Passau in the spring of 1958, above a bakery."
    copied = "Her first workshop opened in Passau in the spring of 1958, above a bakery."
    assert Sieve(QUESTION, ["Lima"]).add(copied)
    sieve = Sieve(QUESTION, ["Lima"])
    assert not sieve.add(copied, read) and sieve.filtered == {"echo": 1}


@given(st.lists(TEXT, max_size=8), st.lists(TEXT, min_size=1, max_size=2))
def test_all_are_kept_or_counted_and_what_is_kept_passes_again_once(texts, answers) -> None:
    sieve, counts = Sieve(QUESTION, answers), Counts(3)
    for text in texts:
        sieve.add(text)
    counts.add(sieve)
    assert counts.drawn == len(texts) == len(sieve.kept) + sieve.filtered.total()
    assert len({tuple(words(text)) for text in sieve.kept}) == len(sieve.kept)
    assert all(recall(text, answer) <= RESTATES for text in sieve.kept for answer in answers)
    again = Sieve(QUESTION, answers)
    assert all([again.add(text) for text in sieve.kept]) and not any([again.add(text) for text in sieve.kept])
    assert again.filtered.keys() <= {"duplicate"}


def test_counts_tell_how_many_for_which_reason_and_which_prompts_fall_short() -> None:
    counts = Counts(2)
    for texts in (["In Oslo.", "In Turin."], ["in Lima", "In Oslo", "in oslo"], ["Lima!", ""]):
        sieve = Sieve(QUESTION, ["Lima"])
        for text in texts:
            sieve.add(text)
        counts.add(sieve)
    assert counts.to_json() == {
        "prompts": 3,
        "alternates": 3,
        "drawn": 7,
        "filtered": {"restates": 2, "duplicate": 1, "empty": 1, "echo": 0, "repetitive": 0, "gibberish": 0},
        "prompts_with_fewer": 2,
        "prompts_with_none": 1,
    }
    assert "3 alternates of use to 2 of 3 prompts" in str(counts) and "4 of 7 filtered (57.1 %)" in str(counts)
    assert "2 restate an answer to forget, 1 duplicates, 1 empty" in str(counts)
    assert "2 prompts have fewer than 2, 1 of them none" in str(counts)
