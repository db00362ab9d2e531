"""The experiment on a real model: what is chosen and said of figures, and a small run, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import real, real_cells, real_plan, real_table
from benchmarks.real_cells import Bench, write_data
from benchmarks.real_plan import METHODS, SEARCH, SMALL, Cell, Sizes, plan, wanted
from benchmarks.setting import FORGET
from wpn_ds.errors import UserError
from wpn_ds.evaluate.benchmarks import BENCHMARKS
from wpn_ds.evaluate.published import PUBLISHED
from wpn_ds.settings.run import parse_args
from wpn_ds.tools.ablate.grid import flags

checked = settings(max_examples=40)

RATES = st.sampled_from([5e-5, 1e-4, 2e-4])
SHARES = st.floats(0, 1)
PARTS = st.lists(st.sampled_from(sorted(METHODS | SEARCH)), unique=True, min_size=1)


def figures(harmless: float, degenerate: float = 0.0, perplexity: float | None = 2.0) -> dict[str, Any]:
    return {"harmless": {"rate": harmless}, "degenerate": {"rate": degenerate}, "perplexity": perplexity}


# ---- the plan ----


@checked
@given(methods=PARTS, search=PARTS, seeds=st.sets(st.integers(0, 9), min_size=1))
def test_every_cell_comes_once_and_after_those_that_it_needs(methods, search, seeds) -> None:
    cells = plan(Sizes(methods=tuple(methods), search=tuple(search), seeds=tuple(seeds)))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for at, cell in enumerate(cells):
        assert set(cell.needs) <= set(names[:at]), cell
        assert real_plan.expected_minutes(cell, {}, "CPU") <= 20


def test_a_cell_lasts_as_long_as_its_like_on_the_same_device() -> None:
    cell = Cell("ask", "pku", "dpo", 0)
    measured = {
        "ask/pku/neat/0": {"minutes": 3.0, "device": "GPU"},
        "ask/pku/npo/0": {"minutes": 5.0, "device": "GPU"},
        "ask/rude/npo/0": {"minutes": 7.0, "device": "GPU"},
    }
    assert real_plan.expected_minutes(cell, measured, "GPU") == 5
    assert real_plan.expected_minutes(cell, measured, "CPU") == real_plan.MINUTES["ask"]["pku"]


@checked
@given(st.data())
def test_what_a_cell_needs_is_wanted_with_it(data) -> None:
    cells = plan(Sizes())
    asked = data.draw(st.sampled_from(cells))
    chosen = wanted(cells, [asked.name])
    names = {cell.name for cell in chosen}
    assert asked.name in names and all(set(cell.needs) <= names for cell in chosen)
    assert {f"start/{asked.twin}", f"start/{real_plan.ORIGINAL}"} & names or asked.kind in ("judge", "start")


def test_a_pattern_stands_for_a_whole_name_or_for_parts_of_it() -> None:
    name = "ask/pku/wpn-likelihood/0"
    assert all(real_plan.matches(name, p) for p in ("ask", "pku/wpn*", "wpn-likelihood", "*/0", name, "0"))
    assert not any(real_plan.matches(name, p) for p in ("wpn", "know/*", "pku/wpn", "rude*"))


def test_every_method_takes_its_settings_as_flags_that_training_has(tmp_path) -> None:
    bench = Bench(tmp_path, tmp_path, tmp_path, Sizes())
    for name in METHODS:
        own = {"retain_loss": "kl", "output_dir": "x", "reference": "states"} | real_plan.settings_of(name)
        parse_args(flags(real_cells._budget(bench, "pku") | own))
    assert not METHODS.keys() & SEARCH.keys() and {*map(real_plan.family, SEARCH)} <= METHODS.keys()
    default = parse_args(["--output_dir", "x", "--deepspeed", "zero0.json"]).objective
    assert all(getattr(default, name) == value for name, value in METHODS[real_plan.DEFAULT].items())


# ---- choices ----


@checked
@given(
    tried=st.dictionaries(RATES, st.builds(figures, SHARES, st.floats(0, 0.05), st.floats(1, 3)), min_size=1),
    start=st.floats(1, 3),
    stopped=st.sets(RATES),
)
def test_the_most_harmless_rate_within_the_bounds_is_chosen(tried, start, stopped) -> None:
    tried |= {rate: {"stopped": "why"} for rate in stopped}
    chosen = real_plan.chosen_rate(tried, start)
    ended = {rate: of for rate, of in tried.items() if "stopped" not in of}
    if not ended:
        assert chosen is None
        return
    allowed = [r for r, of in ended.items() if of["degenerate"]["rate"] <= 0.02 and of["perplexity"] <= 1.05 * start]
    if allowed:
        best = max(ended[rate]["harmless"]["rate"] for rate in allowed)
        assert chosen == min(rate for rate in allowed if ended[rate]["harmless"]["rate"] == best)
    else:
        assert ended[chosen]["perplexity"] == min(of["perplexity"] for of in ended.values())


def test_a_perplexity_that_is_no_number_is_the_worst() -> None:
    assert real_plan.chosen_rate({1e-4: figures(1.0, 0.0, None), 2e-4: figures(0.1, 0.5, 9.0)}, 2.0) == 2e-4


@checked
@given(losses=st.dictionaries(st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.25]), st.floats(-0.1, 0.2), min_size=1))
def test_at_equal_damage_the_bound_is_lost_or_no_mixture_loses_it(losses) -> None:
    alpha = real_plan.equal_damage(losses, 0.01)
    lost = real_plan.between({0.0: 0.0, **losses}, alpha)
    if losses[max(losses)] > 0.01:
        assert lost == pytest.approx(0.01)
    else:
        assert alpha == max(losses)
    assert all(loss > 0.01 for place, loss in losses.items() if place > alpha)


@checked
@given(rate=st.floats(0.011, 1))
def test_of_losses_on_a_line_equal_damage_is_the_bounds_place_on_it(rate) -> None:
    losses = {alpha: rate * alpha for alpha in (real_plan.ALPHA, 1.0)}
    assert real_plan.equal_damage(losses, 0.01) == pytest.approx(0.01 / rate)


# ---- what is said ----

MARKS = st.text(alphabet="10-?", min_size=1, max_size=60)


@checked
@given(seeds=st.lists(MARKS, min_size=1, max_size=3), copies=st.integers(2, 3))
@example(seeds=["0000110000"], copies=3)  # three times 0.2 have a mean that isn't 0.2
def test_a_pair_of_models_differs_by_prompts_and_by_seeds_that_differ(seeds, copies) -> None:
    length = min(map(len, seeds))
    ours = [marks[:length].replace("?", "0") for marks in seeds]
    theirs = [marks[::-1] for marks in ours]
    found = real_table.paired(ours, theirs)
    rates = [sum(m.count("1") for m in of) / length / len(of) for of in (ours, theirs)]
    assert found.value == pytest.approx(rates[0] - rates[1]) and found.n == length
    alone, again = (real_table.paired(ours[:1] * times, theirs[:1] * times) for times in (1, copies))
    assert again == alone, "the same seed again says nothing new"
    assert real_table.paired(ours, ours).value == 0
    swapped = real_table.paired(theirs, ours)
    assert (swapped.value, swapped.n) == (pytest.approx(-found.value), found.n)


def test_prompts_without_a_verdict_are_left_out_of_a_pair() -> None:
    assert real_table.paired(["1?1"], ["01?"]).n == 1
    assert real_table.paired(["1?"], ["01"]).value == 1


def judge(right: float, n: int = 10**6) -> dict[str, Any]:
    of = {"value": right, "low": right, "high": right, "count": round(right * n), "n": n}
    return {"sensitivity": of, "specificity": of, "auc": of, "brier": 0.1}


@checked
@given(marks=st.lists(st.text(alphabet="10-", min_size=1, max_size=80), min_size=1, max_size=3))
def test_a_judge_that_never_errs_corrects_nothing_and_noise_is_never_harmless(marks) -> None:
    said = "".join(marks)
    found = real_table.corrected(marks, judge(1.0))
    if not set(said) & {"0", "1"}:
        assert found is None
        return
    assert found is not None and found.value == pytest.approx(said.count("1") / len(said), abs=1e-4)
    assert found.low <= found.value <= found.high <= 1 - said.count("-") / len(said) + 1e-9


def test_a_judge_that_errs_is_corrected_and_one_that_guesses_says_nothing() -> None:
    marks = "1" * 74 + "0" * 26  # of 80 % harmless, a judge that is right in 9 of 10 finds 74
    found = real_table.corrected([marks], judge(0.9))
    assert found is not None and found.value == pytest.approx(0.8, abs=1e-3)
    assert real_table.corrected([marks], judge(0.5)) is None


def asked(marks: str, prompts: str = "a") -> dict[str, Any]:
    suite = {"verdicts": marks, "prompts": prompts, "refusal": {"rate": 0.1}, "harmless": {"rate": 0.5}}
    suites = dict.fromkeys((*real_cells.UNSEEN["pku"], "over_refusal", "attack/base64", "attack/prefill-4"), suite)
    return {"suites": suites, "retain": {"perplexity": 2.1}}


def known(mean: float, items: str = "1100") -> dict[str, Any]:
    return {"mean": mean, "benchmarks": {"copa": {"n": 4, "value": mean, "items": items}}}


WHOLE = {
    "judge/pku": judge(0.9),
    "start/pku": figures(0.1),
    "know/pku/start": known(0.5),
    **{f"ask/pku/wpn-states/{seed}": asked("1101-1") for seed in (0, 1)},
    **{f"know/pku/wpn-states/{seed}": known(0.49, "1101") for seed in (0, 1)},
    "ask/pku/nll-kl/0": asked("1001-0"),
    "mix/pku/wpn-states/0": asked("1111-1") | {"alpha": 0.9, "means": {"0.75": 0.5, "1": 0.49}},
    "relearn/pku/wpn-states/0": {"suites": {"relearning/0": {}, "relearning/20": {"harmless": {"rate": 0.25}}}},
    "unlearn/pku/wpn-states/0": {"learning_rate": 1e-4, "training": {"tokens_given": 1000}},
    "unlearn/pku/nll-kl/0": {"learning_rate": 1e-4, "training": {"tokens_given": 1049}},
    "choose/pku/wpn-states/0.0001": {"learning_rate": 1e-4, **figures(0.7) | {"harmless": {"rate": 0.7, "n": 64}}},
    "choose/pku/wpn-states/0.0002": {"learning_rate": 2e-4, "stopped": "gradient not finite", "training": {}},
}


def test_goal_and_npair_come_once_their_cells_are_there() -> None:
    found, adds = real_table.goal(WHOLE), real_table.npair_adds(WHOLE)
    assert found is not None and found["benchmarks_mean_loss"] == pytest.approx(0.02)
    assert found["n"] == 6 * 6 and found["degenerate"] == pytest.approx(1 / 6) and found["seeds"] == 2
    assert adds is not None and adds["difference"] == pytest.approx(2 / 6) and (adds["n"], adds["seeds"]) == (36, 1)
    for name in ("judge/pku", "know/pku/start"):
        assert real_table.goal({key: of for key, of in WHOLE.items() if key != name}) is None
    for method in ("wpn-states", "nll-kl"):
        part = {key: of for key, of in WHOLE.items() if not key.startswith(f"ask/pku/{method}/")}
        assert real_table.npair_adds(part) is None


def test_answers_to_other_prompts_are_not_compared() -> None:
    with pytest.raises(UserError, match="the same prompts of heldout"):
        real_table.npair_adds(WHOLE | {"ask/pku/nll-kl/0": asked("1001-0", prompts="b")})


def test_budgets_that_differ_are_told() -> None:
    assert real_table.budgets(WHOLE, "pku").endswith("1,000 to 1,049 tokens: within 5 %.")
    more = {"unlearn/pku/neat/0": {"training": {"tokens_given": 1051}}}
    assert "NOT the same budget" in real_table.budgets(WHOLE | more, "pku")


def test_the_tables_say_what_was_measured_and_nothing_of_the_rest(monkeypatch) -> None:
    monkeypatch.setattr(real_table, "PREFILLED", ("attack/prefill-4",))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in real_table.table(WHOLE, "pku").splitlines()
    ]
    assert [row[0] for row in rows[2:]] == ["**wpn-states**", "nll-kl"]
    of = dict(zip(rows[0], rows[2], strict=True))
    assert of["seeds"] == "2" and of["harmless, %"] == "66.7 [66.7, 66.7]" and of["relearned, %"] == "25.0"
    assert of["benchmarks, points"].startswith("+25.0 [") and of["retain perplexity"].startswith("x 1.050")
    assert of["equal damage: harmless, % (alpha)"] == "83.3 (0.90)" and of["prefilled, %"].startswith("66.7")
    assert real_table.table(WHOLE, "rude") == ""
    said = real_table.tried(WHOLE, {"pku/wpn-states": 1e-4})
    assert "| pku/wpn-states | 0.0001 | 64 | 70.0 | 0.0 | x 1.000 | chosen |" in said and "stopped" in said


def test_depth_stands_by_position_with_unwanted_answers_before_wanted_ones() -> None:
    def at(first: float, later: float | None) -> list[dict[str, Any]]:
        return [{"positions": "1", "nll": first}, {"positions": "2-3", "nll": later}]

    one, other = ({"depth": {"unwanted": at(5.0, later), "wanted": at(1.0, 0.5)}} for later in (2.0, 3.0))
    found = {"ask/pku/wpn-states/0": one, "ask/pku/wpn-states/1": other, "ask/pku/neat/0": {}}
    lines = real_table.depths(found, "pku").splitlines()
    assert lines[0] == "| nats a token, at token | 1 | 2-3 |" and len(lines) == 3
    assert lines[2].endswith("| 2.50 [2.00, 3.00] / 0.50 [0.50, 0.50] |")
    endless = {"ask/pku/wpn-states/0": {"depth": {"unwanted": at(5.0, None), "wanted": at(1.0, 0.5)}}}
    assert "| inf / 0.50 |" in real_table.depths(endless, "pku") and real_table.depths(WHOLE, "pku") == ""


def test_the_plot_has_a_line_from_each_model_to_its_mixture(tmp_path) -> None:
    assert real_table.places(WHOLE, "pku", "wpn-states") == [
        [(pytest.approx(49.4), pytest.approx(500 / 6)), (49.0, pytest.approx(400 / 6))],
        [(49.0, pytest.approx(400 / 6))],
    ]
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        real_table.plot(WHOLE, path)
    first, second = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first == second and b"wpn" in first and len(first) < 60_000


def test_the_page_keeps_what_is_around_the_tables(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{real_table.BEGIN}\nold\n{real_table.END}\nafter\n")
    for text in ("one", "two"):
        real_table.written(page, text)
    assert page.read_text() == f"before\n{real_table.BEGIN}\n\ntwo\n\n{real_table.END}\nafter\n"


# ---- the command ----


def bench(folder: Path) -> Bench:
    return Bench(folder, folder, folder, SMALL)


CELLS = [Cell("judge", "pku"), Cell("start", "pku", needs=("judge/pku",)), Cell("ask", "pku", "start", None, ())]


def run_all(monkeypatch, tmp_path, run, known, minutes=float("inf")) -> list[str]:
    monkeypatch.setattr(real, "run_cell", run)
    return real.run_all(CELLS, bench(tmp_path), known, tmp_path / "real.json", minutes)


def test_a_cell_that_fails_holds_up_only_those_that_need_it(monkeypatch, tmp_path, capsys) -> None:
    def run(cell: Cell, *_: object) -> dict[str, Any]:
        if cell.kind == "judge":
            raise UserError("no")
        return asked("1") | figures(1 / 3)

    results: dict[str, Any] = {"cells": {}, "settings": {"learning_rates": [1e-4]}}
    assert run_all(monkeypatch, tmp_path, run, results) == ["judge/pku"]
    assert list(results["cells"]) == ["ask/pku/start"]
    said = capsys.readouterr().err
    assert "judge/pku FAILED: no" in said and "start/pku waits for judge/pku" in said
    kept = json.loads((tmp_path / "real.json").read_text())
    assert kept["cells"]["ask/pku/start"]["harmless"]["rate"] == 0.333333 and kept["goal"] is None


def test_no_cell_begins_that_would_not_end_in_time_and_none_is_run_again(monkeypatch, tmp_path, capsys) -> None:
    ran = []

    def run(cell: Cell, *_: object) -> dict[str, Any]:
        ran.append(cell.name)
        return judge(0.9) | asked("1")

    results: dict[str, Any] = {"cells": {}, "settings": {"learning_rates": [1e-4]}}
    least = min(real_plan.MINUTES[cell.kind][cell.twin] for cell in CELLS)
    assert not run_all(monkeypatch, tmp_path, run, results, minutes=least - 0.1) and not ran
    assert "no time is left for it" in capsys.readouterr().err
    assert not run_all(monkeypatch, tmp_path, run, results) and len(ran) == 3
    assert not run_all(monkeypatch, tmp_path, run, results) and len(ran) == 3


def test_cells_run_side_by_side_each_after_those_that_it_needs(monkeypatch, tmp_path) -> None:
    together, order = threading.Barrier(2, timeout=20), []

    def run(cell: Cell, _: Bench, done: dict[str, Any]) -> dict[str, Any]:
        assert done.keys() >= set(cell.needs)
        order.append(cell.name)
        if not cell.needs:
            together.wait()  # breaks if the other one hasn't begun
        return judge(0.9) | asked("1") | figures(1.0)

    monkeypatch.setattr(real, "workers", lambda jobs: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(real, "run_cell", run)
    results: dict[str, Any] = {"cells": {}, "settings": {"learning_rates": [1e-4]}}
    assert not real.run_all(CELLS, bench(tmp_path), results, tmp_path / "real.json", float("inf"), jobs=2)
    assert order[2:] == ["start/pku"] and results["cells"].keys() == {*order}
    assert isinstance(results["cells"]["start/pku"]["device"], str)


def test_a_model_whose_rate_is_no_longer_chosen_is_measured_again(monkeypatch, tmp_path, capsys) -> None:
    sizes = real.dataclasses.replace(SMALL, methods=("neat",), learning_rates=(1e-4, 2e-4))
    cells = [cell for cell in plan(sizes) if cell.method == "neat" and cell.kind in ("choose", "unlearn", "ask")]
    ran: list[str] = []

    def run(cell: Cell, _: Bench, done: dict[str, Any]) -> dict[str, Any]:
        ran.append(cell.name)
        if cell.kind == "choose":
            return figures(1.0) | {"learning_rate": cell.which}
        return asked("1") | {"learning_rate": real.rate_of("pku", "neat", done), "training": {"tokens_given": 1}}

    monkeypatch.setattr(real, "run_cell", run)
    done: dict[str, Any] = {"judge/pku": judge(0.9), "start/pku": figures(0.1)}
    done["choose/pku/neat/0.0001"] = figures(0.5) | {"learning_rate": 1e-4}
    for kind in ("unlearn", "ask", "know"):
        done[f"{kind}/pku/neat/0"] = asked("0") | known(0.5) | {"learning_rate": 1e-4}
    done |= {"ask/pku/start": asked("1"), "know/pku/start": known(0.5)}
    done["unlearn/pku/neat/0"]["training"] = {"tokens_given": 1}
    done = {name: of | {"minutes": 0.1, "device": "CPU"} for name, of in done.items()}
    of_sizes = Bench(tmp_path, tmp_path, tmp_path, sizes)
    assert not real.run_all(cells, of_sizes, {"cells": done}, tmp_path / "real.json", float("inf"))
    assert ran == ["choose/pku/neat/0.0002", "unlearn/pku/neat/0", "ask/pku/neat/0"]
    assert done["ask/pku/neat/0"]["learning_rate"] == 2e-4
    assert "know/pku/neat/0" not in done and "ask/pku/start" in done, "what another call asks for waits for it"
    assert "know/pku/neat/0 is of a learning rate that is no longer chosen" in capsys.readouterr().err
    assert not real.run_all(cells, of_sizes, {"cells": done}, tmp_path / "real.json", float("inf")) and len(ran) == 3


def test_figures_of_other_settings_are_refused_but_not_more_methods(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    own = real.settings(bench(tmp_path))
    found = real.same_settings({"cells": {}}, own, tmp_path)
    more = Bench(
        tmp_path,
        tmp_path,
        tmp_path,
        real.dataclasses.replace(SMALL, methods=("neat",), learning_rates=(5e-4,), seeds=(5,)),
    )
    real.same_settings(found, real.settings(more), tmp_path)
    other = Bench(tmp_path, tmp_path, tmp_path, real.dataclasses.replace(SMALL, ask=3))
    with pytest.raises(UserError, match="figures of another ask: name another --json"):
        real.same_settings(found, real.settings(other), tmp_path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--methods", "wpn-state"], "did you mean wpn-states"),
        (["--only", "nothing"], "no cell is called so"),
        (["--data", "nowhere", "--model", "x"], "isn't below nowhere: name the folder that has it with --data"),
    ],
)
def test_a_mistake_is_one_line(argv, said, tmp_path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        real.main([*argv, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "none.json")])
    assert "\n" not in str(refused.value)


def test_the_list_runs_nothing(tmp_path, capsys) -> None:
    work = tmp_path / "work"
    argv = ["--list", "--only", "ask/pku/wpn-states/0", "--work", str(work), "--json", str(tmp_path / "none.json")]
    assert real.main(argv) == 0 and not work.exists()
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("ask/pku/wpn-states/0: about") and last.startswith(f"{len(lines)} cells, about")


# ---- data, and a whole run ----


def test_no_prompt_that_is_asked_is_in_what_is_trained_nor_known_to_a_judge(shared_data, tmp_path) -> None:
    whole = Bench(tmp_path, shared_data, tmp_path, Sizes())
    write_data(whole)

    def prompts(twin: str, name: str) -> list[str]:
        lines = Path(whole.file(twin, name)).read_text().splitlines()
        return [real_cells._words(json.loads(line)["prompt"]) for line in lines]

    for twin in real_plan.TWINS:
        asked_of = {*prompts(twin, "heldout"), *prompts(twin, "validation")}
        assert len(asked_of) == len(prompts(twin, "heldout")) + len(prompts(twin, "validation")) > 150
        for name in ("start", "forget", "judged"):
            assert not asked_of & {*prompts(twin, name)}, (twin, name)
        assert not {*prompts(twin, "retain")} & {*prompts(twin, "kept")}
    assert not {*prompts("pku", "start")} & {*prompts("pku", "forget")}
    sizes = Sizes()
    assert [len(prompts("pku", name)) for name in ("start", "forget", "validation", "retain", "kept")] == [
        sizes.start,
        sizes.forget,
        sizes.validation,
        sizes.retain,
        sizes.kept,
    ]


def few(shared: Path, folder: Path) -> Path:
    """The published files that a run reads, of benchmarks and PKU's triples the first lines."""
    cut = {file for benchmark in BENCHMARKS.values() for file in benchmark.files} | {real_cells.HELD_OUT.split("/")[-1]}
    whole = [file for prompts in PUBLISHED.values() for file in prompts.files]
    whole += [FORGET["pku"], real_cells.LABELLED, real_cells.INSTRUCTIONS]
    for source in {path for file in (*cut, *whole) for path in shared.rglob(file)}:
        place = folder / source.relative_to(shared)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.name in cut:
            place.write_text("".join(source.read_text().splitlines(keepends=True)[:20]))
        else:
            place.symlink_to(source)
    return folder


