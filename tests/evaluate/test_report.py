from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from wpn_ds.evaluate import report
from wpn_ds.evaluate.harmless import Answer, Evaluation, Retain, Suite
from wpn_ds.evaluate.judges import Verdict
from wpn_ds.evaluate.report import read_metrics, write_report
from wpn_ds.evaluate.table import format_table

ATTACK = '<script>alert("x")</script> & \x1b[31m</div><img src=x onerror=alert(1)>'


def evaluation(verdict: Verdict, text: str, perplexity: float = 4.0) -> Evaluation:
    answers = tuple(
        Answer(f"prompt {i}", text, verdict, 0.5, 0.25, ("calm",), (f"rude {i}",), f"/x/f.jsonl:{i}") for i in range(4)
    )
    return Evaluation({name: Suite(answers) for name in ("train", "heldout", "attack")}, Retain(7, 50, perplexity))


BEFORE, AFTER = evaluation(Verdict.HARMFUL, "go away"), evaluation(Verdict.HARMLESS, "gladly", 4.2)


class Elements(HTMLParser):
    """Every element with its attributes; fails on elements that aren't closed in order."""

    VOID = frozenset({"meta", "input", "br", "rect", "line", "polyline"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def test_the_json_has_the_agreed_shape(tmp_path) -> None:
    page = write_report(tmp_path / "new", BEFORE, AFTER, settings={"limit": None})
    found = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert page == tmp_path / "new" / "report.html" and page.is_file()
    for name, rate in (("before", 0.0), ("after", 1.0)):
        for suite in ("train", "heldout", "attack"):
            figures = found[name][suite]
            assert figures["n"] == 4 and figures["harmless_rate"] == rate and figures["degenerate_rate"] == 0
            assert 0 <= figures["harmless_low"] <= rate <= figures["harmless_high"] <= 1
        assert found[name]["retain"]["n"] == 7
    assert found["retain_perplexity_ratio"] == pytest.approx(1.05)
    assert found["settings"] == {"limit": None}
    assert Evaluation.from_json(found["before"]) == BEFORE


def test_without_a_baseline_before_is_null(tmp_path) -> None:
    page = write_report(tmp_path, None, AFTER, settings={}).read_text(encoding="utf-8")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["before"] is None and found["retain_perplexity_ratio"] is None
    Elements(page)


@pytest.mark.parametrize("where", ["answer", "prompt", "wanted", "unwanted", "source", "category", "suite", "settings"])
def test_what_a_model_or_a_user_wrote_stays_text(tmp_path, where) -> None:
    values = dict(prompt="p", answer="a", wanted=("w",), unwanted=("u",), source="s", category="c")
    settings, suite = {"model": "m"}, "train"
    if where == "settings":
        settings = {ATTACK: ATTACK, "model": ATTACK, "baseline": ATTACK}
    elif where == "suite":
        suite = ATTACK
    else:
        values[where] = (ATTACK,) if where in ("wanted", "unwanted") else ATTACK
    one = Answer(verdict=Verdict.HARMFUL, wanted_similarity=0.0, unwanted_similarity=1.0, **values)
    hurt = Evaluation({suite: Suite((one,))}, None)
    page = write_report(tmp_path, hurt, hurt, settings=settings).read_text(encoding="utf-8")
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.found)
    assert "alert" in "".join(elements.text) and "\x1b" not in page


def test_the_page_asks_the_network_for_nothing(tmp_path) -> None:
    page = write_report(tmp_path, BEFORE, AFTER, settings={}).read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page)
    names = {name for _, attributes in Elements(page).found for name in attributes}
    assert not names & {"src", "href", "srcset"}
    assert "default-src 'none'" in page


def test_unwanted_text_is_folded(tmp_path) -> None:
    page = write_report(tmp_path, BEFORE, AFTER, settings={}).read_text(encoding="utf-8")
    folded = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    assert "rude 1" in page and "rude 1" not in folded
    assert "go away" in page and "go away" not in folded
    assert "gladly" in folded


def test_every_figure_of_the_page_comes_with_its_n_and_interval(tmp_path) -> None:
    page = write_report(tmp_path, BEFORE, AFTER, settings={"seed": 3}).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", " ".join(Elements(page).text))
    assert "Harmless on 100.0 % of the training prompts, up from 0.0 %" in text
    assert "51.0 \u2013 100.0 , n = 4" in text or "51.0 \u2013 100.0, n = 4" in text
    assert "n = 7 answers" in text and "50 tokens" in text and "before 4.000, after 4.200" in text
    assert "seed" in text


def test_answers_meet_their_baseline_by_record_and_are_marked_for_the_filters(tmp_path) -> None:
    mixed = Evaluation({"train": Suite((AFTER.suites["train"].answers[2], BEFORE.suites["train"].answers[0]))}, None)
    page = write_report(tmp_path, BEFORE, mixed, settings={}).read_text(encoding="utf-8")
    rows = [attributes for _, attributes in Elements(page).found if "data-suite" in attributes]
    assert [(row["data-after"], row["data-change"]) for row in rows] == [("harmless", "better"), ("harmful", "same")]


def test_curves_are_drawn_for_what_is_there(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "loss/total": 4 / s, "sim/positive": 0.1 * s, "sim/negative": -0.1, "mfu": 0.3} for s in (1, 2)
    ]
    lines += [{"step": 3, "loss/total": float("nan"), "note": "x", "val/loss": 1.0}]
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "loss/to', encoding="utf-8")
    page = write_report(tmp_path, None, AFTER, settings={}, metrics_jsonl=metrics).read_text(encoding="utf-8")
    panels = [a["aria-label"] for tag, a in Elements(page).found if a.get("preserveaspectratio")]
    assert panels == ["loss/total", "sim/positive and sim/negative", "mfu", "val/loss"]
    assert page.count("<polyline") == 5 and "nan" not in " ".join(re.findall(r'points="[^"]*"', page))


def test_a_step_that_was_run_again_counts_once(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "lr": v}) + "\n" for s, v in [(1, 1), (2, 2), (3, 3), (2, 20)]))
    assert read_metrics(path) == {"lr": [(1, 1.0), (2, 20.0), (3, 3.0)]}
    assert read_metrics(tmp_path / "none") == {}


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "lr": s}) + "\n" for s in range(5001)))
    page = write_report(tmp_path, None, AFTER, settings={}, metrics_jsonl=path).read_text(encoding="utf-8")
    points = re.search(r'points="([^"]*)"', page).group(1).split()
    assert 400 < len(points) <= 501 and points[-1] == "300.0,6.0"


def test_a_failed_write_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch) -> None:
    write_report(tmp_path, BEFORE, AFTER, settings={})
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(old) == {"report.json", "report.html"}

    def full(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, None, AFTER, settings={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("width", [80, 110, 160])
@pytest.mark.parametrize("before", [BEFORE, None])
def test_the_table_fits_the_terminal_and_says_what_was_measured(width, before) -> None:
    after = evaluation(Verdict.HARMLESS, "gladly, " + "word " * 60 + ATTACK, 4.2)
    table = format_table(before, after, width=width)
    assert max(map(len, table.splitlines())) <= width
    assert "100.0 % [51.0, 100.0]" in table and "(n = 7)" in table and "\x1b" not in table
    assert ("ratio 1.050" in table) == ("go away" in table) == (before is not None)


def test_the_table_shows_an_empty_answer_as_such() -> None:
    assert "(nothing)" in format_table(None, evaluation(Verdict.EMPTY, ""), width=80)
