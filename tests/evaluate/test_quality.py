from __future__ import annotations

import json

import pytest

from tests.evaluate.report.made_up import suite
from tests.interface import check_report
from wpn_ds.evaluate.comparison import Comparison
from wpn_ds.evaluate.quality import Quality, qualities
from wpn_ds.evaluate.report.command import run
from wpn_ds.evaluate.report.files import write_report
from wpn_ds.evaluate.report.table import format_table
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Estimate, Rate

AUC = Estimate(0.9, 0.85, 0.94, 500)
SURE = Quality(AUC, Rate(10**9, 10**9), Rate(10**9, 10**9))
ERRING = Quality(AUC, Rate(80, 100), Rate(90, 100))
LOCAL = {
    "name": "local:mine",
    "judge": "local",
    "auc": {"value": 0.9, "low": 0.85, "high": 0.94, "n": 500},
    "sensitivity": {"value": 0.8, "low": 0.7, "high": 0.9, "count": 80, "n": 100},
    "specificity": {"value": 0.9, "low": 0.8, "high": 1.0, "count": 90, "n": 100},
}


def made(harmless: int, harmful: int, empty: int = 0, unusable: int = 0, **more):
    kinds = (Verdict.HARMLESS, Verdict.HARMFUL, Verdict.EMPTY, Verdict.UNUSABLE)
    verdicts = [kind for kind, n in zip(kinds, (harmless, harmful, empty, unusable), strict=True) for _ in range(n)]
    return suite(verdicts, judges=("local:mine",), **more)


@pytest.mark.parametrize("counts", [(30, 70), (30, 70, 20), (5, 1, 0, 4), (100, 0), (0, 7), (0, 0, 9)])
def test_of_a_judge_that_never_errs_the_rate_is_the_one_that_it_finds(counts) -> None:
    asked = made(*counts)
    found = SURE.corrected(asked, "local:mine")
    assert found and (found.value, found.n) == (pytest.approx(asked.harmless.value, abs=1e-6), asked.harmless.n)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_true_rate_is_found_behind_known_errors() -> None:
    """300 harmful answers, of which 80 % are found, 600 harmless ones, of which 10 % are accused, 100 empty ones."""
    found = ERRING.corrected(made(60 + 540, 240 + 60, 100), "local:mine")
    assert found and found.value == pytest.approx(0.6) and found.n == 1000
    assert found.low < 0.55 < 0.6 < found.high and found.high - found.low > 0.1


def test_samples_of_a_prompt_are_no_answers_of_their_own() -> None:
    once, four = (ERRING.corrected(made(30, 20, seeds=s), "local:mine") for s in ((None,), (0, 1, 2, 3)))
    assert once and four and four.n == 4 * once.n
    assert (four.value, four.low, four.high) == pytest.approx((once.value, once.low, once.high))


def test_nothing_is_corrected_by_what_is_not_known() -> None:
    asked = made(30, 70)
    assert Quality(AUC, None, None).corrected(asked, "local:mine") is None
    assert Quality(AUC, Rate(4, 10), Rate(6, 10)).corrected(asked, "local:mine") is None, "no more than chance"
    assert ERRING.corrected(made(0, 0, 0, 5), "local:mine") is None, "nothing was judged"
    judges = {"local:mine": ERRING}
    assert Comparison(None, Evaluation({}), judges).corrected(asked) == ERRING.corrected(asked, "local:mine")
    assert Comparison(None, Evaluation({}), judges).corrected(made(30, 70, kind="benign")) is None
    assert Comparison(None, Evaluation({})).corrected(asked) is None
    phrases = {"name": "phrases", "judge": "phrases"}
    assert qualities([phrases, LOCAL]) == {"local:mine": ERRING}
    assert qualities([LOCAL | {"sensitivity": None, "specificity": None}]) == {"local:mine": Quality(AUC, None, None)}


def test_the_table_the_page_and_the_json_have_corrected_rates_and_what_the_judge_is_worth(tmp_path, capsys) -> None:
    before = Evaluation({"heldout": made(20, 80), "over_refusal": made(9, 1, kind="benign")})
    after = Evaluation({"heldout": made(60, 40), "over_refusal": made(9, 1, kind="benign")})
    page = write_report(tmp_path, before, after, settings={}, judges=[LOCAL]).read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    check_report({name: found[name] for name in ("suites", "baseline")}, "suites.*.corrected.*")
    rate = ERRING.corrected(after.suites["heldout"], "local:mine")
    assert rate and found["suites"]["heldout"]["corrected"] == {
        "local:mine": {"n": 100, "rate": rate.value, "low": rate.low, "high": rate.high}
    }
    assert rate.value == pytest.approx(1 - 0.3 / 0.7)
    assert "corrected" in found["baseline"]["suites"]["heldout"]
    assert "corrected" not in found["suites"]["over_refusal"]
    assert "local:mine (AUC 0.900, n 500)" in page and "57.1\u00a0%" in page and "Rogan and Gladen" in page
    table = format_table(before, after, [LOCAL], width=80)
    assert "corrected for the errors of local:mine (AUC 0.900, n 500):" in " ".join(table.split())
    was = ERRING.corrected(before.suites["heldout"], "local:mine")
    shown = [f"{100 * one.value:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]" for one in (was, rate) if one]
    assert f"heldout {' '.join(shown)}" in " ".join(table.split())
    assert max(map(len, table.splitlines())) <= 80
    assert run([str(tmp_path)]) == 0
    assert (
        format_table(before, after, [LOCAL]) in capsys.readouterr().out
        and page == (tmp_path / "report.html").read_text()
    )


def test_without_figures_nothing_is_added(tmp_path) -> None:
    after = Evaluation({"heldout": made(60, 40)})
    page = write_report(tmp_path, None, after, settings={}, judges=[{"name": "phrases"}]).read_text()
    assert "Rogan" not in page and "corrected" not in (tmp_path / "report.json").read_text()
    assert "corrected for the errors" not in format_table(None, after, [{"name": "phrases"}])
