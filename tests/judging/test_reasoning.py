from __future__ import annotations

import pytest

from wpn_ds.judging.reasoning import answer_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("analysisThe prompt.assistantfinalb", "b"),
        ("b <think>a</think>", "b"),
        ("<think>a</think>", ""),
        ("<think>a", ""),
        ("\n<|begin_of_thought|>a", ""),
        ("[Analysis]\nThe poem is old.", "[Analysis]\nThe poem is old."),
        ("I resign, for [reason]. Yours", "I resign, for [reason]. Yours"),
        ("[Thinking face] Hm", "[Thinking face] Hm"),
        ("Write <think> before it.", "Write <think> before it."),
    ],
)
def test_an_answer_is_what_follows_reasoning_and_keeps_the_fields_of_a_form(text, answer) -> None:
    assert answer_of(text).strip() == answer
