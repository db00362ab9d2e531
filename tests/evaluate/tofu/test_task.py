"""``wpn-ds evaluate --suite tofu``: flags to files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.evaluate.judges.conftest import labelled
from tests.evaluate.tofu.conftest import write_tofu
from tests.interface import check_report
from wpn_ds.errors import UserError
from wpn_ds.evaluate.command import run
from wpn_ds.evaluate.judges.local import fit, save
from wpn_ds.evaluate.report.files import read_report
from wpn_ds.evaluate.tofu import answers

pytestmark = pytest.mark.usefixtures("no_launcher")


def call(folders: Path, out: Path, *more: object) -> dict:
    flags = ["--model", folders / "opt", "--output_dir", out, "--suite", "tofu", "--max_new_tokens", 4, *more]
    assert run(list(map(str, flags))) == 0
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def garbled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("garbled") / "judge"
    save(folder, fit(labelled(), "answer"), {"seed": 0})
    return folder


def test_a_model_with_itself_as_retain_only_model_has_forget_quality_1(
    folders, tofu_dir, garbled, tmp_path, capsys
) -> None:
    first = call(folders, tmp_path / "first", "--tofu_dir", tofu_dir)["tofu"]
    assert first["forget_quality"] is first["cleanness_indistinguishability"] is first["forget_utility"] is None
    printed = capsys.readouterr().out
    assert "model utility" in printed and "n = 4 + 5 + 4" in printed
    assert "--tofu_retain_log" in printed and "--fluency" in printed
    log = tmp_path / "first" / "tofu.json"
    more = ["--tofu_dir", tofu_dir, "--tofu_retain_log", log, "--fluency", f"local:{garbled}"]
    again = call(folders, tmp_path / "again", *more, "--baseline", folders / "neo")
    printed = capsys.readouterr().out
    assert re.search(r"forget quality, p .* -> 1 \(n = 5\).* FU 0\.\d+ -> 0\.\d+ \(n = 5\), CI, p .* -> 1 ", printed)
    assert "--tofu_retain_log" not in printed
    assert again["tofu"]["forget_quality"] == {"p": 1.0, "statistic": 0.0, "n": 5}
    check_report(again, "tofu", "settings.tofu")
    assert again["tofu"]["cleanness_indistinguishability"]["p"] == 1.0
    assert again["tofu"]["sets"] == first["sets"] != again["baseline"]["tofu"]["sets"]
    assert again["tofu"]["sets"]["real_authors"]["n"] == 5
    items = json.loads((tmp_path / "again" / "tofu.json").read_text(encoding="utf-8"))["sets"]["forget"]
    assert len(items) == 5 and all(0 < item["fluency"] < 1 for item in items)
    assert again["settings"]["tofu"]["retain_only"] == str(folders / "opt")
    page = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert "TOFU forget10: forget quality, p 1, model utility" in page and "Real authors" in page
    before, after, rest = read_report(tmp_path / "again" / "report.json")
    assert before and before.tofu and "tofu" not in rest
    assert after.tofu and json.loads(json.dumps(after.tofu.to_json())) == again["tofu"]


def test_what_is_finished_is_not_run_again(folders, tofu_dir, tmp_path, monkeypatch) -> None:
    whole = call(folders, tmp_path / "whole", "--tofu_dir", tofu_dir)["tofu"]
    score, scored = answers.answer_scores, []

    def counted(model, segments, pad):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(segments))
        return score(model, segments, pad)

    monkeypatch.setattr(answers, "answer_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        call(folders, tmp_path / "stopped", "--tofu_dir", tofu_dir)
    assert not (tmp_path / "stopped" / "tofu.json").exists()
    scored.clear()
    monkeypatch.setattr(answers, "answer_scores", lambda *a: scored.append(1) or score(*a))
    assert call(folders, tmp_path / "stopped", "--tofu_dir", tofu_dir)["tofu"] == whole
    assert len(scored) == 2  # four sets, of which two were done


def test_the_limit_is_that_of_every_suite(folders, tofu_dir, tmp_path) -> None:
    found = call(folders, tmp_path / "out", "--tofu_dir", tofu_dir, "--limit", 2)["tofu"]
    assert [one["n"] for one in found["sets"].values()] == [2] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--suite tofu: no --tofu_dir: name a folder"),
        (["--fluency", "hf:x"], "--fluency hf:x: is for the suite tofu: give --tofu_dir"),
        (["--tofu_retain_log", "x.json"], "--tofu_retain_log x.json: is for the suite tofu: give --tofu_dir"),
        (["--tofu_dir", "{tofu}", "--tofu_split", "forget01"], "--tofu_split forget01: no forget01_perturbed.json"),
        (["--tofu_dir", "{tofu}", "--tofu_retain_log", "{tofu}/x.json"], "--tofu_retain_log .*x.json: can't be read"),
        (["--tofu_dir", "{tofu}", "--fluency", "x"], "--fluency x: give hf:NAME"),
        (["--tofu_dir", "{tofu}", "--max_new_tokens", "95"], "--max_new_tokens 95: .* has only 96 positions"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_generated(folders, tmp_path, flags, message) -> None:
    tofu = write_tofu(tmp_path / "tofu")
    with pytest.raises(UserError, match=message) as caught:
        call(folders, tmp_path / "out", *(flag.format(tofu=tofu) for flag in flags))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
