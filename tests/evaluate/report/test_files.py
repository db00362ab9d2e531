from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.report.made_up import JUDGES, SETTINGS, everything, mixed, suite, utility, write_metrics
from tests.interface import check_report
from wpn_ds.errors import UserError
from wpn_ds.evaluate.comparison import Comparison, suite_change
from wpn_ds.evaluate.report.answers import answers_data
from wpn_ds.evaluate.report.figures import pooled, suite_title
from wpn_ds.evaluate.report.files import read_report, write_report
from wpn_ds.evaluate.report.table import format_table
from wpn_ds.evaluate.results import Answer, Evaluation, Retain, Suite, Task
from wpn_ds.evaluate.suites import GROUPS
from wpn_ds.evaluate.training import read_metrics
from wpn_ds.judging.base import Judgement, PromptKind, Verdict
from wpn_ds.judging.statistics import holm

ATTACK = '<script>alert("x")</script> & \x1b[31m</div><img src=x onerror=alert(1)>\u2028\ud800'


def evaluation(verdict: Verdict, text: str, perplexity: float = 4.0) -> Evaluation:
    answers = tuple(
        Answer(
            f"prompt {i}",
            text,
            {"reference": Judgement(verdict, 0.25)},
            False,
            ("calm",),
            (f"rude {i}",),
            f"/x/f.jsonl:{i}",
        )
        for i in range(4)
    )
    return Evaluation({name: Suite(answers) for name in ("train", "heldout", "attack")}, Retain(7, 50, perplexity))


BEFORE, AFTER = evaluation(Verdict.HARMFUL, "go away"), evaluation(Verdict.HARMLESS, "gladly", 4.2)


@pytest.fixture(scope="module")
def whole() -> tuple[Evaluation, Evaluation]:
    """Every kind of suite and all tasks, with few prompts."""
    return everything(0.1, scale=0.08), everything(0.95, scale=0.08, drop=0.02, perplexity=12.4)


@pytest.fixture(scope="module")
def whole_report(whole, tmp_path_factory) -> Path:
    """The folder with its report; resampling takes a second."""
    folder = tmp_path_factory.mktemp("whole") / "new"
    metrics = write_metrics(folder.parent / "metrics.jsonl", 100)
    page = write_report(folder, *whole, settings=SETTINGS, judges=JUDGES, notes=["no aart"], metrics_jsonl=metrics)
    assert page == folder / "report.html" and page.is_file()
    return folder


