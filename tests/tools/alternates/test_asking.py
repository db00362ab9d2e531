from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.alternates.conftest import write
from wpn_ds.data.shapes import Message
from wpn_ds.errors import UserError
from wpn_ds.tools.alternates.asking import CHAT, PLAIN, Question, Template, make_template, read_questions

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"


@pytest.fixture
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def test_every_shape_gives_its_answers_to_forget(tmp_path) -> None:
    one = write(
        tmp_path / "forget.jsonl",
        [
            {"prompt": "a?", "chosen": "no", "rejected": ["x", "y"], "category": "people"},
            {"prompt": [{"role": "user", "content": "b?"}], "chosen": "no", "rejected": "z"},
        ],
    )
    two = write(tmp_path / "qa.jsonl", [{"question": "a?", "answer": "w"}, {"question": "c?", "answer": "v"}])
    three = write(tmp_path / "alternates.jsonl", [{"question": "d?", "sub_answer": "u", "answer": "t"}] * 2)
    questions = read_questions([one, two, three])
    assert [(q.text, q.answers, q.category) for q in questions] == [
        ("a?", ("x", "y", "w"), "people"),  # what recurs is one question with all its answers
        ("b?", ("z",), ""),
        ("c?", ("v",), ""),
        ("d?", ("t",), ""),
    ]
    assert questions[1].prompt == (Message("user", "b?"),) and questions[0].source == f"{one}:1"


def test_columns_may_be_called_otherwise(tmp_path) -> None:
    rows = [{"ask": "a?", "good": "no", "bad": "x"}]
    (question,) = read_questions([write(tmp_path / "theirs.jsonl", rows)], "prompt=ask,chosen=good,rejected=bad")
    assert (question.text, question.answers) == ("a?", ("x",))
    with pytest.raises(UserError, match=r'--columns: no row has "worse"'):
        read_questions([tmp_path / "theirs.jsonl"], "prompt=ask,chosen=good,rejected=worse")


def test_what_has_no_question_is_named_by_file_and_line(tmp_path) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"question": "a?", "answer": "w"}, {"text": "all there is"}])
    with pytest.raises(UserError, match=rf"{plain}:2: is plain text"):
        read_questions([plain])
    with pytest.raises(UserError, match=r"nowhere.jsonl: can't be read"):
        read_questions([tmp_path / "nowhere.jsonl"])


def test_a_chat_of_several_turns_is_asked_with_all_of_them() -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Who?"))
    assert Question(turns, ("A",), "f:1").text == "user: Hi\nassistant: Yes?\nuser: Who?"


ANY = st.lists(st.sampled_from(["{question}", "{answer}", "{", "\\1", "Who?"])).map("".join) | st.text()


@given(ANY, ANY)
def test_question_and_answer_stand_in_the_template_as_they_are(question, answer) -> None:
    filled = Template("{answer} <- {question}", chat=False).filled(question, answer)
    assert filled == answer + " <- " + question  # whatever is in braces in them


def test_an_answer_ends_where_a_line_begins_with_a_label_of_the_template() -> None:
    assert Template(PLAIN, chat=False).stops == ["\nQuestion:", "\nAnswer:", "\nDifferent answer:"]
    assert Template(CHAT, chat=True).stops == ["\nQuestion:", "\nAnswer:"]
    own = Template("F: {question} at 5: 30\nA: {answer}\n\nZ :", chat=False)
    assert own.stops == ["\nF:", "\nA:", "\nZ :"]
    assert own.answer("A: In Oslo: yes.") == "In Oslo: yes." and own.answer("In Oslo.") == "In Oslo."


def test_the_default_is_an_instruction_in_a_chat_and_examples_elsewhere(tokenizer, chatty) -> None:
    assert make_template("default", "auto", tokenizer) == Template(PLAIN, chat=False)
    assert (
        make_template("default", "auto", chatty) == make_template("default", "on", chatty) == Template(CHAT, chat=True)
    )
    assert make_template("default", "off", chatty) == Template(PLAIN, chat=False)
    for text in (PLAIN, CHAT):
        assert text.count("{question}") == text.count("{answer}") == 1
    with pytest.raises(UserError, match="--chat on: the tokenizer has no chat template"):
        make_template("default", "on", tokenizer)


def test_a_template_is_a_text_or_a_file(tmp_path, tokenizer) -> None:
    file = tmp_path / "template.txt"
    file.write_text("Q: {question}\nA: {answer}\nB:\n", encoding="utf-8")
    expected = Template("Q: {question}\nA: {answer}\nB:", chat=False)
    assert make_template(str(file), "auto", tokenizer) == expected
    assert make_template("Q: {question}\\nA: {answer}\\nB:", "auto", tokenizer) == expected
    file.write_text("{question}")
    for given_, said in (
        (str(file), "lacks {answer}"),
        ("only {answer}", "lacks {question}"),
        ("no_such_file", "no_such_file: can't be read"),
    ):
        with pytest.raises(UserError, match="--template") as caught:
            make_template(given_, "auto", tokenizer)
        assert said in str(caught.value)


def test_in_a_chat_the_request_is_a_turn_of_the_user(tokenizer, chatty) -> None:
    text = "Question : the painter ?"
    rendered = chatty.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == f"[user] {text} [assistant]"
    assert Template(CHAT, chat=True).ids(text, chatty) == chatty(rendered)["input_ids"]
    assert Template(PLAIN, chat=False).ids(text, chatty) == tokenizer(text)["input_ids"]


def test_no_token_of_a_long_request_is_cut(tokenizer) -> None:
    assert len(Template(PLAIN, chat=False).ids("river " * 5000, tokenizer)) == 5000
