"""``wpn-ds objectives`` prints what the classes say, and the page has it as it is printed."""

from __future__ import annotations

import pytest

from tests.launching import ROOT
from wpn_ds.cli import main
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import flags


@pytest.mark.parametrize("argv", [[], ["--markdown"]])
def test_every_objective_is_there_with_equation_paper_and_flags(argv: list[str], capsys) -> None:
    assert main(["objectives", *argv]) == 0
    text = capsys.readouterr().out.replace("\\|", "|")
    joined = " ".join(text.split())
    for name, kind in built_in().items():
        assert name in joined and kind.equation in joined and kind.paper in joined
        assert all(flag.name in joined for flag in flags(kind))


def test_defaults_are_those_of_a_resolved_run(capsys) -> None:
    main(["objectives"])
    text = " ".join(capsys.readouterr().out.split())
    assert "gamma 0, gamma_inside_beta false, preference_weight 0.125, beta 4.5" in text
    assert "wpn_temperature 0.05, wpn_targets reference, wpn_negatives step" in text


def test_a_row_of_flags_names_whose_they_are_and_who_has_another_default(capsys) -> None:
    main(["objectives", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert "| `--preference_weight` | altpo, c3po, dpo, idkdpo, neat, npo, simnpo | 1 (simnpo: 0.125) |" in lines
    assert (
        "| `--retain_weight` | all | 1 (ceu, ga, undial: 0; pdu: 100; rmu: 1200; satimp: 0.1) |" in lines
        and "| `--gamma` | simnpo | 0 |" in lines
    )


def test_the_tables_of_the_page_are_those_that_the_command_prints(capsys) -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    between = page.partition("<!-- wpn-ds objectives --markdown -->\n")[2].partition("<!-- end -->")[0]
    main(["objectives", "--markdown"])
    assert between.strip() == capsys.readouterr().out.strip()