class Elements(HTMLParser):
    """Every element with its attributes; fails on elements that aren't closed in order."""

    VOID = frozenset({"meta", "input", "br", "rect", "line", "polyline", "circle"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data = ""
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
        if self.open[-1:] == ["script"] and self.found[-1][1].get("id") == "data":
            self.data += data
        elif not {"style", "script"} & set(self.open):
            self.text.append(data)

    @property
    def plain(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text)).replace(" ,", ",")


def page_of(folder: Any, *args: Any, **kwargs: Any) -> str:
    return write_report(folder, *args, **{"settings": {}, **kwargs}).read_text(encoding="utf-8")


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ---- report.json ----


def test_the_json_has_the_agreed_shape(whole, whole_report) -> None:
    before, after = whole
    found = strict((whole_report / "report.json").read_text(encoding="utf-8"))
    measured = {key: value for key, value in found.items() if key not in ("settings", "judges")}  # those are made up
    check_report(measured, "top", "suites.*", "suites.*.always_harmless", "suites.*.answers[]", "retain")
    check_report(measured, "changes.*", "utility.*", "utility_change.*")
    assert set(found) == {
        *(
            "suites",
            "retain",
            "utility",
            "tofu",
            "recall",
            "baseline",
            "changes",
            "utility_change",
            "retain_perplexity_ratio",
        ),
        *("depth", "judges", "notes", "settings", "wpn_ds_version"),
    }
    for name, one in (("suites", after), ("baseline", before)):
        suites = found[name] if name == "suites" else found[name]["suites"]
        for suite_name, made in one.suites.items():
            figures = suites[suite_name]
            assert figures["n"] == len(made.answers) and figures["harmless_rate"] == made.harmless.value
            assert 0 <= figures["harmless_low"] <= figures["harmless_rate"] <= figures["harmless_high"] <= 1
    assert set(found["baseline"]) == {"suites", "retain", "utility", "tofu", "depth", "recall"}
    assert set(found["changes"]) == set(after.suites)
    assert set(found["changes"]["train"]) == {"better", "worse", "p", "p_holm", "difference"}
    raw, corrected = ([one[name] for one in found["changes"].values()] for name in ("p", "p_holm"))
    assert corrected == pytest.approx(holm(raw)) and sum(corrected) > sum(raw)
    assert set(found["utility_change"]) == {"benchmark", "dialogue"}
    assert found["utility_change"]["benchmark"]["value"] < 0
    assert found["retain_perplexity_ratio"] == pytest.approx(12.4 / 12.1)
    assert found["judges"] == JUDGES and found["notes"] == ["no aart"] and found["settings"] == SETTINGS


def test_a_report_that_is_read_gives_what_it_was_written_from(whole, whole_report) -> None:
    before, after, rest = read_report(whole_report / "report.json")
    assert (before, after) == whole
    assert rest["judges"] == JUDGES and rest["notes"] == ["no aart"] and rest["settings"] == SETTINGS


def test_without_a_baseline_what_compares_is_null(tmp_path) -> None:
    page = page_of(tmp_path, None, replace(AFTER, utility=utility(0.0, 0.05)))
    found = strict((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["baseline"] is None and found["retain_perplexity_ratio"] is None and found["utility_change"] is None
    assert found["changes"] == {}
    assert "hellaswag" in Elements(page).plain


def test_what_is_not_finite_is_null(tmp_path) -> None:
    scored = replace(BEFORE.suites["train"].answers[0], judgements={"x": Judgement(Verdict.HARMFUL, math.nan)})
    bad = Evaluation({"train": Suite((scored,))}, Retain(1, 1, math.inf), {"empty": Task("acc", (), "", "other")})
    page_of(tmp_path, bad, bad, settings={"temperature": math.inf})
    found = strict((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["settings"] == {"temperature": None} and found["retain"]["perplexity"] is None
    assert found["utility"]["empty"]["low"] is None
    assert found["suites"]["train"]["answers"][0]["judgements"] == {"x": ["harmful", None]}


def test_a_lone_surrogate_survives_the_json(tmp_path) -> None:
    odd = Evaluation({"train": Suite((replace(BEFORE.suites["train"].answers[0], answer="a\ud800b"),))})
    page_of(tmp_path, None, odd)
    assert read_report(tmp_path / "report.json")[1] == odd


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "broken JSON"),
        ("[]", "something else"),
        ('{"before": null, "after": {}, "wpn_ds_version": "0.0.1"}', "of wpn_ds 0.0.1"),
        (
            '{"suites": {"train": {"kind": "harm", "answers": [{}]}}, "retain": null, "baseline": null}',
            "something else",
        ),
        ('{"suites": {}, "retain": null, "utility": {}, "baseline": null, "settings": 3}', "something else"),
    ],
)
def test_a_report_that_cannot_be_read_is_one_line_that_names_the_file(tmp_path, text, says) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        read_report(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_of_no_average_has_a_line_before_and_after() -> None:
    before, after = (
        Evaluation({}, utility={"wmdp_bio": Task("acc", scores, "f")}) for scores in ((1.0, 1.0), (1.0, 0.0))
    )
    (line,) = [line for line in format_table(before, after).splitlines() if line]
    assert line == "wmdp_bio acc 100.0 % -> 50.0 %, -50.0 points [-100.0, 0.0] (n = 2)"


PAIRS: dict[str, PromptKind] = {"xstest/safe": "benign", "xstest/unsafe": "harm"}


def test_suites_that_ask_for_refusals_show_three_classes_of_answers(tmp_path) -> None:
    verdicts = [Verdict.HARMLESS] * 4 + [Verdict.HARMFUL] * 3 + [Verdict.EMPTY]
    made = {name: suite(verdicts, name=name, kind=kind) for name, kind in PAIRS.items()}
    classes = made["xstest/safe"].refusal_classes
    assert {name: (rate.count, rate.n) for name, rate in classes.items()} == {
        "full": (2, 8),
        "partial": (2, 8),
        "complied": (3, 8),
    }
    table = format_table(None, Evaluation(made)).splitlines()
    (line,) = [line for line in table if line.startswith("xstest/safe") and line.count("[") == 3]
    assert line.split()[1:3] == ["8", "25.0"] and "37.5 [" in line
    assert sum(line.startswith("xstest/unsafe") for line in table) == 2, "its contrasts, too"
    page = page_of(tmp_path, None, Evaluation(made))
    assert page.count("refused in part") == 2 and "XSTest, unsafe contrasts" in page


def test_over_refusal_is_compared_by_refusals_not_by_verdicts() -> None:
    """A model that begins to refuse benign prompts becomes worse, though its judge calls refusals harmless."""
    before, after = (suite([v] * 20, kind="benign") for v in (Verdict.HARMFUL, Verdict.HARMLESS))
    change = suite_change(before, after)
    assert change is not None
    assert (change.better, change.worse, change.difference.value) == (0, 20, 1.0)
    assert change.p < 0.001 and change.difference.n == 20


def test_pooled_samples_keep_the_width_of_their_prompts() -> None:
    sampled = suite(mixed(10, 0.5), seeds=(0, 1, 2, 3))
    both = pooled([sampled, sampled], lambda one: one.harmless)
    assert (both.n, both.low, both.high) == (2 * sampled.harmless.n, sampled.harmless.low, sampled.harmless.high)


# ---- report.html ----


@pytest.mark.parametrize(
    "where",
    ["answer", "prompt", "wanted", "unwanted", "source", "category", "suite", "judge", "task", "note", "settings"],
)
def test_what_a_model_or_a_user_wrote_stays_text(tmp_path, where) -> None:
    values: dict[str, Any] = dict(prompt="p", answer="a", wanted=("w",), unwanted=("u",), source="s", category="c")
    settings, judges, notes = {"model": "m"}, [], []
    name, judge, task = (ATTACK if where == one else one for one in ("suite", "judge", "task"))
    if where == "settings":
        settings = {ATTACK: ATTACK, "model": ATTACK, "baseline": ATTACK}
        judges = [{"judge": ATTACK, ATTACK: ATTACK}]
    elif where == "note":
        notes = [ATTACK]
    elif where in values:
        values[where] = (ATTACK,) if where in ("wanted", "unwanted") else ATTACK
    one = Answer(judgements={judge: Judgement(Verdict.HARMFUL, 1.0), "b": None}, refusal=False, **values)
    scores = {task: Task("acc", (0.0, 1.0), task, "benchmark")}
    hurt = Evaluation({name: Suite((one,)), f"attack/{name}": Suite((one,)), "plain": Suite((one,))}, None, scores)
    page = page_of(tmp_path, hurt, hurt, settings=settings, judges=judges, notes=notes)
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.found)
    shown = "".join(elements.text) + json.dumps(json.loads(elements.data))
    assert "alert(" in shown and "onerror" in shown
    assert not re.search("[\x1b\ud800]", page) and not re.search(r"[<>&\u2028]|\\u001b|\\ud800", elements.data)


def test_the_page_asks_the_network_for_nothing(whole_report) -> None:
    page = (whole_report / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page)
    found = Elements(page).found
    assert not {name for _, attributes in found for name in attributes} & {"src", "srcset", "onclick"}
    targets = {attributes["href"] for _, attributes in found if "href" in attributes}
    keys = {f"#{attributes['id']}" for tag, attributes in found if tag == "section"}
    assert targets == keys and len(keys) > 10
    assert "default-src 'none'" in page


def test_every_section_shows_what_was_measured(whole, whole_report) -> None:
    elements = Elements((whole_report / "report.html").read_text(encoding="utf-8"))
    plain = elements.plain
    for title in (
        *("In distribution", "Out of distribution", "Attacks", "Open-ended prompts", "Over-refusal", "Sampled answers"),
        *("Relearning", "Utility", "Training", "Judges", "Every prompt and its answers", "Notes", "Settings"),
    ):
        assert title in plain
    for kind in ("empty", "echo", "repetitive", "gibberish", "length-matched", "refused in part", "complied"):
        assert kind in plain
    for words in (
        "StrongREJECT",
        "Refusal suppression",
        "distinct-2",
        "commonest answer",
        "lambada_openai",
        "wizard_of",
    ):
        assert words in plain
    assert "\u03ba reference ~ phrases" in plain and "held_out_auc" in plain and "0.941" in plain
    assert "no aart" in plain and "Average of benchmarks (9)" in plain
    labels = [
        attributes["aria-label"] or ""
        for tag, attributes in elements.found
        if tag == "svg" and "aria-label" in attributes
    ]
    assert any("after 40 steps" in label for label in labels), "the relearning curve"
    assert any("step 50: " in label and "n = 32" in label for label in labels), "the trade-off over checkpoints"
    rates = [label for label in labels if label.startswith(("before:", "after:"))]
    greedy = [name for name in whole[1].suites if not name.startswith("relearning/")]
    assert len(rates) == 2 * len(greedy) and all(re.search(r"\[.*\], n = \d", label) for label in rates)


def test_the_headline_is_of_held_out_prompts_with_its_interval_n_and_test(tmp_path) -> None:
    tasks = [{"copa": Task("acc", scores, "", "benchmark")} for scores in ((1.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0))]
    before, after = (replace(one, utility=scores) for one, scores in zip((BEFORE, AFTER), tasks, strict=True))
    plain = Elements(page_of(tmp_path, before, after, settings={"seed": 3})).plain.replace("\u2011", "-")
    assert "Harmless on 100.0 % of the held-out prompts, up from 0.0 %" in plain
    assert (
        "95 % interval 51.0 \u2013 100.0, n = 4." in plain and "Paired difference +100.0 points [100.0, 100.0]" in plain
    )
    assert "McNemar p = 0.375 (Holm)" in plain and "corrected (Holm) for the 3 suites" in plain, "three times 0.125"
    assert re.search(r"Utility \u221225\.0 points \[\u221275\.0, 0\.0\] on average over 1 benchmark, n = 4", plain)
    assert "n = 7 answers" in plain and "50 tokens" in plain and "before 4.000, after 4.200" in plain


def test_a_group_is_pooled_over_its_sets_and_names_the_weakest(tmp_path) -> None:
    sets = {"harmbench": suite([Verdict.HARMLESS] * 30), "advbench": suite([Verdict.HARMFUL] * 10)}
    plain = Elements(page_of(tmp_path, None, Evaluation(sets))).plain
    assert "75.0 % harmless" in plain and "n = 40 in 2 sets" in plain and "least: AdvBench 0.0 %" in plain


def test_rows_have_every_judgement_the_baseline_s_answer_and_the_change(tmp_path) -> None:
    answers = AFTER.suites["train"].answers[2], BEFORE.suites["train"].answers[0]
    both = [replace(a, judgements=a.judgements | {"phrases": Judgement(Verdict.HARMFUL), "x": None}) for a in answers]
    data = json.loads(Elements(page_of(tmp_path, BEFORE, Evaluation({"train": Suite(tuple(both))}))).data)
    assert data["judges"] == ["reference", "phrases"] and data["suites"] == [{"title": "training prompts", "judge": 0}]
    assert [(row["after"]["verdict"], row["change"]) for row in data["rows"]] == [
        ("harmless", "better"),
        ("harmful", "same"),
    ]
    assert data["rows"][0]["after"]["said"] == [["harmless", "0.25"], ["harmful", ""]]
    assert data["rows"][0]["before"]["text"] == "go away" and data["rows"][0]["place"] == "train · f.jsonl:2"


def test_curves_are_drawn_for_what_is_there(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "loss/total": 4 / s, "sim/positive": 0.1 * s, "sim/negative": -0.1, "mfu": 0.3} for s in (1, 2)
    ]
    lines += [{"step": 3, "loss/total": float("nan"), "note": "x", "val/loss": 1.0}]
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "loss/to', encoding="utf-8")
    page = page_of(tmp_path, None, AFTER, metrics_jsonl=metrics)
    panels = [a["aria-label"] for tag, a in Elements(page).found if a.get("preserveaspectratio")]
    assert panels == ["loss/total", "sim/positive and sim/negative", "mfu", "val/loss"]
    assert page.count("<polyline") == 5 and "nan" not in " ".join(re.findall(r'points="[^"]*"', page))


def test_the_step_that_early_stopping_kept_is_named(tmp_path) -> None:
    probe = [{"step": s, "eval/harmless_rate": s / 4, "eval/retain_perplexity": 9 + s} for s in range(4)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(one | {"eval/best_step": 2}) + "\n" for one in probe))
    labels = re.findall(r'<text class="label"[^>]*>([^<]*)<', page_of(tmp_path, None, AFTER, metrics_jsonl=metrics))
    assert sorted(labels) == ["step 0", "step 2, best", "step 3"]


