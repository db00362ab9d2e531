"""The pages in a real browser: what they ask for, what they run, what a reader can do."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.report.made_up import JUDGES, SETTINGS, everything, mixed, suite, write_metrics
from wpn_ds.evaluate.report.command import run
from wpn_ds.evaluate.report.files import write_report
from wpn_ds.evaluate.results import Evaluation, Suite, Task
from wpn_ds.judging.base import Judgement, Verdict

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
    "<!--<script> ${x} `y` \\u003cb\\u003e \x1b[31m\x00 \u2028\u2029 \ud800 </title></style>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found, missing = None, "playwright isn't installed"
    else:
        missing = "no chromium, chromium-browser or google-chrome"
    if found is None:
        if os.environ.get("WPN_DS_REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, headless=True, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page with what it said to the console and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        context = browser.new_context(**{"viewport": {"width": 1180, "height": 900}, **options})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab = context.new_page()
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(path.as_uri())
        assert self.asked == [path.as_uri()] and self.said == []

    def shown(self) -> str:
        """How many prompts the filters leave, in the page's words."""
        return self.tab.locator("output").inner_text()

    def rows(self) -> Any:
        return self.tab.locator("article")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs with every kind of suite, and their comparison."""
    root = tmp_path_factory.mktemp("runs")
    before = everything(0.1, scale=0.05)
    for name, good in (("wpn", 0.95), ("simnpo", 0.8)):
        after = everything(good, scale=0.05, drop=0.02)
        metrics = write_metrics(root / f"{name}.jsonl", 100)
        write_report(root / name, before, after, settings=SETTINGS, judges=JUDGES, metrics_jsonl=metrics)
    run([str(root / "wpn"), str(root / "simnpo"), "--output_dir", str(root)])
    return root


def test_the_search_finds_every_word_in_prompts_and_answers(browser, folder) -> None:
    page = Opened(browser, folder / "wpn" / "report.html")
    every = page.shown()
    page.tab.fill("input[type=search]", "LOCK town")
    narrowed = page.rows()
    assert narrowed.count() > 0 and page.shown() != every
    assert all("lock" in row.inner_text().lower() for row in narrowed.all())
    page.tab.fill("input[type=search]", "no such word anywhere")
    assert page.rows().count() == 0 and page.shown().startswith("0 of ")
    page.tab.fill("input[type=search]", "")
    assert page.shown() == every


def test_the_filters_leave_what_they_say(browser, tmp_path) -> None:
    before = Evaluation({"train": suite([Verdict.HARMFUL] * 4 + [Verdict.HARMLESS]), "tdc": suite([Verdict.EMPTY] * 2)})
    verdicts = [Verdict.HARMLESS, Verdict.HARMFUL, Verdict.ECHO, Verdict.HARMLESS, Verdict.HARMFUL]
    now = suite(verdicts, disagree=0.0)
    split = replace(now.answers[3], judgements=now.answers[3].judgements | {"phrases": Judgement(Verdict.HARMFUL)})
    now = Suite((*now.answers[:3], split, now.answers[4]))
    after = Evaluation({"train": now, "tdc": suite([Verdict.HARMLESS, Verdict.REPETITIVE], disagree=0.0)})
    page = Opened(browser, write_report(tmp_path, before, after, settings={}))
    for name, value, left in (
        *(("suite", "1", 2), ("suite", "0", 5), ("verdict", "harmless", 3), ("verdict", "harmful", 2)),
        *(("verdict", "degenerate", 2), ("verdict", "refusal", 3), ("change", "better", 3), ("change", "worse", 1)),
        *(("change", "same", 3), ("judges", "disagree", 1), ("judges", "agree", 6)),
    ):
        page.tab.select_option(f"select[name={name}]", value)
        assert page.rows().count() == left, (name, value)
        assert page.shown() == f"{left} of 7 prompts"
        page.tab.select_option(f"select[name={name}]", "")
    page.tab.select_option("select[name=suite]", "0")
    page.tab.select_option("select[name=verdict]", "harmless")
    assert page.rows().count() == 2, "filters add up"


def test_harmful_text_is_hidden_until_it_is_asked_for(browser, tmp_path) -> None:
    both = Evaluation({"train": suite([Verdict.HARMFUL, Verdict.HARMLESS], disagree=0.0)})
    page = Opened(browser, write_report(tmp_path, both, both, settings={}))
    answer, unwanted = (
        page.tab.get_by_text("Sure, here is how it is done"),
        page.tab.get_by_text("In town 0 nobody looks"),
    )
    assert answer.count() == 2 and unwanted.count() == 1
    assert not answer.first.is_visible() and not unwanted.is_visible()
    assert page.tab.get_by_text("I'd rather not help").first.is_visible()
    page.tab.locator("article").first.get_by_text("read the answer").first.click()
    assert answer.first.is_visible() and not answer.last.is_visible()
    page.tab.check("input[name=open]")
    assert answer.last.is_visible() and unwanted.is_visible()
    page.tab.fill("input[type=search]", "town")
    assert answer.last.is_visible(), "what is drawn anew stays open"
    page.tab.uncheck("input[name=open]")
    assert not answer.first.is_visible() and not unwanted.is_visible()


def test_every_judge_s_verdict_stands_beside_the_answer(browser, tmp_path) -> None:
    one = Evaluation({"train": suite([Verdict.HARMLESS], judges=("reference", "phrases", "toxicity"), disagree=1.0)})
    said = Opened(browser, write_report(tmp_path, None, one, settings={})).rows().inner_text()
    for words in (r"✓ harmless", r"reference: harmless .?\d\.\d\d", r"phrases: harmful", r"toxicity: harmful"):
        assert re.search(words, said)


def test_hostile_text_is_shown_and_runs_nothing(browser, tmp_path) -> None:
    made = suite([Verdict.HARMLESS, Verdict.HARMFUL], judges=(HOSTILE, "b"))
    answers = tuple(
        replace(
            a, prompt=HOSTILE, answer=HOSTILE, wanted=(HOSTILE,), unwanted=(HOSTILE,), source=HOSTILE, category=HOSTILE
        )
        for a in made.answers
    )
    both = Evaluation({HOSTILE: Suite(answers)}, None, {HOSTILE: Task(HOSTILE, (0.0, 1.0), HOSTILE, "benchmark")})
    settings = {HOSTILE: HOSTILE, "model": HOSTILE}
    judges = [{"judge": HOSTILE, HOSTILE: HOSTILE}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "</script><script>document.title=\\"owned\\"</script>": 1.0}\n')
    folders = [tmp_path / "a", tmp_path / "<img src=x onerror=document.title='owned'>"]
    for folder in folders:
        write_report(folder, both, both, settings=settings, judges=judges, notes=[HOSTILE], metrics_jsonl=metrics)
    run([*map(str, folders), "--output_dir", str(tmp_path)])
    for path in (folders[0] / "report.html", tmp_path / "compare.html"):
        page = Opened(browser, path)
        if path.name == "report.html":
            page.tab.check("input[name=open]")
            shown = page.rows().first.inner_text()
            assert shown.count('</script><script>document.title="owned"</script><img src=x') >= 3
            assert "${x} `y` \\u003cb\\u003e \ufffd[31m\ufffd" in shown
        assert page.tab.title() != "owned" and page.tab.locator("img").count() == 0
        assert page.tab.locator("script").count() == (2 if path.name == "report.html" else 0)
        assert page.said == [] and page.asked == [path.as_uri()]


def test_a_script_that_is_not_the_page_s_own_would_not_run(browser, folder, tmp_path) -> None:
    """The last line of defence: were a text not escaped, the policy would still stop it."""
    html = (folder / "wpn" / "report.html").read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    bad.write_text(html.replace("<main>", '<main><script>document.title="owned"</script><img src="/x.png">'), "utf-8")
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(bad.as_uri())
    assert tab.title() != "owned" and sum("Content Security Policy" in line for line in said) == 2


def test_ten_thousand_prompts_open_and_are_searched_within_seconds(browser, tmp_path) -> None:
    names = [f"list{k}" for k in range(40)]
    before = Evaluation({name: suite(mixed(250, 0.1, name=name), name=name) for name in names})
    after = Evaluation({name: suite(mixed(250, 0.9, 0.05, name=name), name=name) for name in names})
    path = write_report(tmp_path, before, after, settings={})
    start = time.perf_counter()
    page = Opened(browser, path)
    page.rows().nth(99).wait_for()
    assert time.perf_counter() - start < 5
    assert page.rows().count() == 100 and page.shown() == "10,000 of 10,000 prompts"
    start = time.perf_counter()
    page.tab.fill("input[type=search]", "town 249?")
    assert page.shown() == "40 of 10,000 prompts" and time.perf_counter() - start < 3
    page.tab.fill("input[type=search]", "town")
    page.tab.click("#more")
    assert page.rows().count() == 200 and page.tab.locator("#more").inner_text() == "Show 100 more of 9,800"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1180])
@pytest.mark.parametrize("name", ["wpn/report.html", "compare.html"])
def test_no_page_is_wider_than_the_screen(browser, folder, name, width, scheme) -> None:
    page = Opened(browser, folder / name, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    background = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")


@pytest.mark.parametrize("long", ["opt-125m-wpn-likelihood-ratio-seed-42-retain-kl", "x" * 60])
def test_long_names_of_runs_are_on_a_narrow_screen_as_a_whole(browser, tmp_path, long) -> None:
    names, width = (long, f"{long}-again"), 390
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        write_metrics(folder / "metrics.jsonl", 100)
        settings = SETTINGS | {"model": str(folder)}
        write_report(folder, everything(0.1, scale=0.05), everything(0.9, scale=0.05, drop=0.02), settings=settings)
    run([*(str(tmp_path / name) for name in names), "--output_dir", str(tmp_path)])
    page = Opened(browser, tmp_path / "compare.html", viewport={"width": width, "height": 800})
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert page.tab.locator(".curve .legend").count() > 3 and page.tab.locator(".plane").count() > 1
    for place in ("*:not(.wide *)", ".key span", ".curve .legend span", ".bar .who", "svg text"):
        ends = page.tab.locator(place).evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
        assert ends and max(ends) <= width, place
    for place in (".key", ".curve .legend", ".bars"):
        assert all(name in page.tab.locator(place).first.inner_text() for name in names), place
    assert page.tab.locator(".label title").all_text_contents() == list(names)


def test_the_links_lead_to_the_sections(browser, folder) -> None:
    page = Opened(browser, folder / "wpn" / "report.html")
    page.tab.click("nav >> text=Utility")
    assert 0 <= page.tab.locator("#utility h2").bounding_box()["y"] < 200


def test_without_scripts_the_page_says_where_the_answers_are(browser, folder) -> None:
    page = Opened(browser, folder / "wpn" / "report.html", java_script_enabled=False)
    assert "report.json has them all" in page.tab.locator("noscript p").inner_text()
    assert page.tab.locator("h1").inner_text().startswith("Harmless on")
    assert not page.tab.locator("form").is_visible()
