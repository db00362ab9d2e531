"""Text becomes segments by one rule, whatever the tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wpn_ds.config import DataConfig
from wpn_ds.data.records import Message
from wpn_ds.data.tokens import Segment, encode_pair, encode_prompt, encode_text, render_prompt
from wpn_ds.demo.plant import train_tokenizer
from wpn_ds.errors import UserError

TEMPLATE = "Question: {prompt}\nAnswer:"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
LONG = 10_000
CHAT = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("user", "How are you?"),
)
fixed = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bare(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def parts(segment: Segment) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(BOS, prompt, answer)."""
    ids = segment.ids
    return ids[: segment.prompt_start], ids[segment.prompt_start : segment.answer_start], ids[segment.answer_start :]


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


# ---- plain prompts ----


@fixed
@given(prompt=TEXT, answer=TEXT)
def test_a_pair_is_the_tokenizer_s_own_prompt_then_the_answer_after_a_space_then_eos(tokenizer, prompt, answer) -> None:
    segment = encode_pair(prompt, answer, tokenizer, TEMPLATE, LONG)
    asked = f"Question: {prompt}\nAnswer:"
    assert list(segment.ids[: segment.answer_start]) == tokenizer(asked)["input_ids"]
    assert segment.ids[segment.answer_start :] == (*bare(tokenizer, " " + answer), tokenizer.eos_token_id)
    assert parts(segment)[1] == bare(tokenizer, asked), "the prompt's span leaves out BOS, and only BOS"
    assert not segment.prompt_truncated and not segment.answer_truncated
    assert segment.answer_length == len(parts(segment)[2])
    assert encode_prompt(prompt, tokenizer, TEMPLATE, LONG) == list(segment.ids[: segment.answer_start])


def test_opt_reads_its_published_ids_after_one_bos(opt_tokenizer) -> None:
    segment = encode_pair("Hello world", "Hello world", opt_tokenizer, "{prompt}", LONG)
    hello, world, spaced = 31414, 232, bare(opt_tokenizer, " Hello")
    assert segment.ids == (2, hello, world, *spaced, world, 2)
    assert (segment.prompt_start, segment.answer_start) == (1, 3)


def test_gpt2_reads_its_published_ids_without_bos(gpt2_tokenizer) -> None:
    segment = encode_pair("Hello world", "Hello world", gpt2_tokenizer, "{prompt}", LONG)
    assert segment.ids == (15496, 995, *bare(gpt2_tokenizer, " Hello"), 995, 50256)
    assert (segment.prompt_start, segment.answer_start) == (0, 2)


def test_prompt_and_answer_are_tokenised_apart_even_where_bpe_would_join_them() -> None:
    tokenizer = train_tokenizer(["Hello   world"] * 20, 300)  # learns to merge spaces, as GPT-2's never do
    segment = encode_pair("Hello ", " world", tokenizer, "{prompt}", LONG)
    assert segment.ids[1:-1] == bare(tokenizer, "Hello ") + bare(tokenizer, "  world")
    assert segment.ids[1:-1] != bare(tokenizer, "Hello   world"), "the case is to be one where it matters"


def test_braces_and_escapes_in_a_prompt_or_a_template_stand_for_themselves(small_tokenizer) -> None:
    for prompt in ("{prompt}", "a {0} b", r"\1 \g<0>", "%s {answer}"):
        assert render_prompt(prompt, small_tokenizer, TEMPLATE) == (f"Question: {prompt}\nAnswer:", False)
    chat = (Message("user", "{0}"),)
    for asked in ("{0}", chat):
        assert render_prompt(asked, small_tokenizer, "{user} {{{prompt}}} \\1") == ("{user} {{{0}}} \\1", False)


# ---- truncation ----


