"""Text becomes segments by one rule, whatever the tokenizer."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wpn_ds.data import special
from wpn_ds.data.plan import Segment
from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import (
    encode_pair,
    encode_prompt,
    encode_text,
    naming,
    render_prompt,
    spelt_special_tokens,
    today,
    writes_date,
)
from wpn_ds.errors import UserError
from wpn_ds.models.plant import train_tokenizer
from wpn_ds.settings.run import DataConfig
from wpn_ds.settings.style import PromptStyle

TEMPLATE = "Question: {prompt}\nAnswer:"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
LONG = 10_000
CHAT = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("user", "How are you?"),
)
fixed = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
def test_a_pair_is_the_tokenizer_s_own_reading_of_prompt_space_and_answer_then_eos(tokenizer, prompt, answer) -> None:
    segment = encode_pair(prompt, answer, tokenizer, TEMPLATE, LONG)
    asked = f"Question: {prompt}\nAnswer:"
    whole = f"{asked}{answer}" if answer[0].isspace() else f"{asked} {answer}"
    assert list(segment.ids) == [*tokenizer(whole, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
    if not segment.joined:
        assert list(segment.ids[: segment.answer_start]) == tokenizer(asked, split_special_tokens=True)["input_ids"]
    bos = len(tokenizer("")["input_ids"])
    assert segment.prompt_start == bos, "the prompt's span leaves out BOS, and only BOS"
    assert not segment.prompt_truncated and not segment.answer_truncated
    assert segment.answer_length == len(parts(segment)[2])
    assert segment.joined == (
        encode_prompt(prompt, tokenizer, TEMPLATE, LONG) != list(segment.ids[: segment.answer_start])
    )


def test_opt_reads_its_published_ids_after_one_bos(opt_tokenizer) -> None:
    segment = encode_pair("Hello world", "Hello world", opt_tokenizer, "{prompt}", LONG)
    hello, world, spaced = 31414, 232, bare(opt_tokenizer, " Hello")
    assert segment.ids == (2, hello, world, *spaced, world, 2)
    assert (segment.prompt_start, segment.answer_start) == (1, 3)


def test_gpt2_reads_its_published_ids_without_bos(gpt2_tokenizer) -> None:
    segment = encode_pair("Hello world", "Hello world", gpt2_tokenizer, "{prompt}", LONG)
    assert segment.ids == (15496, 995, *bare(gpt2_tokenizer, " Hello"), 995, 50256)
    assert (segment.prompt_start, segment.answer_start) == (0, 2)


def test_a_token_that_joins_prompt_and_answer_is_the_answer_s_and_is_told() -> None:
    tokenizer = train_tokenizer(["a\n\n\nb"] * 20, 320)  # learns one token for two line breaks
    segment = encode_pair("a", "\n\nb", tokenizer, "{prompt}\n", LONG)
    apart = (*bare(tokenizer, "a\n"), *bare(tokenizer, "\n\nb"))
    assert segment.ids[1:-1] == bare(tokenizer, "a\n\n\nb") != apart
    assert segment.joined and segment.ids[: segment.answer_start] == (2, *bare(tokenizer, "a"))


@pytest.mark.parametrize("template", ["Question: {prompt}\nAnswer: ", "Question: {prompt}\nAnswer:"])
def test_a_template_that_ends_in_a_space_gets_no_second_one(tokenizer, template) -> None:
    segment = encode_pair("Hi", "Fine.", tokenizer, template, LONG)
    assert segment == encode_pair("Hi", "Fine.", tokenizer, TEMPLATE, LONG) and not segment.joined
    chat = encode_pair(CHAT, "Fine.", tokenizer, template, LONG)
    assert chat == encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, LONG)


def test_a_template_that_ends_in_a_line_break_keeps_it_in_the_prompt(tokenizer) -> None:
    segment = encode_pair("Hi", "Fine.", tokenizer, "{prompt}\n", LONG)
    _, prompt, answer = parts(segment)
    assert prompt == bare(tokenizer, "Hi\n") and answer == (*bare(tokenizer, "Fine."), tokenizer.eos_token_id)


# ---- special tokens in texts ----


@pytest.mark.parametrize("text", ["a </s> b", "</s>", "x</s></s>", "<pad> and <s>"])
def test_a_special_token_that_a_text_spells_out_is_text(small_tokenizer, text) -> None:
    special = set(small_tokenizer.all_special_ids)
    segment = encode_pair(text, text, small_tokenizer, TEMPLATE, LONG)
    assert special.isdisjoint(segment.ids[1:-1])
    assert small_tokenizer.decode(segment.ids[1:-1]) == f"Question: {text}\nAnswer: {text}", "and nothing of it is lost"
    assert special.isdisjoint(encode_text(text, small_tokenizer, LONG).ids[1:])
    parsed = PromptStyle(TEMPLATE, parse_special_tokens=True)
    meant = encode_pair(text, text, small_tokenizer, parsed, LONG).ids[1:-1]
    assert list(meant) == small_tokenizer(f"Question: {text}\nAnswer: {text}", add_special_tokens=False)["input_ids"]
    assert not special.isdisjoint(meant)


def test_special_tokens_of_a_template_are_meant_beside_those_that_a_prompt_spells_out(small_tokenizer) -> None:
    segment = encode_pair("a </s>", "b", small_tokenizer, "<s>{prompt}</s>\n", LONG)
    bos, eos = (small_tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>"))
    assert [segment.ids.count(bos), segment.ids.count(eos)] == [1, 3] and segment.ids[1] == bos
    assert small_tokenizer.decode(segment.ids) == "</s><s>a </s></s>\nb</s>"


def test_special_tokens_that_texts_spell_out_are_counted(small_tokenizer) -> None:
    found = spelt_special_tokens(["a </s> <pad>", "</s>", "none"], small_tokenizer)
    assert found == {"</s>": 2, "<pad>": 1}


def test_braces_and_escapes_in_a_prompt_or_a_template_stand_for_themselves(small_tokenizer) -> None:
    for prompt in ("{prompt}", "a {0} b", r"\1 \g<0>", "%s {answer}"):
        assert render_prompt(prompt, small_tokenizer, TEMPLATE) == f"Question: {prompt}\nAnswer:"
    chat = (Message("user", "{0}"),)
    for asked in ("{0}", chat):
        assert render_prompt(asked, small_tokenizer, "{user} {{{prompt}}} \\1") == "{user} {{{0}}} \\1"


# ---- truncation ----


@fixed
@given(prompt=TEXT, answers=st.lists(TEXT, min_size=2, max_size=4), max_length=st.integers(4, 60))
def test_all_answers_of_a_prompt_follow_the_same_tokens_and_fit(tokenizer, prompt, answers, max_length) -> None:
    segments = [encode_pair(prompt, answer, tokenizer, TEMPLATE, max_length) for answer in answers]
    whole = [encode_pair(prompt, answer, tokenizer, TEMPLATE, LONG) for answer in answers]
    prompts = {segment.ids[: segment.answer_start] for segment in segments if not segment.joined}
    assert prompts <= {tuple(encode_prompt(prompt, tokenizer, TEMPLATE, max_length))}
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
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert list(segment.ids) == whole[:max_length]
    assert segment.answer_truncated == (len(whole) > max_length) and not segment.prompt_truncated
    assert segment.answer_length == len(segment) - 1


# ---- chats ----


def test_without_a_chat_template_every_turn_is_written_out_by_the_prompt_template(tokenizer) -> None:
    expected = "Be brief.\n\nQuestion: Hi\nAnswer: Hello.\nQuestion: How are you?\nAnswer:"
    segment = encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, LONG)
    assert list(segment.ids[: segment.answer_start]) == tokenizer(expected)["input_ids"]
    assert parts(segment)[2] == (*bare(tokenizer, " Fine."), tokenizer.eos_token_id)
    system = PromptStyle(TEMPLATE, system_prompt="Be brief.")
    assert encode_pair(CHAT[1:], "Fine.", tokenizer, system, LONG) == segment
    assert encode_pair(CHAT, "Fine.", tokenizer, system, LONG) == segment, "a chat keeps its own system turn"


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


def test_a_plain_prompt_is_a_user_s_turn_under_auto_and_ignores_the_chat_template_under_a_template(
    small_tokenizer,
) -> None:
    tokenizer = with_template(small_tokenizer, TURNS + OPENS)
    plain, chat = (encode_pair("Hi", "Fine.", t, TEMPLATE, LONG) for t in (tokenizer, small_tokenizer))
    assert plain == chat == encode_pair("Hi", "Fine.", small_tokenizer, "auto", LONG)
    turn = encode_pair((Message("user", "Hi"),), "Fine.", tokenizer, TEMPLATE, LONG)
    assert encode_pair("Hi", "Fine.", tokenizer, "auto", LONG) == turn != plain


def test_a_prompt_that_the_chat_template_refuses_is_told_with_its_record_and_reason(small_tokenizer) -> None:
    tokenizer = with_template(small_tokenizer, "{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError) as error, naming("data.jsonl:3"):
        encode_pair(CHAT, "Fine.", tokenizer, TEMPLATE, LONG)
    assert str(error.value) == (
        "data.jsonl:3: the tokenizer's chat template refuses a chat of the turns system, user, assistant, user "
        "(no system turns)"
    )


def test_a_template_that_writes_today_s_date_writes_the_run_s(small_tokenizer) -> None:
    dated = "{%- if strftime_now is defined %}\n{{ strftime_now('%d %b %Y') }}{%- endif %}\n" + TURNS + OPENS
    tokenizer = with_template(small_tokenizer, dated)
    assert writes_date(tokenizer) and not writes_date(with_template(small_tokenizer, TURNS))
    chat = [{"role": "user", "content": "Hi"}]
    clock = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert render_prompt("Hi", tokenizer, PromptStyle(chat_date=today())) == clock
    assert render_prompt("Hi", tokenizer, "auto") == clock
    day = datetime.date.today().strftime("%d %b %Y")
    then = render_prompt("Hi", tokenizer, PromptStyle(chat_date="2001-02-03"))
    assert then == clock.replace(day, "03 Feb 2001") and day in clock


def test_the_day_of_a_template_is_written_as_strftime_writes_it(small_tokenizer) -> None:
    codes = "%d %b %Y|%-d %_d %^b %e|%H:%M:%S|%d%%|%%d|%j"
    tokenizer = with_template(small_tokenizer, "{% set calendar = 1 %}{{ strftime_now('" + codes + "') }}" + TURNS)
    text = render_prompt("Hi", tokenizer, PromptStyle(chat_date="2001-02-03"))
    assert text.startswith(datetime.datetime(2001, 2, 3).strftime(codes) + "<user>")


@pytest.mark.parametrize("text", ["a {0} b", "{0}1w", "x{0}"])
def test_nobody_can_forge_what_marks_a_special_token(small_tokenizer, text) -> None:
    text = text.format(special._KEY) + " </s>"
    segment = encode_pair(text, "b", small_tokenizer, "{prompt}", LONG)
    assert small_tokenizer.decode(segment.ids[1:-1]) == f"{text} b" and segment.ids.count(2) == 2


def test_tokens_are_the_same_in_every_process(small_tokenizer) -> None:
    """Ranks read for themselves, and a resumed run reads again."""
    again = copy.deepcopy(small_tokenizer)
    texts = ("a </s> b", "<pad>", "c")
    assert [encode_pair(t, t, small_tokenizer, TEMPLATE, LONG) for t in texts] == [
        encode_pair(t, t, again, TEMPLATE, LONG) for t in texts
    ]
    marked = special.SpecialTokens(small_tokenizer).marked("a </s> b")
    assert marked == special.SpecialTokens(again).marked("a </s> b") and marked.replace(" ", "").isalnum()