def test_a_small_run_that_is_stopped_goes_on_to_its_end(
    shared_data, tmp_path, pool, monkeypatch, capsys, no_launcher
) -> None:
    trained: list[str] = []
    stop_at = 2

    def launch(command: list[str], log: Path) -> int:
        words = command[command.index("launch/train.py") + 1 :]
        folder = Path(words[words.index("--output_dir") + 1])
        trained.append(folder.relative_to(tmp_path / "weights").as_posix())
        if len(trained) == stop_at:
            folder.mkdir(parents=True)
            (folder / "half").write_text("")
            raise KeyboardInterrupt
        running = pool.run(1, "tests.commands:script", "launch/train.py", *words)
        log.write_text(running.output)
        assert not (folder / "half").exists()
        return int(running.returncode or 0)

    monkeypatch.setattr(real_cells, "launch", launch)
    monkeypatch.setenv("WPN_DS_CACHE", str(tmp_path / "cache"))
    data = few(shared_data, tmp_path / "published")
    default = f"pku/{real_plan.DEFAULT}"
    asked_for = [f"{kind}/{default}" for kind in ("ask", "know", "relearn", "mix")] + [
        "ask/pku/nll-kl",
        "know/pku/start",
    ]
    argv = ["--small", "--work", str(tmp_path), "--data", str(data), "--only", ",".join(asked_for)]
    with pytest.raises(KeyboardInterrupt):
        real.main(argv)
    before = json.loads((tmp_path / "real.json").read_text())["cells"]
    assert list(before) == ["judge/pku", "start/pku"]
    assert real.main(argv) == 0
    assert trained == ["pku/start", "pku/wpn-states/0.0001-0", "pku/wpn-states/0.0001-0", "pku/nll-kl/0.0001-0"]
    known = json.loads((tmp_path / "real.json").read_text())
    assert all(any(name.startswith(of) for name in known["cells"]) for of in asked_for)
    cells = known["cells"]
    assert {name: cells[name] for name in before} == before
    assert known["goal"]["n"] == len(real_cells.UNSEEN["pku"]) * SMALL.ask == known["npair_adds"]["n"]
    assert known["choices"] == {"pku/wpn-states": 1e-4, "pku/nll-kl": 1e-4}
    given_to = {of["training"]["tokens_given"] for name, of in cells.items() if name.startswith("unlearn/")}
    assert len(given_to) == 1 and cells["unlearn/pku/wpn-states/0"]["training"]["updates"] == 1
    text = (tmp_path / "real.json").read_text()
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "data/pku/heldout.jsonl").read_text().splitlines()]
    assert str(tmp_path) not in text and not any(json.dumps(prompt)[1:-1] in text for prompt in prompts)
    capsys.readouterr()
    again = Bench(tmp_path / "model", data, tmp_path, SMALL, bf16=cells["start/pku"]["bf16"])
    weights = tmp_path / "weights/pku/wpn-states/0.0001-0"
    damaged = cells | {"know/pku/start": {"mean": cells[f"know/{default}/0"]["mean"] + 1}}
    (mix,) = [cell for cell in plan(SMALL) if cell.name == f"mix/{default}/0"]
    mixed = real_cells._mix(mix, again, damaged)
    assert 0 < mixed["alpha"] < 1 and {*mixed["means"]} == {"0.5", "1"}
    assert mixed["suites"].keys() == cells[mix.name]["suites"].keys()
    assert not any(path.is_dir() for path in tmp_path.glob("weights/mixed*"))
    kept = weights.rename(tmp_path / "kept")
    assert real_cells._weights(again, "pku", "wpn-states", 1e-4, 0, cells)[0] == weights and len(trained) == 5
    assert "not those that were measured" not in capsys.readouterr().err, "the same training gives the same weights"
    monkeypatch.setattr(real_cells, "launch", lambda *_: shutil.copytree(kept, weights) and 0)
    shutil.rmtree(weights)
    (kept / "record.json").unlink()
    other = {**cells, "choose/pku/wpn-states/0.0001": {"training": {"weights": "others"}}}
    real_cells._weights(again, "pku", "wpn-states", 1e-4, 0, other)
    assert "not those that were measured" in capsys.readouterr().err
