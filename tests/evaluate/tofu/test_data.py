"""The published files, and the log of what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.evaluate.tofu.conftest import by_length, made_up, row, write_tofu
from wpn_ds.errors import UserError
from wpn_ds.evaluate.tofu.data import FILE, SETS, read_log, read_tofu, write_log
from wpn_ds.evaluate.tofu.metrics import with_fluency


def test_every_set_is_read_and_the_answer_stands_for_a_paraphrase_that_a_file_has_not(tofu_dir) -> None:
    data = read_tofu(tofu_dir)
    assert {name: len(items) for name, items in data.items.items()} == dict(zip(SETS, (5, 4, 5, 4), strict=True))
    first = data.items["forget"][0]
    assert first.answers == ("with water 0", "a cloth 0", "the sun 0", "the car 0", "the wash and a sun 0")
    assert data.items["world_facts"][1].paraphrased == data.items["world_facts"][1].answer == "with water 1"
    assert data.files["forget"].startswith("forget10_perturbed.json (sha256 ")


def test_a_limit_takes_items_of_every_set_in_their_order(tofu_dir) -> None:
    whole, few = read_tofu(tofu_dir), read_tofu(tofu_dir, limit=3)
    for name in SETS:
        assert len(few.items[name]) == 3
        assert [item for item in whole.items[name] if item in few.items[name]] == list(few.items[name])


def test_what_is_not_there_is_named(tofu_dir, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--tofu_dir .*none: there is no such folder"):
        read_tofu(tmp_path / "none")
    with pytest.raises(UserError, match=r"--tofu_split forget05: no forget05_perturbed.json .*there are forget10$"):
        read_tofu(tofu_dir, "forget05")
    with pytest.raises(UserError, match=r"--tofu_split \.\./forget10: give a name"):
        read_tofu(tofu_dir, "../forget10")
    (write_tofu(tmp_path / "some") / "real_authors_perturbed.json").unlink()
    with pytest.raises(UserError, match=r"no real_authors_perturbed\.json below it: get it from"):
        read_tofu(tmp_path / "some")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("question", " "),
        ("answer", 3),
        ("answer", None),
        ("paraphrased_answer", None),
        ("perturbed_answer", []),
        ("perturbed_answer", ["a", ""]),
        ("perturbed_answer", "a"),
    ],
)
def test_a_broken_item_is_named_by_file_line_and_field(tmp_path, field, value) -> None:
    bad = row("forget", 1) | {field: value}
    if value is None:
        del bad[field]
    lines = [json.dumps(one) for one in (row("forget", 0), bad)]
    (write_tofu(tmp_path) / "forget10_perturbed.json").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf'forget10_perturbed.json:2: field "{field}": must be'):
        read_tofu(tmp_path)


@pytest.mark.parametrize(("split", "n"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_the_published_files_are_read_whole(shared_data, split, n) -> None:
    folder = shared_data / "tofu"
    if not folder.is_dir():
        pytest.skip(f"no TOFU in {shared_data}")
    data = read_tofu(folder, split)
    assert [len(data.items[name]) for name in SETS] == [n, 400, 100, 117]
    assert {len(item.perturbed) for item in data.items["forget"] + data.items["retain"]} == {5}
    assert {len(item.perturbed) for item in data.items["real_authors"] + data.items["world_facts"]} == {3}
    assert all(item.paraphrased != item.answer for item in data.items["forget"])


def test_a_log_is_read_as_it_was_written(tofu_dir, tmp_path) -> None:
    log = with_fluency(made_up(tofu_dir, 1), by_length)
    path = write_log(tmp_path / "new", log)
    assert path.name == FILE and read_log(path, read_tofu(tofu_dir), 200) == log


def test_a_retain_only_models_log_must_be_of_the_same_questions(tofu_dir, tmp_path) -> None:
    data, path = read_tofu(tofu_dir), write_log(tmp_path, made_up(tofu_dir, 1))
    flag = f"--tofu_retain_log {path}"
    for other, message in (
        (replace(data, split="forget05"), "is of the split forget10, not forget05"),
        (read_tofu(tofu_dir, limit=3), "has n = 5 of forget10, not 3"),
        (replace(data, items=data.items | {"forget": data.items["forget"][::-1]}), "asks other questions"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_log(path, other, 200)
        assert str(caught.value).startswith(flag) and "\n" not in str(caught.value)
        assert "evaluate the retain-only model with" in str(caught.value)
    with pytest.raises(UserError, match="answers of 200 tokens at most, not 48"):
        read_log(path, data, 48)


def test_a_log_that_is_none_is_refused_in_one_line(tofu_dir, tmp_path) -> None:
    path, data = write_log(tmp_path, made_up(tofu_dir, 1)), read_tofu(tofu_dir)
    good = json.loads(path.read_text())
    first = good["sets"]["forget"][0]
    for broken in (
        {},
        [],
        good | {"format": 99},
        good | {"sets": {}},
        good | {"sets": good["sets"] | {"forget": [first | {"loss": "much"}]}},
        good | {"sets": good["sets"] | {"forget": [first | {"perturbed_losses": []}]}},
        good | {"sets": good["sets"] | {"forget": [{"question": "?"}]}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"is no tofu.json of this version: evaluate the retain-only model again$"):
            read_log(path, data, 200)
    path.write_text('{"format": 1,\n oops')
    with pytest.raises(UserError, match=r"tofu.json:2: bad JSON"):
        read_log(path, data, 200)
    with pytest.raises(UserError, match="can't be read"):
        read_log(tmp_path / "none.json", data, 200)
