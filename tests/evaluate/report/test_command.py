from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.evaluate.report.made_up import JUDGES, SETTINGS, mixed, suite, utility, write_metrics
from wpn_ds.cli import main
from wpn_ds.errors import UserError
from wpn_ds.evaluate.report.command import run
from wpn_ds.evaluate.report.figures import figure
from wpn_ds.evaluate.report.files import write_report
from wpn_ds.evaluate.report.runs import run_names
from wpn_ds.evaluate.results import Evaluation, Retain


def evaluation(good: float, perplexity: float, drop: float = 0.0, *, tasks: bool = True) -> Evaluation:
    suites = {
        "train": suite(mixed(40, good), name="train"),
        "heldout": suite(mixed(20, good, 0.1), name="heldout"),
        "attack/role_play": suite(mixed(12, good), name="role", references=False),
        "over_refusal": suite(mixed(10, good / 5), name="benign", kind="benign", references=False),
        "relearning/0": suite(mixed(10, good), name="r"),
        "relearning/10": suite(mixed(10, good / 2), name="r"),
    }
    return Evaluation(suites, Retain(5, 60, perplexity), utility(drop, 0.1) if tasks else {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two evaluated runs with their curves, the second in a folder inside its model's."""
    tmp_path = tmp_path_factory.mktemp("root")
    before = evaluation(0.1, 10.0)
    first, second = tmp_path / "runs" / "wpn", tmp_path / "runs" / "simnpo" / "evaluation"
    for folder, good, drop in ((first, 0.95, 0.01), (second, 0.8, 0.03)):
        model = folder if folder is first else folder.parent
        write_report(
            folder, before, evaluation(good, 10.5, drop), settings=SETTINGS | {"model": str(model)}, judges=JUDGES
        )
        write_metrics(model / "metrics.jsonl", 100)
        (model / "run.yaml").write_text(f"# how it went\nlearning_rate: {good}\nseed: 0\n")
    return [first, second]


def test_one_run_is_drawn_anew_from_its_json(runs, capsys) -> None:
    page = runs[0] / "report.html"
    assert "<h2>Training</h2>" not in page.read_text()
    assert run([str(runs[0])]) == 0
    assert "<h2>Training</h2>" in page.read_text(), "the curves have come since it was evaluated"
    shown = capsys.readouterr().out
    assert "heldout" in shown and shown.rstrip().endswith(str(page))


def test_an_evaluation_finds_the_curves_of_the_model_that_it_names(runs) -> None:
    run([str(runs[1])])
    assert "loss/total" in (runs[1] / "report.html").read_text()


def test_a_training_without_an_evaluation_has_its_curves(tmp_path, capsys) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 100)
    assert run([str(tmp_path), "--output_dir", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Trained for 100 steps; no answer has been judged yet" in page and "loss/npair" in page
    assert 'id="prompts"' not in page and "<script" not in page


def test_several_runs_are_compared_on_a_page_and_on_the_terminal(runs, tmp_path, capsys) -> None:
    assert run([*map(str, runs), "--output_dir", str(tmp_path / "all")]) == 0
    page = (tmp_path / "all" / "compare.html").read_text()
    shown = capsys.readouterr().out
    for name in ("wpn", "evaluation"):
        assert name in page and name in shown
    figures = re.findall(r"<tr><td>Held-out prompts, harmless, %</td>(.*?)</tr>", page)
    assert len(figures) == 1 and figures[0].count("n = 20") == 2
    assert page.count('class="who">wpn</span>') == 4, "a bar a suite; relearning is a curve"
    assert "average change of the benchmarks" in page and "evaluation after 10 steps" in page
    assert "<td>train.learning_rate</td>" in page and "train.seed" not in page, "only settings that differ"
    line = next(line for line in shown.splitlines() if re.match("held-out prompts, harmless, % +20 ", line))
    assert line.count("[") == 2 and max(map(len, shown.splitlines()[:-1])) <= 100
    assert "utility, change in points" in shown and "over-refusal, refused" in shown
    assert shown.rstrip().endswith(str(tmp_path / "all" / "compare.html"))


def test_without_benchmarks_runs_are_set_against_their_perplexity_ratio(tmp_path) -> None:
    for name, good in (("a", 0.9), ("b", 0.7)):
        write_report(
            tmp_path / name, evaluation(0.1, 10.0, tasks=False), evaluation(good, 11.0, tasks=False), settings={}
        )
    run([str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path)])
    page = (tmp_path / "compare.html").read_text()
    assert "retain perplexity, times that of the baseline" in page and "perplexity ratio 1.100" in page


def test_many_runs_wrap_on_the_terminal(tmp_path, capsys) -> None:
    for k in range(5):
        write_report(tmp_path / f"run{k}", None, evaluation(0.9, 10, tasks=False), settings={})
    run([*(str(tmp_path / f"run{k}") for k in range(5)), "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()[:-1]
    assert max(map(len, shown)) <= 100 and sum("run" in line for line in shown) > 1
    assert sum(line.count("[") for line in shown if re.match("training prompts, harmless, % +40 ", line)) == 5


def test_counts_that_differ_between_runs_stand_by_their_figures(tmp_path, capsys) -> None:
    for n in (40, 50):
        write_report(tmp_path / str(n), None, Evaluation({"train": suite(mixed(n, 0.9))}), settings={})
    run([str(tmp_path / "40"), str(tmp_path / "50"), "--output_dir", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training prompts"))
    assert re.search(r"\] n = 40 .*\] n = 50$", line)


@pytest.fixture
def seeded(tmp_path) -> list[str]:
    """Three seeds of one method and one run of another."""
    rates = {("npo", 0): 0.6, ("npo", 1): 0.7, ("npo", 2): 0.8, ("wpn", 0): 0.95}
    for (name, seed), good in rates.items():
        folder = tmp_path / f"{name}-{seed}"
        write_report(folder, evaluation(0.1, 10.0), evaluation(good, 10.5, good / 20), settings=SETTINGS)
        settings = f"objective: {name}\nseed: {seed}\noutput_dir: {folder}\n"
        (folder / "run.yaml").write_text(settings)
        write_metrics(folder / "metrics.jsonl", 10)
    return [str(tmp_path / f"{name}-{seed}") for name, seed in rates]


def test_seeds_of_a_method_stand_as_one_whose_intervals_count_seeds_and_prompts(seeded, tmp_path, capsys) -> None:
    run([*seeded, "--output_dir", str(tmp_path / "all")])
    shown = capsys.readouterr().out
    table = shown[shown.index("over seeds:") :]
    lines = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in table.splitlines()}
    assert lines["seeds"] == ["3", "1"] and "npo" in table.splitlines()[1]
    apart = [float(value) for value in re.findall(r"[\d.]+", lines["held-out prompts, harmless, %"][1])]
    rates = [figure(evaluation(good, 1.0).suites["heldout"]) for good in (0.6, 0.7, 0.8)]
    assert apart[0] == pytest.approx(100 * sum(rate.value for rate in rates) / 3, abs=0.05)
    assert apart[2] - apart[1] > 100 * max(rate.high - rate.low for rate in rates)
    assert lines["held-out prompts, points more than npo"][1] == "-"
    assert re.fullmatch(r"\+\d+\.\d \[-?\d+\.\d, \d+\.\d\]", lines["held-out prompts, points more than npo"][2])
    refused, others = (
        [figure(evaluation(good, 1.0).suites["over_refusal"]).value for good in of] for of in ([0.6, 0.7, 0.8], [0.95])
    )
    gain = float(lines["over-refusal, points more than npo"][2].split()[0])
    assert gain == pytest.approx(100 * (others[0] - sum(refused) / 3), abs=0.05) and gain != 0
    assert "Over seeds" in (tmp_path / "all" / "compare.html").read_text()


def test_runs_of_other_settings_or_of_one_seed_again_are_methods_of_their_own(seeded, tmp_path, capsys) -> None:
    again = tmp_path / "npo-0" / "again"
    write_report(again, None, evaluation(0.6, 10.5), settings=SETTINGS | {"model": str(tmp_path / "npo-0")})
    for folders in ([seeded[0], seeded[3]], [seeded[0], str(again)]):
        run([*folders, "--output_dir", str(tmp_path)])
        assert "over seeds" not in capsys.readouterr().out
        assert "Over seeds" not in (tmp_path / "compare.html").read_text()


def test_a_run_and_a_mere_training_can_be_compared(runs, tmp_path, capsys) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 50)
    run([str(runs[0]), str(tmp_path), "--output_dir", str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training prompts"))
    assert line.endswith(" -")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "there is no such folder"),
        ({}, "neither report.json nor metrics.jsonl"),
        ({"report.json": "{"}, "report.json: broken JSON"),
        ({"report.json": json.dumps({"before": None, "after": {}, "wpn_ds_version": "0.0.9"})}, "of wpn_ds 0.0.9"),
        ({"metrics.jsonl": "", "run.yaml": "a: [1"}, "run.yaml: can't be read"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, files, says, capsys) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        run([str(folder)])
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert not (folder / "report.html").exists()
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_cannot_be_written_is_named(runs, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file can't be used"):
        run([str(runs[0]), "--output_dir", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/evaluation", "/r/b/evaluation"], ["a/evaluation", "b/evaluation"]),
        (["/r/a", "/q/b/a"], ["r/a", "b/a"]),
    ],
)
def test_runs_are_called_by_the_shortest_ends_of_their_paths_that_differ(folders, names) -> None:
    assert run_names([Path(folder) for folder in folders]) == names