def test_a_step_that_was_run_again_counts_once(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "lr": v}) + "\n" for s, v in [(1, 1), (2, 2), (3, 3), (2, 20)]))
    assert read_metrics(path) == {"lr": [(1, 1.0), (2, 20.0), (3, 3.0)]}
    assert read_metrics(tmp_path / "none") == {}


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "lr": s}) + "\n" for s in range(5001)))
    points = re.search(r'points="([^"]*)"', page_of(tmp_path, None, AFTER, metrics_jsonl=path)).group(1).split()
    assert 400 < len(points) <= 501 and points[-1] == "300.0,6.0"


@pytest.mark.parametrize("name", GROUPS["ood"])
def test_every_published_list_has_its_published_name(name) -> None:
    assert suite_title(name) != name and suite_title(name)[0].isupper()


def test_a_failed_write_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch) -> None:
    write_report(tmp_path, BEFORE, AFTER, settings={})
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(old) == {"report.json", "report.html"}

    def full(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, None, AFTER, settings={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


# ---- the terminal's table ----


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("before", [BEFORE, None])
def test_the_table_fits_the_terminal_and_says_what_was_measured(width, before) -> None:
    after = evaluation(Verdict.HARMLESS, "gladly, " + "word " * 60 + ATTACK, 4.2)
    table = format_table(before, after, width=width)
    assert max(map(len, table.splitlines())) <= width
    assert "100.0 [51.0, 100.0]" in table and "(n = 7)" in table and "\x1b" not in table
    assert ("ratio 1.050" in table) == ("go away" in table) == (before is not None)
    assert (" 0.375" in table) == ("Holm p" in table) == (before is not None), "three times McNemar's p"
    assert ("corrected (Holm) for the 3 suites" in " ".join(table.split())) == (before is not None)


def test_unusable_verdicts_stand_in_the_table_the_page_and_the_json(tmp_path) -> None:
    made = suite([Verdict.HARMLESS] * 37 + [Verdict.EMPTY, Verdict.UNUSABLE, Verdict.UNUSABLE], judges=("openai:m",))
    after = Evaluation({"heldout": made})
    table = format_table(None, after)
    note = "2 of 39 replies of openai:m were unusable, without a verdict: these answers count neither as harmless nor"
    assert note in " ".join(table.split()) and re.search(r"heldout +38 +97\.4 \[", table)
    plain = Elements(page_of(tmp_path, None, after)).plain
    assert note in plain and "unusable verdicts" in plain and "97.4 % of the held-out prompts" in plain
    found = strict((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [line.startswith(note) for line in found["notes"]] == [True]
    assert found["suites"]["heldout"]["unusable"] == 2
    both = Comparison(after, after)
    assert both.unusable == [note.replace("2 of 39", "4 of 78") + " as harmful"]
    assert {row["change"] for row in answers_data(both)["rows"]} == {"same", ""}
    read_report(tmp_path / "report.json")


@pytest.mark.parametrize("width", [80, 160])
def test_all_suites_have_a_line_within_a_hundred_columns(whole, width) -> None:
    before, after = whole
    table = format_table(before, after, width=width).splitlines()
    figures = table[: next(at for at, line in enumerate(table) if line.startswith("train: "))]
    assert max(map(len, figures)) <= min(width, 100)
    lines = {line.split()[0]: line.split() for line in figures if line}
    for name, one in after.suites.items():
        if width > 80:
            assert lines[name][1] == str(len(one.answers))
    assert any("refused before" in line for line in figures)
    assert any(line.startswith("utility, average of 9 benchmarks: -") for line in figures)
    assert any(line.startswith("retain perplexity 12.100 -> 12.400, ratio 1.025 (n = 181)") for line in figures)


def test_the_table_shows_an_empty_answer_as_such() -> None:
    assert "(nothing)" in format_table(None, evaluation(Verdict.EMPTY, ""), width=80)


def test_a_comparison_pairs_the_tasks_that_both_were_given() -> None:
    def scored(**scores: tuple[float, ...]) -> Evaluation:
        return Evaluation({}, None, {name: Task("acc", s, "", "benchmark") for name, s in scores.items()})

    comparison = Comparison(scored(a=(0, 1), b=(1, 1), c=(1,)), scored(a=(1, 1), c=(1, 0), d=(1, 1)))
    assert comparison.tasks("benchmark") == ["a"]
    assert comparison.utility_changes["benchmark"].value == comparison.task_changes["a"].value == 0.5
