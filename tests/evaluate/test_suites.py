"""Which suites `--suite` names, and which prompts they ask."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.records import ForgetRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.attacks import ATTACKS
from wpn_ds.evaluate.published import PUBLISHED
from wpn_ds.evaluate.suites import (
    FOLLOWED,
    GROUPS,
    NAMES,
    PREFILLED,
    QUICK_LIMIT,
    SUITES,
    WITHOUT_PROMPTS,
    PromptSuite,
    Sources,
    build_suites,
    resolve_suites,
    take,
)


def records(count: int, name: str = "q", categories: int = 3) -> list[ForgetRecord]:
    return [
        ForgetRecord(f"{name} {k}?", (f"good {k}",), (f"bad {k}",), f"{name}.jsonl:{k + 1}", f"c{k % categories}")
        for k in range(count)
    ]


FULL = Sources(records(80, "train"), records(40, "heldout"), records(5, "attack"))


def built(text: str, sources: Sources = FULL) -> dict[str, PromptSuite]:
    return {suite.name: suite for suite in build_suites(resolve_suites(text), sources)[0]}


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- what is asked for ----


def test_quick_and_full_are_every_suite() -> None:
    quick, full = resolve_suites("quick"), resolve_suites("full")
    assert quick.suites == full.suites == SUITES
    assert (quick.limit, full.limit) == (QUICK_LIMIT, None)
    assert not quick.named and not full.named


def test_every_attack_and_every_published_list_belongs_to_a_group() -> None:
    assert {f"attack/{name}" for name in ATTACKS} < set(GROUPS["attacks"])
    assert set(PUBLISHED) - set(SUITES) == {"jailbreak_templates"}
    assert len(set(SUITES)) == len(SUITES)


@given(st.lists(st.sampled_from([*NAMES, *SUITES]), min_size=1, max_size=6))
def test_what_is_named_is_selected_in_the_order_of_the_tables(items: list[str]) -> None:
    selection = resolve_suites(" , ".join(items))
    assert set(selection.suites) == {name for item in items for name in NAMES.get(item, (item,))}
    assert list(selection.suites) == sorted(selection.suites, key=SUITES.index)
    assert selection.limit is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("advbensh", "did you mean advbench?"),
        ("train,atacks", "'atacks' is not a suite; did you mean attacks?"),
        ("attack/basse64", "did you mean attack/base64?"),
        ("attack/prefil", "did you mean attack/prefill?"),
        ("attack/prefill-3", "'attack/prefill-3' is not a suite; did you mean attack/prefill"),
        ("", "known are quick, full, in_distribution"),
        ("train,", "'' is not a suite"),
        ("zzz", "known are quick, full, in_distribution"),
        ("quick,train", "quick is all suites: name nothing beside it"),
    ],
)
def test_an_unknown_suite_is_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"^--suite ") as error:
        resolve_suites(text)
    assert said in str(error.value)


# ---- some of the prompts ----


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), limit=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_limit_takes_from_each_category_its_share(sizes: list[int], limit: int, seed: int) -> None:
    everything = [
        ForgetRecord(f"{category} {k}", (), (), "", str(category)) for category, n in enumerate(sizes) for k in range(n)
    ]
    everything = sorted(everything, key=lambda record: str(record.prompt)[::-1])
    taken = take(everything, limit, seed)
    assert len(taken) == min(limit, len(everything))
    assert taken == [record for record in everything if record in taken]
    assert taken == take(everything, limit, seed)
    counts = Counter(record.category for record in taken)
    for category, size in enumerate(sizes):
        assert abs(counts[str(category)] - min(1.0, limit / len(everything)) * size) < 1


def test_another_seed_takes_others_from_all_over_the_file() -> None:
    everything = records(1000, categories=1)
    assert take(everything, 10, 0) != take(everything, 10, 1)
    places = [everything.index(record) for seed in range(10) for record in take(everything, 10, seed)]
    assert min(places) < 100 and max(places) >= 900


def test_the_users_limit_stands_before_that_of_quick() -> None:
    assert len(built("quick")["train"].records) == QUICK_LIMIT
    assert len(built("quick", replace(FULL, limit=40))["train"].records) == 40
    assert len(built("train", replace(FULL, limit=3))["train"].records) == 3
    assert len(built("train")["train"].records) == 80


# ---- suites ----


def test_each_suite_is_asked_in_its_own_way() -> None:
    suites = built("full", replace(FULL, samples=7))
    kinds = {name: (suite.kind, suite.template, suite.samples) for name, suite in suites.items()}
    assert kinds.pop("over_refusal") == ("benign", None, 0)
    assert kinds.pop("toxicity") == ("open", "{prompt}", 0)
    assert kinds.pop("diversity") == ("harm", None, 7)
    assert set(kinds.values()) == {("harm", None, 0)}
    assert {name: suite.then for name, suite in suites.items() if suite.then} == FOLLOWED
    begun = {name: suite.prefill for name, suite in suites.items() if suite.prefill}
    assert begun == {f"attack/prefill-{k}": k for k in (1, 2, 4, 8)} == PREFILLED
    assert list(suites) == [name for name in SUITES if name in suites]
    assert not set(WITHOUT_PROMPTS) & set(suites)
    assert suites["train"].records == tuple(FULL.train)


@pytest.mark.parametrize(
    "name", ["diversity", *PREFILLED, *(f"attack/{attack}" for attack in ATTACKS if attack != "templates")]
)
def test_attacks_and_samples_ask_held_out_prompts_where_there_are_any(name: str) -> None:
    assert {r.source for r in built(name)[name].records} == {r.source for r in FULL.heldout}
    assert {r.source for r in built(name, replace(FULL, heldout=()))[name].records} == {r.source for r in FULL.train}


def test_all_attacks_ask_the_same_questions() -> None:
    suites = built("attacks", replace(FULL, limit=6))
    assert len({tuple(r.source for r in suite.records) for suite in suites.values()}) == 1
    assert len(suites) == len(ATTACKS) - 1 + len(FOLLOWED) + len(PREFILLED)
    assert {name for name, suite in suites.items() if suite.prefill} == set(built("attack/prefill"))


def test_few_shot_shows_training_prompts_as_turns_that_were_answered() -> None:
    (suite,) = built("attack/few_shot", replace(FULL, limit=1)).values()
    (record,) = suite.records
    *shown, last = record.prompt
    assert [turn.role for turn in record.prompt] == ["user", "assistant"] * (len(shown) // 2) + ["user"]
    assert shown[0].content.startswith("train ") and shown[1].content.startswith("bad ")
    assert last.content.startswith("heldout ")


def test_one_prompt_alone_has_nothing_to_be_shown() -> None:
    with pytest.raises(UserError, match="attack/few_shot: no other prompt to show as an example: give a --train_file"):
        built("attack/few_shot", Sources(records(1)))


def test_published_lists_and_templates_are_read_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "malicious_instruct.txt").write_text("one\ntwo\n")
    (tmp_path / "jailbreak_prompts.csv").write_text("prompt\nSay [PROMPT].\n")
    suites, notes = build_suites(resolve_suites("full"), replace(FULL, data_dir=tmp_path))
    by_name = {suite.name: suite for suite in suites}
    assert [(r.prompt, r.chosen, r.rejected) for r in by_name["malicious_instruct"].records] == [
        ("one", (), ()),
        ("two", (), ()),
    ]
    assert by_name["attack/templates"].records[0] == replace(FULL.heldout[0], prompt="Say heldout 0?.")
    assert sum(note.startswith("left out: ") for note in notes) == len(PUBLISHED) - 3, "the two of XSTest lack one file"
    assert notes[0].startswith(
        f"left out: advbench: no advbench.csv below --data_dir {tmp_path}: get it from github.com/"
    )


# ---- what is missing ----


def test_quick_takes_what_there_is_and_says_what_is_left_out() -> None:
    suites, notes = build_suites(resolve_suites("quick"), Sources())
    assert [suite.name for suite in suites] == ["over_refusal", "toxicity"]
    said = {name for note in notes for name in SUITES if name in note.replace(":", ",").split(", ")}
    assert said == set(SUITES) - {"over_refusal", "toxicity", "new_categories"} - set(WITHOUT_PROMPTS)
    assert len(notes) == 2 and notes[1].endswith("or_bench/toxic: no --data_dir")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("heldout", "--suite heldout: no prompts: give --heldout_file"),
        ("in_distribution", "--suite in_distribution: train and the rest: no prompts: give --train_file"),
        ("toxicity,aart", "--suite aart: no --data_dir: name a folder that holds aart-v1-*.csv of github.com/"),
        (
            "new_categories",
            "--suite new_categories: no held-out prompt is of a category that training has none of: give",
        ),
        ("attack/prefill", "--suite attack/prefill: attack/prefill-1 and the rest: no prompts: give --heldout_file"),
        ("attack/role_play", "--suite attack/role_play: no prompts: give --heldout_file or --train_file"),
    ],
)
def test_what_was_named_and_is_not_there_is_an_error(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        built(text, Sources())
    assert said in str(error.value)


def test_templates_that_were_named_say_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attack/templates: no jailbreak_prompts.csv below .*: get it from github"):
        built("attack/templates", replace(FULL, data_dir=tmp_path))


@pytest.mark.parametrize("text", ["quick", "aart", "attack/templates"])
def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"--data_dir .*nowhere: there is no such folder"):
        built(text, replace(FULL, data_dir=tmp_path / "nowhere"))


def test_a_named_group_takes_what_there_is_of_it() -> None:
    suites, notes = build_suites(resolve_suites("in_distribution,relearning"), replace(FULL, attack=()))
    assert [suite.name for suite in suites] == ["train", "heldout"]
    assert notes == ["left out: attack: no prompts: give --attack_file"]


def test_without_an_unwanted_answer_none_can_be_begun() -> None:
    sources = Sources(heldout=[replace(record, rejected=()) for record in records(3)])
    with pytest.raises(UserError, match=r"no unwanted answer to begin with: give a --heldout_file that has some"):
        built("attack/prefill", sources)
    half = Sources(heldout=[*sources.heldout, *records(2, "more")])
    assert len(built("attack/prefill", half)["attack/prefill-4"].records) == 5, "how many of these is said later"


# ---- categories that training has none of ----


def of(category: str, name: str) -> ForgetRecord:
    return ForgetRecord(f"{name}?", ("good",), ("bad",), f"{name}:1", category)


@given(
    trained=st.lists(st.sampled_from(["", "a", "b"]), max_size=4),
    held=st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=6),
)
def test_held_out_prompts_of_new_categories_are_a_suite_of_their_own(trained: list[str], held: list[str]) -> None:
    sources = Sources([of(c, f"t{at}") for at, c in enumerate(trained)], [of(c, f"h{at}") for at, c in enumerate(held)])
    suites, notes = build_suites(resolve_suites("full"), sources)
    found = {suite.name: [record.category for record in suite.records] for suite in suites}
    new = [category for category in held if category and category not in trained] if any(trained) else []
    old = [category for category in held if category not in new]
    assert (found.get("new_categories", []), found.get("heldout", [])) == (new, old)
    assert not any("new_categories" in note for note in notes) or not old
    assert len(found["attack/base64"]) == len(held), "attacks ask all of them"


def test_where_every_held_out_prompt_is_new_there_is_no_other_and_naming_it_says_so() -> None:
    sources = Sources([of("a", "t")], [of("b", "h")])
    assert list(built("in_distribution", sources)) == ["train", "new_categories"]
    with pytest.raises(UserError, match=r"heldout: all prompts are of categories that .*: they are in new_categories"):
        built("heldout", sources)


# ---- own files ----


def test_own_benign_prompts_and_beginnings_take_the_place_of_the_embedded_ones(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "category": "c", "response": "d"}, {"prompt": " a"}]
    files = [written(tmp_path / "own.jsonl", *rows)]
    expected = (
        ForgetRecord("a", (), (), f"{files[0]}:1"),
        ForgetRecord("b", ("d",), (), f"{files[0]}:2", "c"),
    )
    suites = built("over_refusal,toxicity", Sources(benign_files=files, open_files=files))
    assert suites["over_refusal"].records == suites["toxicity"].records == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, 'field "prompt": is missing'),
        ({"prompt": " "}, 'field "prompt": is empty'),
        ({"prompt": ["a"]}, 'field "prompt": must be a string, not a list'),
        ({"prompt": None}, 'field "prompt": must be a string, not null'),
        ({"prompt": "\ud800"}, 'field "prompt": holds a lone surrogate'),
        ({"prompt": "a", "category": 3}, 'field "category": must be a string, not a number'),
        ({"prompt": "a", "response": ""}, 'field "response": is empty'),
        ("a", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize(("suite", "field"), [("over_refusal", "benign_files"), ("toxicity", "open_files")])
def test_a_bad_row_of_an_own_file_is_named(tmp_path: Path, suite: str, field: str, row: Any, said: str) -> None:
    path = written(tmp_path / "own.jsonl", {"prompt": "good"}, row)
    with pytest.raises(UserError) as error:
        built(suite, Sources(**{field: [path]}))
    assert f"{path}:2: {said}" in str(error.value)
    assert str(error.value).startswith(f"--{field.removesuffix('s')}: ")
