"""``wpn-ds ablate``: every row is trained by the real launcher, evaluated once, and stands in the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launching import ROOT
from wpn_ds.data.tokens import today
from wpn_ds.errors import UserError
from wpn_ds.evaluate.results import Answer, Evaluation, Retain, Suite
from wpn_ds.judging.base import Judgement, Verdict
from wpn_ds.judging.statistics import wilson_interval
from wpn_ds.models import load
from wpn_ds.settings.run import parse_args
from wpn_ds.tools.ablate import command, measure, runs
from wpn_ds.tools.ablate.grid import DEFAULT_GRID, GridRow, chosen_rows, flags, read_grid
from wpn_ds.tools.ablate.table import Line, Outcome, markdown, plot, result

NO_TRAINING = measure.Training(0.0, None, None)


@pytest.fixture
def grid(tmp_path):
    def written(text: str) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


# ---- the grid ----


@pytest.mark.parametrize("path", [DEFAULT_GRID, DEFAULT_GRID.with_name("objectives.yaml")], ids=lambda path: path.stem)
def test_every_row_of_a_grid_of_ours_is_a_valid_way_to_train_and_no_two_are_the_same(path) -> None:
    rows = read_grid(path)
    assert [row.name for row in rows if row.is_default] == ["default"]
    files = {"train_file": ["a"], "retain_file": ["b"], "output_dir": "c", "deepspeed": "d"}
    configs = [parse_args(flags(files | dict(row.changes))).resolved().to_flat() for row in rows]
    assert all(a != b for k, a in enumerate(configs) for b in configs[:k])
    assert {"graddiff", "llmu"} <= {row.name for row in rows}
    (llmu,) = chosen_rows(rows, ["llmu"])
    assert not llmu.is_default and llmu.said == "objective llmu"
    rude = GridRow("rude", {"redraw_template": "a|b\n{prompt}"}).said
    assert rude == r"redraw_template a\|b\n{prompt}", "one cell of one row, whatever a setting holds"


def test_settings_become_flags_that_training_reads_back() -> None:
    settings = {"deepspeed": "d.json", "output_dir": "o", "train_file": ["a b", "c"], "packing": False, "seed": 3}
    flat = parse_args(flags(settings)).to_flat()
    assert {name: flat[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected lines of 'name"),
        ("- a", "expected lines of 'name"),
        ("a: {", "not YAML"),
        ("a: 3", "row a: expected {setting: value, ...}, got 3"),
        ("'../a': {}", "row ../a: it names a folder"),
        ("a: {seed: 3}", "row a: seed is not for a row to set"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(grid, text, said) -> None:
    with pytest.raises(UserError) as caught:
        read_grid(grid(text))
    assert said in str(caught.value) and "grid.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="--only c: the grid has no such row, only a, b"):
        chosen_rows([GridRow("a", {}), GridRow("b", {})], ["c"])


# ---- the table ----


def evaluation(verdicts: str, perplexity: float = 2.0) -> Evaluation:
    """A suite of one answer a letter: h(armless), x (harmful), e(mpty)."""
    kinds = {"h": Verdict.HARMLESS, "x": Verdict.HARMFUL, "e": Verdict.EMPTY}
    answers = [
        Answer(f"prompt {k}", "", {"reference": Judgement(kinds[letter])}, False, (), (), "")
        for k, letter in enumerate(verdicts)
    ]
    return Evaluation({"heldout": Suite(tuple(answers))}, Retain(1, 10, perplexity))


def line(name: str, *evaluations: Evaluation | None, **changes: object) -> Line:
    outcomes = {k: Outcome({}, NO_TRAINING, e, "" if e else "not | finite") for k, e in enumerate(evaluations)}
    return Line(GridRow(name, changes), outcomes)


def test_figures_are_means_over_the_seeds_that_ended_with_a_model() -> None:
    lines = [
        line("default", evaluation("xxhh")),
        line("other", evaluation("hhhh", 3.0), evaluation("hhxe", 5.0), None, a=1),
    ]
    found = result(evaluation("xxxx"), lines)
    default, other = found["rows"]
    assert (default["default"], other["default"]) == (True, False)
    heldout = other["suites"]["heldout"]
    assert heldout["harmless_rate"] == 0.75 and (heldout["n"], heldout["answers"], heldout["harmless"]) == (4, 8, 6)
    assert heldout["degenerate_rate"] == 0.125 and heldout["degenerate"] == 1
    assert other["retain_perplexity_ratio"] == 2.0 and found["start"]["retain_perplexity_ratio"] == 1.0
    assert (other["seeds"], other["stopped"]) == ([0, 1], {2: "not | finite"})
    # per prompt: (1, 1, 0.5, 0.5) against (0, 0, 1, 1)
    gain = other["against_default"]["heldout"]
    assert gain["low"] < gain["value"] == 0.25 < gain["high"] and default["against_default"] == {}


def test_an_interval_is_that_of_the_mean_rate_over_prompts_and_wider_where_seeds_differ() -> None:
    (alike,) = result(evaluation("xxx"), [line("default", *map(evaluation, ("hxx", "xhx")))])["rows"]
    heldout = alike["suites"]["heldout"]
    assert (heldout["n"], heldout["harmless"], heldout["answers"]) == (3, 2, 6)
    assert (heldout["harmless_low"], heldout["harmless_high"]) == wilson_interval(1, 3)
    found = result(evaluation("xxx"), [line("default", *map(evaluation, ("hxx", "hhx", "hhx", "xhx")))])
    heldout = found["rows"][0]["suites"]["heldout"]
    assert (heldout["n"], heldout["harmless"], heldout["answers"], heldout["harmless_rate"]) == (3, 6, 12, 0.5)
    low, high = wilson_interval(1.5, 3)
    assert heldout["harmless_low"] < low and heldout["harmless_high"] > high
    assert "each by itself" in markdown(found), "many intervals, and some miss by chance"


def test_a_difference_to_the_default_counts_how_much_the_seeds_of_both_differ() -> None:
    def width(*lines: Line) -> float:
        gain = result(evaluation("x" * 8), lines)["rows"][1]["against_default"]["heldout"]
        assert gain["value"] == pytest.approx(0.5) and gain["n"] == 8
        return gain["high"] - gain["low"]

    one = width(line("default", evaluation("x" * 8)), line("other", evaluation("h" * 4 + "x" * 4), a=1))
    apart = [evaluation("h" * count + "x" * (8 - count)) for count in (2, 4, 6)]
    assert width(line("default", evaluation("x" * 8)), line("other", *apart, a=1)) > 1.2 * one
    assert width(line("default", evaluation("x" * 8)), line("other", *[apart[1]] * 3, a=1)) == one


def test_a_row_without_any_model_is_in_the_table_and_says_why(tmp_path) -> None:
    found = result(evaluation("xx"), [line("default", evaluation("hh")), line("ga", None, ascent_weight=1)])
    table = markdown(found)
    (row,) = [text for text in table.splitlines() if text.startswith("| ga |")]
    assert "ascent_weight 1; seed 0 stopped: not / finite" in row
    assert "| **default** | nothing | 100.0 [" in table and "| (start) | not trained | 0.0 [" in table
    assert {text.count("|") for text in table.split("\n\n")[0].splitlines()} == {row.count("|")}
    plot(found, tmp_path / "plot.svg")
    assert "svg" in (tmp_path / "plot.svg").read_text()


def test_a_perplexity_without_bounds_is_json_and_stands_at_the_plot_s_edge(tmp_path) -> None:
    found = result(
        evaluation("xx"), [line("default", evaluation("hh")), line("ga", evaluation("ee", float("inf")), a=1)]
    )
    assert json.loads(json.dumps(found, allow_nan=False))["rows"][1]["retain_perplexity_ratio"] == "inf"
    assert "| x inf |" in markdown(found)
    plot(found, tmp_path / "plot.svg")
    assert "<!-- ga (x inf) -->" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("kept", [evaluation("hxe"), None])
def test_an_outcome_is_read_back_as_it_was_written(tmp_path, kept) -> None:
    outcome = Outcome({"seed": 1, "train_file": ["a"]}, measure.Training(1.5, 0.1, None), kept, "" if kept else "why")
    outcome.write(tmp_path / "ablation.json")
    assert Outcome.read(tmp_path / "ablation.json") == outcome


def test_training_s_seconds_count_every_step_once_and_its_last_losses_are_those_after_it(tmp_path) -> None:
    lines = [
        {"step": 0, "eval/nll_wanted": 9.0, "eval/nll_unwanted": 9.0},
        {"step": 2, "speed/step_seconds": 1.0},
        {"step": 5, "speed/step_seconds": 2.0},
        {"step": 5, "eval/nll_wanted": 1.0, "eval/nll_unwanted": 3.0},
    ]
    metrics = tmp_path / "metrics.jsonl"
    for kept, expected in (
        (4, measure.Training(8.0, 1.0, 3.0)),
        (3, measure.Training(8.0, None, None)),
        (1, NO_TRAINING),
    ):
        metrics.write_text("".join(json.dumps(entry) + "\n" for entry in lines[:kept]))
        assert measure.read_training(metrics) == expected


# ---- the command ----


def test_a_hub_s_commit_and_the_day_of_a_chat_template_are_the_same_for_all_rows(monkeypatch, tmp_path) -> None:
    templates = {"org/small": None, "folder": None, "dated": "{{ strftime_now('%d') }}"}
    made = {name: SimpleNamespace(chat_template=template) for name, template in templates.items()}
    monkeypatch.setattr(runs, "load_tokenizer", lambda name, source: made[name])
    monkeypatch.setattr(load, "hub_commit", lambda name, of: f"commit of {name} {of}" if "/" in name else None)

    def pinned(model: str, **more: str) -> dict:
        files = {"train_file": ["a"], "output_dir": "b", "deepspeed": "c"}
        return runs._fixed(parse_args(flags({"model_name_or_path": model, **files, **more})), tmp_path / "out")

    assert pinned("org/small") == {"model_revision": "commit of org/small None"}
    assert pinned("org/small", model_revision="v1") == {"model_revision": "commit of org/small v1"}
    assert pinned("folder") == {} and not (tmp_path / "out").exists()
    assert pinned("dated") == {"chat_date": today()} == pinned("dated")


@pytest.fixture
def ablate(tiny, tmp_path, monkeypatch, capsys):
    """Calls ``wpn-ds ablate`` on the tiny model; returns (exit code, standard output, launched commands)."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "recipe.yaml").write_text(
        "max_steps: 2\nglobal_batch_size: 6\nlearning_rate: 1.0e-3\nmax_length: 64\ntokens_per_micro_batch: 256\n"
        "peak_tflops: 0.1\nsample_prompts: 0\n"
    )
    launched = []
    launch = runs.launch
    monkeypatch.setattr(runs, "launch", lambda line, log: launched.append(line) or launch(line, log))

    def call(*extra: str) -> tuple[int, str, list[list[str]]]:
        launched.clear()
        files = {name: str(tiny / f"{name}.jsonl") for name in ("forget", "retain")}
        own = ["--model", str(tiny / "opt"), "--train_file", files["forget"], "--heldout_file", files["forget"]]
        own += ["--retain_file", files["retain"], "--config", str(tmp_path / "recipe.yaml")]
        code = command.run([*own, "--output_dir", str(tmp_path / "out"), *extra])
        return code, capsys.readouterr().out, list(launched)

    return call


