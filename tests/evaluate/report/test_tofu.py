from __future__ import annotations

from dataclasses import replace

import pytest

from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.report.files import read_report, write_report
from wpn_ds.evaluate.report.runs import Run, figures_of
from wpn_ds.evaluate.report.table import format_table
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.tofu.metrics import KSTest, SetFigures, TofuFigures

SETS = {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}


def figures(value: float, p: float | None, missing: tuple[str, ...] = ()) -> TofuFigures:
    sets = {name: SetFigures(n, value, value, value) for name, n in SETS.items()}
    sets["forget"] = SetFigures(400, value, value, value, value, value)
    test = None if p is None else KSTest(p, 0.25, 400)
    return TofuFigures("forget10", sets, value, test, None if p is None else value, test, missing)


@pytest.fixture
def both() -> tuple[Evaluation, Evaluation]:
    return Evaluation({}, tofu=figures(0.6, 1.5e-12)), Evaluation({}, tofu=figures(0.5, 0.25))


def test_the_terminal_has_every_figure_before_and_after_with_its_n(both) -> None:
    assert format_table(*both).splitlines()[-1] == (
        "TOFU forget10: forget quality, p 1.5e-12 -> 0.25 (n = 400), "
        "model utility 0.600 -> 0.500 (n = 400 + 100 + 117), "
        "FU 0.600 -> 0.500 (n = 400), CI, p 1.5e-12 -> 0.25 (n = 400)"
    )
    assert "TOFU" not in format_table(None, Evaluation({}))


def test_a_figure_that_is_missing_is_left_out_and_the_reason_is_shown_as_text(tmp_path) -> None:
    alone = Evaluation({}, tofu=figures(0.5, None, ("no <b>FU</b>",)))
    printed = format_table(None, alone)
    assert "model utility 0.500" in printed and "forget quality" not in printed and "no <b>FU</b>" in printed
    page = write_report(tmp_path, None, alone, settings={}).read_text(encoding="utf-8")
    html = page[page.index('<section id="tofu">') : page.index("</section>")]
    assert "no &lt;b&gt;FU&lt;/b&gt;." in html and "<b>" not in html and html.count("<table>") == 2
    assert '<section id="tofu">' not in write_report(tmp_path, None, Evaluation({}), settings={}).read_text("utf-8")


def test_the_page_has_its_section_and_the_report_its_figures(both, tmp_path) -> None:
    page = write_report(tmp_path, *both, settings={}).read_text(encoding="utf-8")
    assert '<section id="tofu">' in page and "0.600\u2009\u2192\u20090.500" in page
    assert page.count("117") >= 2 and "TOFU forget10: forget quality, p 0.25" in page
    assert read_report(tmp_path / "report.json")[:2] == both
    plain = write_report(tmp_path / "plain", None, Evaluation({}), settings={}).read_text(encoding="utf-8")
    assert "TOFU" not in plain


def test_a_report_from_before_there_was_a_tofu_is_still_read(both) -> None:
    old = Evaluation({}).to_json()
    assert old.pop("tofu") is None and Evaluation.from_json(old) == Evaluation({})


def test_runs_are_compared_by_the_figures_that_any_has(both) -> None:
    runs = [Run(f"run {at}", Comparison(None, one), {}, {}) for at, one in enumerate((*both, Evaluation({})))]
    lines = dict(figures_of(runs))
    assert [cell.value for cell in lines["TOFU forget quality, p"]] == ["1.5e-12", "0.25", ""]
    assert [cell.n for cell in lines["TOFU model utility"]] == [617, 617, None]
    without = [replace(run, comparison=Comparison(None, Evaluation({}))) for run in runs]
    assert not [title for title, _ in figures_of(without) if "TOFU" in title]