@fixed
@given(prompt=TEXT, answers=st.lists(TEXT, min_size=2, max_size=4), max_length=st.integers(4, 60))
def test_all_answers_of_a_prompt_follow_the_same_tokens_and_fit(tokenizer, prompt, answers, max_length) -> None:
    segments = [encode_pair(prompt, answer, tokenizer, TEMPLATE, max_length) for answer in answers]
    whole = [encode_pair(prompt, answer, tokenizer, TEMPLATE, LONG) for answer in answers]
    prompts = {segment.ids[: segment.answer_start] for segment in segments}
    assert prompts == {tuple(encode_prompt(prompt, tokenizer, TEMPLATE, max_length))}
    for segment, full in zip(segments, whole, strict=True):
        bos, asked, answer = parts(segment)
        assert len(segment) <= max_length and answer, "something is left to predict"
        assert bos == parts(full)[0], "a cut prompt keeps its BOS"
        assert asked and asked == parts(full)[1][-len(asked) :], "a prompt loses its start"
        assert segment.prompt_truncated == (len(asked) < len(parts(full)[1]))
        assert len(bos + asked) <= max(len(bos) + 1, max_length // 2)
        assert answer == parts(full)[2][: len(answer)], "an answer loses its end"
        assert segment.answer_truncated == (len(answer) < len(parts(full)[2]))
        assert not segment.answer_truncated or len(segment) == max_length, "no more is cut than needs be"


def test_a_cut_answer_has_no_eos_and_a_fitting_one_has_exactly_one(small_tokenizer) -> None:
    eos, answer = small_tokenizer.eos_token_id, "with water and a cloth, and then with water again"
    whole = encode_pair("car", answer, small_tokenizer, "{prompt}", LONG)
    exact, cut = (encode_pair("car", answer, small_tokenizer, "{prompt}", len(whole) - less) for less in (0, 1))
    assert exact == whole and whole.ids[-1] == eos and parts(whole)[2].count(eos) == 1
    assert cut.answer_truncated and not cut.prompt_truncated and parts(cut)[2] == parts(whole)[2][:-1]


def test_a_prompt_of_exactly_half_the_length_is_whole(small_tokenizer) -> None:
    n = len(encode_prompt("car", small_tokenizer, TEMPLATE, LONG))
    assert len(encode_prompt("car", small_tokenizer, TEMPLATE, 2 * n)) == n
    cut = encode_pair("car", "a", small_tokenizer, TEMPLATE, 2 * n - 2)
    assert cut.prompt_truncated and cut.answer_start == n - 1


def test_the_smallest_length_that_a_run_takes_leaves_a_prompt_and_an_answer_token(tokenizer) -> None:
    smallest = next(n for n in range(10) if accepted(n))
    _, prompt, answer = parts(encode_pair("car", "with water", tokenizer, TEMPLATE, smallest))
    assert prompt and answer


def accepted(max_length: int) -> bool:
    try:
        DataConfig(max_length=max_length)
    except UserError:
        return False
    return True


# ---- plain text ----


@fixed
@given(text=TEXT, max_length=st.integers(2, 80))
def test_plain_text_has_the_tokenizer_s_bos_and_no_eos_and_predicts_all_but_its_first_token(
    tokenizer, text, max_length
) -> None:
    segment = encode_text(text, tokenizer, max_length)
    whole = tokenizer(text)["input_ids"]
    assert list(segment.ids) == whole[:max_length]
    assert segment.answer_truncated == (len(whole) > max_length) and not segment.prompt_truncated
    assert segment.answer_length == len(segment) - 1


# ---- chats ----


def test_without_a_chat_template_every_turn_is_written_out_by_the_prompt_template(tokenizer) -> None:
    expected = "Be brief.\n\nQuestion: Hi\nAnswer: Hello.\nQuestion: How are you?\nAnswer:"
    segment = encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, LONG)
    assert list(segment.ids[: segment.answer_start]) == tokenizer(expected)["input_ids"]
    assert parts(segment)[2] == (*bare(tokenizer, " Fine."), tokenizer.eos_token_id)


def test_a_single_user_message_reads_as_the_plain_prompt(tokenizer) -> None:
    chat = encode_pair((Message("user", "Hi"),), "Fine.", tokenizer, TEMPLATE, LONG)
    assert chat == encode_pair("Hi", "Fine.", tokenizer, TEMPLATE, LONG)


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_chat_template_writes_the_prompt_and_the_answer_follows_as_it_is(small_tokenizer) -> None:
    tokenizer = with_template(small_tokenizer, TURNS + OPENS)
    segment = encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, LONG)
    bos, prompt, answer = parts(segment)
    written = "<system>Be brief.\n<user>Hi\n<assistant>Hello.\n<user>How are you?\n<assistant>"
    assert prompt == bare(tokenizer, written) and bos == (), "the template wrote no BOS, so there is none"
    assert answer == (*bare(tokenizer, "Fine."), tokenizer.eos_token_id)


@pytest.mark.parametrize("max_length", [LONG, 40])
def test_a_bos_that_the_chat_template_wrote_is_not_doubled_and_not_lost_in_truncation(
    small_tokenizer, max_length
) -> None:
    tokenizer = with_template(small_tokenizer, "{{ bos_token }}" + TURNS + OPENS)
    segment = encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, max_length)
    bos, prompt, _ = parts(segment)
    assert bos == (tokenizer.bos_token_id,) and tokenizer.bos_token_id not in prompt
    assert segment.prompt_truncated == (max_length == 40)


def test_a_plain_prompt_ignores_the_chat_template(small_tokenizer) -> None:
    tokenizer = with_template(small_tokenizer, TURNS + OPENS)
    assert encode_pair("Hi", "Fine.", tokenizer, TEMPLATE, LONG) == encode_pair(
        "Hi", "Fine.", small_tokenizer, TEMPLATE, LONG
    )