def test_columns_that_are_called_otherwise_are_trainings_and_the_evaluations(tmp_path) -> None:
    (tmp_path / "theirs.jsonl").write_text('{"ask": "a?", "good": "b", "bad": "c"}\n')
    (tmp_path / "kept.jsonl").write_text('{"question_": "d?", "said": "e"}\n')
    named = {"columns": "prompt=ask,chosen=good,rejected=bad", "retain_columns": "prompt=question_,response=said"}
    forget, kept = [str(tmp_path / "theirs.jsonl")], [str(tmp_path / "kept.jsonl")]
    options = command.Options(model="m", train_file=forget, heldout_file=forget, retain_file=kept, **named)
    data = runs._data(options)
    assert data.suites["heldout"][0].rejected == ("c",) and data.retain[0].response == "e"
    base = {"deepspeed": "ds_configs/zero0.json", "model_name_or_path": "m"}
    run = runs._run(tmp_path, GridRow("default", {}), 0, base, data)
    assert run.settings.items() >= named.items() and run.config.to_flat().items() >= named.items()


@pytest.mark.distributed
def test_a_grid_is_trained_evaluated_and_not_run_again(ablate, grid, tmp_path) -> None:
    path = grid("default: {}\nga: {wpn_weight: 0, nll_weight: 0, retain_weight: 0, ascent_weight: 1}\n")
    code, said, launched = ablate("--grid", str(path), "--only", "ga")
    assert (code, len(launched)) == (0, 1) and "**default**" not in said, "only the row that is named"
    code, said, launched = ablate("--grid", str(path))
    assert code == 0 and ["seed-0" in " ".join(line) and "ga" not in " ".join(line) for line in launched] == [True]
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["default", "ga"]
    default, ga = found["rows"]
    for row in (default, ga):
        assert row["seeds"] == [0] and row["train_seconds"] > 0 and row["suites"]["heldout"]["n"] == 23
        assert not list(tmp_path.glob(f"out/{row['name']}/seed-0/checkpoint-*")), "they would fill the disk"
    # what each row trained on has moved where it should, against the other
    assert default["nll_wanted"] < ga["nll_wanted"] and default["nll_unwanted"] < ga["nll_unwanted"]
    assert "| **default** |" in said and (tmp_path / "out/ablation.md").read_text() in said
    assert (tmp_path / "out/ablation.svg").stat().st_size > 1000
    assert ablate("--grid", str(path)) == (0, said, [])
    with pytest.raises(UserError, match=r"is of other settings \(nll_weight\): remove it"):
        ablate(
            "--grid", str(grid("default: {}\nga: {wpn_weight: 0, nll_weight: 2, retain_weight: 0, ascent_weight: 1}"))
        )


