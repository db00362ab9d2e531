"""The benchmark itself: its ways compute the method, and its figures are what they say."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from benchmarks import __main__ as driver
from benchmarks import report, saves, scale, starts
from benchmarks.protocol import Failed, Way
from benchmarks.rows import RATIOS, ROWS, Row, Spec
from benchmarks.setting import FORGET, describe, make_data
from benchmarks.way_plain import backward
from tests.engine import reference
from tests.engine.gradient_cases import BASE, make_examples, make_model

SETTINGS = {**BASE, "temperature": 0.05, "nll": 1.0, "weights": {"npair": 1.0, "retain": 1.0}}
#: The ratios that are promised.
NAMED = [
    "throughput_vs_plain_pku",
    "throughput_vs_plain_hh",
    "memory_vs_plain_pku",
    "throughput_vs_trl",
    "memory_vs_trl",
    "attention_time_vs_eager_2048_opt",
    "attention_time_vs_eager_2048_gpt_neo",
    "prefix_sharing_hh",
    "prefix_sharing_tofu",
    "memory_n1024_vs_n16",
    "time_per_example_n1024_vs_n16",
]


@pytest.mark.parametrize("micro_batch, pad_to", [(16, 0), (3, 0), (1, 0), (2, 60)])
@pytest.mark.parametrize("family", ["opt", "gpt_neo", "llama"])
def test_the_plain_way_has_the_losses_and_the_gradient_of_the_method(family, micro_batch, pad_to, tmp_path):
    models = []
    for seed in (1, 2):
        make_model(family, tmp_path / str(seed), seed)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(seed), dtype=torch.float64).eval())
    policy, start = models
    examples = make_examples()
    expected = reference.objective(policy, start, examples.forget, examples.retain, SETTINGS)
    expected["total"].backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    losses = backward(policy, start, describe(examples.forget, examples.retain), micro_batch, pad_to)
    for name, value in losses.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-6)
        assert abs(value) > 1e-3
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)


TURNS = st.lists(st.floats(0.1, 10), min_size=1, max_size=6)


def way(seconds, peak=100.0, examples=16):
    return {"turns": [{"seconds": s, "examples": examples} for s in seconds], "peak_mib": peak}


@given(TURNS, st.floats(0.1, 10), st.data())
def test_a_machine_that_slows_down_for_a_round_does_not_change_a_ratio(seconds, factor, data):
    slow = data.draw(st.lists(st.floats(1, 5), min_size=len(seconds), max_size=len(seconds)))
    one = way([s * k for s, k in zip(seconds, slow, strict=True)])
    other = way([s * k * factor for s, k in zip(seconds, slow, strict=True)])
    assert report.ratio(one, other, "throughput") == pytest.approx((factor,) * 3)
    assert report.ratio(one, other, "time") == pytest.approx((1 / factor,) * 3)


@given(TURNS, TURNS)
def test_the_median_lies_within_the_spread_and_throughput_is_the_inverse_of_time(one, other):
    middle, low, high = report.ratio(way(one), way(other), "time")
    assert low <= middle <= high
    _, low_speed, high_speed = report.ratio(way(one), way(other), "throughput")
    assert (low_speed, high_speed) == pytest.approx((1 / high, 1 / low))


def test_a_large_step_is_compared_by_the_example():
    assert report.ratio(way([64.0], 300.0, 1024), way([1.0, 1.0]), "time") == (1.0, 1.0, 1.0)
    assert report.ratio(way([64.0], 300.0, 1024), way([1.0]), "memory") == (3.0, 3.0, 3.0)


def test_a_step_says_what_share_of_the_matrix_rate_it_reached_and_where_it_went():
    product, attention = {"name": "aten::addmm", "share": 0.6}, {"name": "aten::_scaled_dot_product_x", "share": 0.2}
    other = {"name": "aten::mmm", "share": 0.1}
    ours = way([2.0]) | {"peak_flops": 1e9, "device_busy": 0.9, "operators": [product, attention, other]}
    ours["turns"][0]["flops"] = 1e9
    row = {"ways": {"ours": ours, "plain": way([4.0])}}
    rows = {"one": row, "parts": {"ways": {"packed": way([1.0])}}}
    assert [line[4] for line in report.details(rows)] == ["MFU, %", "50", "25", ""]
    assert report.costs(rows)[1:] == [["one", "ours", "54.0", "18.0", "0.0", "18.0", "10.0"]]


def test_the_named_ratios_are_those_of_the_issue_and_come_from_rows_that_exist():
    assert list(RATIOS) == NAMED and list(report.TARGETS) == NAMED
    rows = {row.name: row for row in ROWS}
    assert len(rows) == len(ROWS)
    for names, kind, one, other in RATIOS.values():
        assert kind in ("throughput", "time", "memory")
        assert all({one, other} <= rows[name].ways.keys() for name in names)


def test_trl_counts_with_the_micro_batch_that_makes_it_fastest():
    rows = {
        "trl_4": {"ways": {"ours": way([2.0], 50.0), "trl": way([5.0], 80.0)}},
        "trl_8": {"ways": {"ours": way([1.0], 50.0), "trl": way([3.0], 200.0)}},
        "trl_16": {"ways": {"ours": way([1.0], 50.0), "trl": way([4.0], 400.0)}},
    }
    found = report.ratios(rows)
    assert found["throughput_vs_trl"][0] == 2.5 and found["memory_vs_trl"][0] == 50 / 80
    assert "throughput_vs_trl" not in report.ratios({"trl_8": rows["trl_8"]})


def test_ways_that_compute_different_losses_are_not_compared():
    same = {"ours": [{"npair": 1.0}, {"npair": 2.0}], "plain": [{"npair": 1.0004, "other": 5.0}]}
    driver.check_losses(same)
    with pytest.raises(Failed, match=r"step 2: npair is 2 by ours and 2\.01 by plain"):
        driver.check_losses(same | {"plain": [{"npair": 1.0}, {"npair": 2.01}]})
    with pytest.raises(Failed, match="nan"):
        driver.check_losses(same | {"plain": [{"npair": float("nan")}]})


def script(loss: float, die_at: int = 0) -> list[str]:
    """A way that chats on its standard output, and notes when it was asked."""
    lines = [
        "import sys, time",
        "from benchmarks.protocol import serve",
        "def step(number):",
        "    print('a library says something')",
        f"    open(sys.argv[1], 'a').write(sys.argv[2]); assert number != {die_at}, 'out of luck'",
        "    profile = {'flops': 1e9, 'peak_flops': 1e9, 'peak_mib': 2.0, 'device_busy': 1.0, 'operators': []}",
        f"    return {{'examples': 4, 'losses': {{'npair': {loss}}}, **profile}}",
        "serve(step)",
    ]
    return ["-c", "\n".join(lines)]


def test_a_way_that_dies_is_reported_with_the_end_of_its_log(tmp_path):
    dying = Way([*script(1.0, die_at=2), str(tmp_path / "order"), "x"], tmp_path / "log")
    assert dying.step()["losses"] == {"npair": 1.0}
    with pytest.raises(Failed, match="out of luck"):
        dying.step()


def measured(monkeypatch, tmp_path, losses=(1.0, 1.0), row_name="plain_pku"):
    """A row of two ways that do nothing; the letters of ``tmp_path/order`` say who was asked when."""
    ways = {"ours": Spec(rounds=3), "plain": Spec("way_plain", one_time=True)}
    row = Row(row_name, "plain", "two ways", ways, rounds=3)

    def command(row, label, spec, folder):
        loss = losses[label == "plain"]
        return [*script(loss), str(tmp_path / "order"), label[0]], {}, "made up"

    monkeypatch.setattr(driver, "_command", command)
    return driver.measure(row, tmp_path / "row")


def test_ways_take_turns_after_a_step_that_does_not_count(monkeypatch, tmp_path):
    row = measured(monkeypatch, tmp_path)
    assert (tmp_path / "order").read_text() == "op" + 3 * "op" + "o"  # whose last step is profiled
    assert row["ways"]["ours"]["peak_mib"] == 2.0, "without what the profiler took"
    for way in row["ways"].values():
        assert len(way["turns"]) == 3 and len(way["losses"]) == 4 and way["peak_mib"] > 1
        assert all(turn["examples"] == 4 and turn["seconds"] > 0 for turn in way["turns"])
    assert row["ways"]["plain"]["one_time_seconds"] >= 0 and "one_time_seconds" not in row["ways"]["ours"]


def test_a_row_whose_ways_disagree_is_refused(monkeypatch, tmp_path):
    with pytest.raises(Failed, match="npair"):
        measured(monkeypatch, tmp_path, losses=(1.0, 1.1))


@pytest.mark.parametrize("quick", [False, True])
def test_scale_is_many_records_saves_and_starts(monkeypatch, quick):
    called: list[tuple[str, bool]] = []
    for part in (scale, saves, starts):
        monkeypatch.setattr(part, "main", lambda argv, name=part.__name__: called.append((name, bool(argv))))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "scale", *["--quick"] * quick])
    assert driver.main() == 0
    expected = [(f"benchmarks.{name}", quick) for name in ("scale", "saves", "starts")]
    assert called == expected, "a quick one is told to be small"


def test_the_longer_between_failures_the_more_rarely_a_run_saves_and_the_more_is_left_for_steps():
    rows = [saves.left_for_steps(hours, 0.2, 15.0) for hours in saves.HOURS]
    assert sorted(rows, key=lambda row: (row["save_steps"], row["goodput"])) == rows
    assert rows[0]["goodput"] == pytest.approx(1 - saves.RESTART / 3600, abs=0.02), "what a restart takes of an hour"
    assert rows[-1]["goodput"] > 0.995


def test_a_partial_run_never_writes_the_results_of_a_whole_one(monkeypatch, tmp_path, capsys):
    row = measured(monkeypatch, tmp_path)
    monkeypatch.setattr(driver, "measure", lambda *_: row)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "plain_pku"])
    assert driver.main() == 0
    results = json.loads((tmp_path / "results.partial.json").read_text())
    assert not (tmp_path / "results.json").exists()
    assert list(results["ratios"]) == ["throughput_vs_plain_pku", "memory_vs_plain_pku"]
    assert "throughput_vs_plain_pku" in capsys.readouterr().out
    assert results["machine"].keys() == {"cores", "memory_gib", "processor", "versions"}


def test_a_whole_run_writes_exactly_the_named_ratios(monkeypatch, tmp_path):
    pair = {"ways": {}, "group": "made up", "data": "made up"}
    rows = {row.name: pair | {"ways": {label: way([1.0]) for label in row.ways}} for row in ROWS}
    monkeypatch.setattr(driver, "measure", lambda row, _: rows[row.name])
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    pytest.importorskip("matplotlib")  # of the extra "bench"
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert driver.main() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["ratios"]) == NAMED and set(results["ratios"].values()) == {1.0}
    assert results["rows"].keys() == {row.name for row in ROWS}
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert str(tmp_path.parent) not in (tmp_path / "results.json").read_text()


def test_the_page_gets_its_figures_from_the_results_file(monkeypatch, tmp_path):
    row = {"ways": {"ours": way([1.0]), "plain": way([3.25], 250.0)}, "data": "pku", "group": "plain"}
    named = report.ratios({"plain_pku": row})
    results = {
        "ratios": {name: value[0] for name, value in named.items()},
        "spread": {name: value[1:] for name, value in named.items()},
        "rows": {"plain_pku": row},
        "machine": {
            "cores": 2,
            "memory_gib": 8,
            "versions": {"torch": "2.0"} | {f"library-{k}": "1.2.3" for k in range(9)},
        },
    }
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "performance.md"
    monkeypatch.setattr(sys, "argv", ["report", str(page)])
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # it can be done again
        report.main()
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "| throughput_vs_plain_pku | 3.25 | 3.25..3.25 | >= 3 | reached |" in text
        assert "| memory_vs_plain_pku | 0.40 | 0.40..0.40 | <= 0.4 | reached |" in text
        assert (
            "Measured on 2 CPU cores, 8 GiB of memory, torch 2.0, library-0 1.2.3, " in text and "; data: pku." in text
        )
        assert max(map(len, text.splitlines())) <= 120
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="markers"):
        report.main()


@pytest.mark.parametrize("name", FORGET)
def test_a_selection_has_the_lengths_of_the_whole_set(name, tmp_path):
    lengths = {}
    for n in (8, 64):
        data = make_data(name, n, tmp_path)
        lines = [json.loads(line) for line in data.forget.read_text().splitlines()]
        assert len(lines) == n == len(data.retain.read_text().splitlines())
        assert all(line["chosen"] and line["rejected"] for line in lines)
        lengths[n] = sum(len(json.dumps(line)) for line in lines) / n
    assert lengths[8] == pytest.approx(lengths[64], rel=0.15)
