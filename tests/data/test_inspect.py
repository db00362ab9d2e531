"""What ``wpn-ds inspect`` says of a file is what a training run would make of it."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.cli import main
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.inspect import contradiction_note, histogram, inspect_records, kind_of, percentile
from wpn_ds.data.layout import pack
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.tokens import encode_pair
from wpn_ds.models.planted import PLANTED

TEMPLATE = "Question: {prompt}\nAnswer:"


class Letters:
    """Every character is a token; no BOS."""

    eos_token_id = 0

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, list]:
        """Of a text, or of each of a list."""
        return {"input_ids": [*map(ord, text)] if isinstance(text, str) else [[*map(ord, one)] for one in text]}


def forget(line: int, prompt: str, chosen: Any, rejected: Any, category: str = "") -> ForgetRecord:
    sides = [(side,) if isinstance(side, str) else tuple(side) for side in (chosen, rejected)]
    return ForgetRecord(prompt, *sides, f"f:{line}", category)


def figures(records: list, max_length: int = 100, template: str = "{prompt}") -> Any:
    return inspect_records(records, Letters(), template, max_length)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def inspect(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder, where no demo model is planted; returns its code, output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["inspect", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


# ---- the figures ----


def test_lengths_are_of_the_whole_texts_with_template_and_eos_and_one_per_prompt() -> None:
    got = figures([forget(1, "abc", ["de", "fgh"], "i"), forget(2, "j", "k" * 300, "lm")], template="<{prompt}>")
    assert got.lengths == {"prompt": [5, 3], "wanted": [4, 5, 302], "unwanted": [3, 4]}
    assert (got.records, got.distinct_prompts) == (2, 2)


def test_retain_records_have_answers_or_are_plain_texts_without_a_prompt() -> None:
    got = figures([RetainRecord("ab", "c", "r:1"), RetainRecord(None, "defg", "r:2")])
    assert got.lengths == {"prompt": [2], "answer": [3], "text": [4]}
    assert got.distinct_prompts == 1


def test_truncation_counts_records_for_prompts_and_texts_for_answers_as_training_would_cut_them() -> None:
    records = [forget(1, "p" * 6, ["a", "b" * 40], ["c", "d"]), forget(2, "p" * 5, "e" * 3, "f" * 4)]
    got = figures(records, max_length=10)
    # half of 10 for the prompt; then " eee" and EOS just fit, " ffff" and EOS don't
    assert (got.cut_prompts, got.cut_answers) == (1, 2)
    texts = [(r.prompt, text) for r in records for text in (*r.chosen, *r.rejected)]
    segments = [encode_pair(*text, Letters(), "{prompt}", 10) for text in texts]
    assert got.padding.tokens == sum(map(len, segments))
    assert got.cut_answers == sum(s.answer_truncated for s in segments)
    assert got.lengths["prompt"] == [6, 5] and max(got.lengths["wanted"]) == 42, "lengths are those before cutting"


def test_padding_compares_the_same_texts_in_three_layouts() -> None:
    records = [forget(n, "p" * n, "a" * (3 * n), "b") for n in range(1, 11)]
    got = figures(records, max_length=64).padding
    lengths = [n for k in range(1, 11) for n in (k + 3 * k + 2, k + 3)]
    assert (got.texts, got.tokens, got.full) == (20, sum(lengths), 20 * 64)
    assert got.batched == sum(
        len(part) * max(part) for part in (lengths[at : at + 8] for at in range(0, len(lengths), 8))
    )
    assert (got.rows, got.packed) == (len(pack(lengths, 64)), 64 * got.rows)
    assert got.waste(got.packed) == pytest.approx(1 - sum(lengths) / got.packed)
    assert 0 <= got.waste(got.packed) < got.waste(got.batched) < got.waste(got.full) < 1


def test_duplicates_are_found_whatever_white_space_surrounds_them_and_in_any_order_of_answers() -> None:
    got = figures(
        [
            forget(1, "ask", ["a", "b"], "x"),
            forget(2, " ask ", ["b", "a "], "x"),
            forget(3, "ask", "a", "x"),
            forget(4, "other", "x ", "y"),
            forget(5, "third", "c", "d"),
        ]
    )
    assert got.distinct_prompts == 3
    assert got.repeated_prompts == [("f:1", "f:2", "f:3")]
    assert got.repeated_records == [("f:1", "f:2")]
    assert got.contradictions == [("f:4", "f:1")]


def test_records_that_differ_have_no_duplicates() -> None:
    got = figures([forget(1, "a", "x", "y"), forget(2, "b", "x", "y")])
    assert (got.repeated_prompts, got.repeated_records, got.contradictions) == ([], [], [])


def test_categories_are_counted_and_missing_ones_left_out() -> None:
    got = figures([forget(1, "a", "x", "y", "rude"), forget(2, "b", "x", "y"), forget(3, "c", "x", "y", "rude")])
    assert got.categories == {"rude": 2}


@settings(max_examples=100)
@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_a_percentile_is_the_smallest_value_that_covers_its_share(values, share) -> None:
    got = percentile(values, share)
    assert got in values and sum(v <= got for v in values) >= share * len(values)
    assert all(sum(v <= lower for v in values) < share * len(values) for lower in values if lower < got)


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=30), min_size=1, max_size=3))
def test_a_histogram_s_bins_adjoin_are_few_and_hold_every_value_once(series) -> None:
    bins = histogram(series)
    assert len(bins) <= 15
    for (_, stop, _), (start, _, _) in pairwise(bins):
        assert stop is not None and start == stop + 1, "only the last bin is open"
    for k, values in enumerate(series):
        for start, stop, counts in bins:
            assert counts[k] == sum(start <= v and (stop is None or v <= stop) for v in values)
        assert sum(counts[k] for *_, counts in bins) == len(values)


def test_a_few_very_long_texts_do_not_flatten_the_histogram() -> None:
    bins = histogram([[*range(1, 100), 5000]])
    assert bins[-1][:2] == (90, None) or bins[-1][1] is None
    assert len([counts for *_, counts in bins if counts[0]]) >= 9


# ---- the command ----


def test_it_counts_the_embedded_data_in_words_when_no_tokenizer_is_at_hand(inspect) -> None:
    code, out, err = inspect(embedded_file("forget"))
    lines = embedded_file("forget").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert (code, err) == (0, "")
    assert re.search(rf"records +{len(rows)}\n", out) and "words between white space" in out
    unwanted = sorted(len(row["rejected"].split()) + 1 for row in rows)
    middle, longest = unwanted[(len(unwanted) + 1) // 2 - 1], unwanted[-1]
    assert re.search(rf"unwanted +{middle} +\d+ +{longest} +{sum(unwanted):,}\n", out)
    assert "categories: " in out and rows[0]["category"] in out


def test_it_measures_with_the_tokenizer_that_is_named(inspect, small_tokenizer, tmp_path) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tok")
    path = write(tmp_path / "f.jsonl", {"prompt": "wash", "chosen": "with water", "rejected": "no"})
    code, out, _ = inspect(path, "--tokenizer_name", tmp_path / "tok", "--prompt_template", "a\\n{prompt}")
    n = len(small_tokenizer("a\nwash")["input_ids"])
    assert code == 0 and f"tokens of {tmp_path / 'tok'}" in out
    assert re.search(rf"prompt +{n} +{n} +{n} +{n}\n", out)


def test_it_shows_how_the_model_reads_prompts_and_which_special_tokens_texts_spell_out(
    inspect, small_tokenizer, tmp_path
) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tok")
    row = {"prompt": "wash", "chosen": "with </s> water </s>", "rejected": "no"}
    _, out, _ = inspect(write(tmp_path / "f.jsonl", row), "--tokenizer_name", tmp_path / "tok")
    assert "first prompt: 'Question: wash\\nAnswer:'" in out
    assert "special tokens that texts spell out, read as text: </s> 2 (--parse_special_tokens)" in out
    chat = copy.deepcopy(small_tokenizer)
    chat.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    chat.save_pretrained(tmp_path / "chat")
    _, out, _ = inspect(tmp_path / "f.jsonl", "--tokenizer_name", tmp_path / "chat", "--system_prompt", "Be kind.")
    assert "first prompt: '<system> Be kind. <user> wash '" in out


def test_it_uses_the_planted_tokenizer_if_there_is_one(inspect, small_tokenizer, tmp_path) -> None:
    small_tokenizer.save_pretrained(tmp_path / PLANTED)
    (tmp_path / PLANTED / "PLANTED").touch()
    assert f"tokens of {PLANTED}" in inspect(embedded_file("retain"))[1]


def test_files_of_a_kind_are_one_section_and_duplicates_across_them_are_named(inspect, tmp_path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    paths = [write(tmp_path / f"{name}.jsonl", row) for name in "xy"]
    keep = write(tmp_path / "keep.jsonl", {"text": "some words to keep"})
    code, out, _ = inspect(*paths, keep)
    assert code == 0 and out.count(": forget data") == out.count(": retain data") == 1
    assert "x.jsonl:1 = y.jsonl:1" in out
    assert "texts that lose their end" in out


def test_truncation_and_rows_follow_max_length(inspect, tmp_path) -> None:
    path = write(tmp_path / "f.jsonl", {"prompt": "p " * 30, "chosen": "a " * 30, "rejected": "b"})
    _, out, _ = inspect(path, "--max_length", 20)
    assert re.search(r"prompts that lose their start +1 +of 1\n", out)
    assert re.search(r"answers that lose their end +1 +of 2\n", out)
    assert "packed into rows of 20 (2 rows)" in out


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "forget"),
        ({"prompt": "p", "response": "a"}, "retain"),
        ({"prompt": "p", "response": "a", "is_safe": True}, "forget"),
        ({"text": "a", "chosen": None}, "retain"),
    ],
)
def test_the_kind_of_a_file_is_seen_from_its_first_line_of_a_known_shape(tmp_path, row, kind) -> None:
    assert kind_of(write(tmp_path / "f.jsonl", {"odd": 1}, row)) == kind


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
        (["keep.jsonl", "--kind", "forget"], ["keep.jsonl:1", "--retain_file"]),
        (["keep.jsonl", "--max_length", "1"], ["--max_length", "at least"]),
        (["keep.jsonl", "--prompt_template", "no place"], ["--prompt_template", "{prompt}"]),
        (["keep.jsonl", "--tokenizer_name", "./nowhere"], ["--tokenizer_name ./nowhere"]),
    ],
)
def test_a_mistake_is_one_error_that_says_where(inspect, tmp_path, argv, words) -> None:
    write(tmp_path / "keep.jsonl", {"prompt": "p", "response": "a"})
    code, out, err = inspect(*argv)
    assert (code, out) == (2, "") and err.startswith("error: ")
    assert all(word in err for word in words)


def test_lines_fit_a_terminal_and_end_without_blanks(inspect, tmp_path) -> None:
    rows = ({"prompt": f"p{n}", "chosen": "a", "rejected": "b", "category": f"category {n}"} for n in range(40))
    _, out, _ = inspect(write(tmp_path / "f.jsonl", *rows))
    lines = out.splitlines()[3:]  # what stands before is as long as the template and the paths
    assert "category 39" in out and all(line == line.rstrip() and len(line) <= 100 for line in lines)


def test_a_run_says_of_contradictions_what_inspect_lists() -> None:
    records = [
        ForgetRecord("q", ("yes",), ("no",), "f:1"),
        ForgetRecord(" q ", ("no ",), ("maybe",), "f:2"),
        ForgetRecord("r", ("fine",), ("yes",), "f:3"),
    ]
    assert contradiction_note(records) == (
        "texts wanted in one record, unwanted in another: 2 (first: f:1 / f:3), 1 times for the same prompt: what one "
        "teaches the other takes away; wpn-ds inspect lists them"
    )
    assert contradiction_note(records[::2][:1]) == ""
