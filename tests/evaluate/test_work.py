from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from wpn_ds.errors import UserError
from wpn_ds.evaluate import work
from wpn_ds.evaluate.work import Ledger, Unit, dated
from wpn_ds.models.folder import identity
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system import progress


class Recorder:
    """Units that say what they ran on, and a model that counts its loads."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.loads = 0

    def load(self) -> tuple[Any, Any]:
        self.loads += 1
        return "model", "tokenizer"

    def units(self, n: int) -> list[Unit]:
        def run(i: int) -> Any:
            def work(model: Any, tokenizer: Any) -> list[str]:
                self.ran.append(i)
                return [f"answer {i}\nof {model}", tokenizer]

            return work

        return [Unit("suite", i, 2, run(i)) for i in range(n)]


def run(folder, recorder: Recorder, units: list[Unit], world=(0, 1)) -> dict[str, Any]:
    results = Ledger(folder, world[0])
    results.run(units, recorder.load, world=world, label="after")
    return results.read()


def test_one_rank_and_several_give_the_same_results(tmp_path) -> None:
    recorder = Recorder()
    alone = run(tmp_path / "alone", recorder, recorder.units(7))
    together: dict[str, Any] = {}
    for rank in range(3):
        together = run(tmp_path / "together", recorder, recorder.units(7), (rank, 3))
    assert alone == together and len(alone) == 7
    assert sorted(recorder.ran) == sorted([*range(7), *range(7)])


def test_finished_units_are_not_run_again_nor_the_model_loaded_for_nothing(tmp_path) -> None:
    first, again, more = Recorder(), Recorder(), Recorder()
    run(tmp_path, first, first.units(4))
    run(tmp_path, again, again.units(4))
    assert (again.ran, again.loads) == ([], 0)
    assert len(run(tmp_path, more, more.units(5), (0, 1))) == 5 and more.ran == [4]


def test_a_line_that_a_kill_cut_short_is_run_again_and_spoils_no_other(tmp_path) -> None:
    recorder = Recorder()
    whole = run(tmp_path, recorder, recorder.units(3))
    file = tmp_path / "rank-0.jsonl"
    for cut in (1, 20, len(file.read_text().splitlines()[-1])):
        file.write_text(file.read_text().rstrip("\n")[:-cut])
        again = Recorder()
        assert run(tmp_path, again, again.units(3)) == whole and again.ran == [2]


def test_what_is_left_is_taken_up_by_another_number_of_ranks(tmp_path) -> None:
    recorder = Recorder()
    run(tmp_path, recorder, recorder.units(6), (0, 2))
    assert recorder.ran == [0, 2, 4]
    rest = Recorder()
    assert len(run(tmp_path, rest, rest.units(6))) == 6 and rest.ran == [1, 3, 5]


def test_units_of_other_content_or_name_have_another_key() -> None:
    unit = Unit("suite", [[1, 2], 48], 1, lambda model, tokenizer: None)
    assert unit.key == Unit("suite", [[1, 2], 48], 9, lambda model, tokenizer: 1).key
    for other in (Unit("suite", [[1, 2], 49], 1, unit.run), Unit("other", [[1, 2], 48], 1, unit.run)):
        assert other.key != unit.key


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--output_dir {tmp_path / 'file'} can't be used"):
        Ledger(tmp_path / "file" / "answers" / "model")


def test_a_model_is_its_own_files_and_not_what_lies_beside_them(tmp_path) -> None:
    own = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    own += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"]
    own += [
        "chat_template.jinja",
        "pytorch_model.bin",
        "modeling_own.py",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    for name in own:
        (tmp_path / name).write_bytes(b"1234")
    first = identity(str(tmp_path))
    assert sorted(first) == sorted(own)
    beside = ["report.json", "tofu.json", "metrics.jsonl", "run.yaml", "DONE", "idle.jsonl", "events.json", "LICENSE"]
    beside += ["comparison.html", ".gitattributes", "README.md", "slurm-7.log", "PLANTED", "forget.jsonl"]
    for name in beside:
        (tmp_path / name).write_text("{}")
    (tmp_path / "answers").mkdir()
    assert identity(str(tmp_path)) == first
    for name in own:
        before = identity(str(tmp_path))
        (tmp_path / name).write_bytes(b"12345")
        assert identity(str(tmp_path)) != before, name
    assert identity("facebook/opt-125m") == "facebook/opt-125m"


def test_all_calls_and_ranks_that_share_work_write_one_day_into_a_chat_template_that_asks_for_it(
    tmp_path, monkeypatch
) -> None:
    dates = SimpleNamespace(chat_template="{{ strftime_now('%d') }}")
    plain = SimpleNamespace(chat_template=None)
    days = iter(["2026-01-01", "2026-01-02", "2026-01-03"])
    monkeypatch.setattr(work, "today", lambda: next(days))
    style = PromptStyle()
    assert dated(style, plain, tmp_path / "answers") == style and not (tmp_path / "answers").exists()
    assert [dated(style, dates, tmp_path / "answers").chat_date for _ in range(2)] == ["2026-01-01"] * 2
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["chat_date"]
    given = PromptStyle(chat_date="2020-02-02")
    assert dated(given, dates, tmp_path / "answers") == given


def test_a_long_unit_is_never_silent_and_a_line_names_it_once(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    unit = Unit("lessons", 1, 3, lambda *_: time.sleep(0.3))
    Ledger(tmp_path / "answers" / "x").run([unit], lambda: (None, None), world=(0, 1), label="after")
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("after: lessons: 00:0") for line in lines) >= 3
    assert not any(": :" in line for line in lines)