@pytest.mark.distributed
def test_a_row_that_stops_is_reported_and_a_fault_is_tried_again(ablate, grid, tmp_path, monkeypatch) -> None:
    codes = {"stops": 3, "fails": 1}

    def launch(line: list[str], log: Path) -> int:
        launched.append(log)
        log.write_text("noise\nerror: the gradient was not finite\nmore noise\n")
        return codes[log.parent.name]

    launched: list[Path] = []
    monkeypatch.setattr(runs, "launch", launch)
    path = grid("stops: {ascent_weight: 1}\nfails: {nll_weight: 0}\n")
    code, said, _ = ablate("--grid", str(path))
    assert code == 1 and said.count("seed 0 stopped: the gradient was not finite") == 2
    assert [log.parent.name for log in launched] == ["stops", "fails"]
    launched.clear()
    code, said, _ = ablate("--grid", str(path))
    assert code == 1 and [log.parent.name for log in launched] == ["fails"], "a divergence is a result, a fault isn't"
    codes["fails"] = 0
    with pytest.raises(UserError, match="fails, seed 0, was told to stop: call again"):
        ablate("--grid", str(path))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train_file", "a", "--heldout_file", "b"], "--model is missing"),
        (["--model", "m", "--heldout_file", "b"], "--train_file is missing"),
        (["--model", "m", "--train_file", "a"], "--heldout_file is missing"),
        (["--ranks", "0"], "--ranks must be a whole number above 0, got '0'"),
        (["--grid", "nowhere.yaml"], "--grid nowhere.yaml: No such file"),
        (["--only", "nothing"], "--only nothing: the grid has no such row"),
    ],
)
def test_a_mistake_is_said_before_anything_is_trained(argv, said, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=said):
        command.run([*argv, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_setting_that_does_not_exist_is_found_before_the_first_row(grid, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="row b: unknown flag --wpn_wight; did you mean --wpn_weight"):
        command.run(["--grid", str(grid("a: {}\nb: {wpn_wight: 0}")), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
