from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.evaluate.report.made_up import mixed, suite
from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.answers import answers_data
from wpn_ds.evaluate.report.files import read_report, write_report
from wpn_ds.evaluate.report.runs import Run, figures_of
from wpn_ds.evaluate.report.table import format_table
from wpn_ds.evaluate.results import Depth, Evaluation, Stretch, Suite


def depth(first: float, later: float) -> Depth:
    unwanted = (Stretch("1", 32, 32, first, first - 0.5, first + 0.5), Stretch("2-3", 31, 60, later, later, later + 1))
    return Depth(unwanted, (Stretch("1", 30, 30, 1.25, 1.0, 1.5),))


def begun(rate: float) -> Suite:
    made = suite(mixed(40, rate, name="p"), references=False)
    answers = tuple(
        replace(one, begun=" Why would", answer=f"I {'waste' if at % 4 else 'never'} it", unwanted=("I waste time",))
        for at, one in enumerate(made.answers)
    )
    return replace(made, answers=answers)


@pytest.fixture
def both() -> tuple[Evaluation, Evaluation]:
    return (
        Evaluation({"attack/prefill-2": begun(0.1)}, depth=depth(2.4, 0.2)),
        Evaluation({"attack/prefill-2": begun(0.7)}, depth=depth(5.31, 0.7)),
    )


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_has_every_stretch_before_and_after_with_its_n_tokens_and_interval(both, width) -> None:
    lines = [line.split() for line in format_table(*both, width=width).splitlines()]
    head = "unwanted answers, NLL at token n tokens before after"
    assert head.split() in lines and [word.replace("unwanted", "wanted") for word in head.split()] in lines
    assert ["1", "32", "32", "2.40", "[1.90,", "2.90]", "5.31", "[4.81,", "5.81]"] in lines
    assert ["2-3", "31", "60", "0.20", "[0.20,", "1.20]", "0.70", "[0.70,", "1.70]"] in lines
    assert max(map(len, format_table(*both, width=width).splitlines())) <= 100
    alone = [line.split() for line in format_table(None, both[1]).splitlines()]
    assert ["1", "32", "32", "5.31", "[4.81,", "5.81]"] in alone
    assert "NLL at token" not in format_table(both[0], replace(both[1], depth=None))


def test_the_words_that_come_back_stand_below_the_table_in_the_page_and_in_the_json(both, tmp_path) -> None:
    text, back = " ".join(format_table(*both).split()), both[1].suites["attack/prefill-2"].words_back
    assert 0.5 < back.low < 0.58 < back.high < 2 / 3
    shown = f"58.3 [{100 * back.low:.1f}, {100 * back.high:.1f}]"
    assert f"attack/prefill-2: words of the unwanted rest that come back, %: {shown} -> {shown}" in text
    page = write_report(tmp_path, *both, settings={}).read_text(encoding="utf-8")
    assert "<th>words that come back</th>" in page and f"58.3\u00a0% <small>({100 * back.low:.1f}" in page
    assert "In the suites prefill" in page
    found = json.loads((tmp_path / "report.json").read_text())["suites"]["attack/prefill-2"]
    assert found["words_back"]["value"] == pytest.approx((1 / 3 + 3 * 2 / 3) / 4) and found["words_back"]["n"] == 40
    place = answers_data(Comparison(*both))["rows"][0]["place"]
    assert place.endswith(" \u00b7 begun with \u201cWhy would\u201d")
    plain = Evaluation({"heldout": suite(mixed(9, 0.5))})
    assert plain.suites["heldout"].words_back is None
    other = write_report(tmp_path / "plain", None, plain, settings={}).read_text(encoding="utf-8")
    assert "come back" not in other and "prefill" not in other and '<section id="depth">' not in other


def test_the_page_has_a_section_with_a_chart_and_the_report_its_figures(both, tmp_path) -> None:
    page = write_report(tmp_path, *both, settings={}).read_text(encoding="utf-8")
    html = page[page.index('<section id="depth">') :]
    html = html[: html.index("</section>")]
    assert html.count("<table>") == 2 and html.count('<circle class="point"') == 4
    assert "<td>5.31 [4.81, 5.81]</td>" in html and "before, token 2-3: 0.20 [0.20, 1.20], n = 31" in html
    assert read_report(tmp_path / "report.json")[:2] == both
    alone = Evaluation({}, depth=both[1].depth)
    assert "<h1>How unlikely unwanted" in write_report(tmp_path, None, alone, settings={}).read_text(encoding="utf-8")


def test_runs_are_compared_position_by_position(both) -> None:
    runs = [Run(f"run {at}", Comparison(None, one), {}, {}) for at, one in enumerate((*both, Evaluation({})))]
    lines = dict(figures_of(runs))
    assert [cell.value for cell in lines["NLL of unwanted answers, token 1"]] == ["2.40", "5.31", ""]
    assert [cell.n for cell in lines["NLL of unwanted answers, token 2-3"]] == [31, 31, None]
    without = [replace(run, comparison=Comparison(None, Evaluation({}))) for run in runs]
    assert not [title for title, _ in figures_of(without) if "NLL" in title]
