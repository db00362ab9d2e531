"""What stands in a report never becomes a part of the page's structure, wherever a text of others gets into it."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.evaluate.report.made_up import mixed, suite, utility, write_metrics
from tests.evaluate.report.test_tofu import figures as tofu_figures
from wpn_ds.evaluate.report.command import run
from wpn_ds.evaluate.report.files import write_report
from wpn_ds.evaluate.results import Answer, Evaluation, Retain, Suite, Task

HOSTILE = (
    "\"'></title></script><script>x()</script><img src=x onerror=x()> {{ 7 * 191 }} {% raw %} ${x} &amp; \x1b\u2028"
)
PLAIN = "word"
_SLASH = "\u2215"  # looks like a slash, and may stand in a folder's name


class Structure(HTMLParser):
    """Tags with the names of their attributes, in order; texts and attributes' values apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.values: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.values += [value for _, value in attrs if value]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def evaluation(text: str) -> Evaluation:
    """Every kind of suite, of judge and of task, with ``text`` in every field that takes any."""

    def told(answer: Answer) -> Answer:
        said = {f"{text}{name}": judgement for name, judgement in answer.judgements.items()}
        fields = {name: text for name in ("prompt", "answer", "source", "category")}
        return replace(answer, judgements=said, wanted=(text,), unwanted=(text,), **fields)

    def made(*answers: Answer) -> Suite:
        return Suite(answers or tuple(map(told, suite(mixed(6, 0.5, 0.3)).answers)))

    suites = {name: made() for name in (text, f"attack/{text}", "heldout", "relearning/0", "relearning/5")}
    suites["benign"] = replace(made(), kind="benign")
    suites["drawn"] = made(*(replace(told(a), seed=s) for a in suite(mixed(6, 0.5)).answers for s in (0, 1)))
    tasks = {f"{text}{name}": Task(text, task.scores, text, task.group) for name, task in utility(0.0, 0.05).items()}
    return Evaluation(suites, Retain(5, 60, 10.0), tasks, replace(tofu_figures(0.5, None, (text,)), split=text))


def pages(folder: Path, text: str, before: bool) -> dict[str, str]:
    """The report of a run and the comparison of two, all of whose texts are ``text``."""
    for name in ("a", "b"):
        run_folder = folder / f"{name}{text}".replace("/", _SLASH)
        found = evaluation(text)
        settings = {"model": text, "baseline": text, text: text, "nested": {text: [text, name]}, "which": text + name}
        judges = [{"judge": text, text: text}]
        write_report(run_folder, found if before else None, found, settings=settings, judges=judges, notes=[text])
        metrics = write_metrics(run_folder / "metrics.jsonl", 100)
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        named = [record | {f"loss/{text}": 1.0, text: 2.0} for record in records]
        metrics.write_text("\n".join(map(json.dumps, named)))
        (run_folder / "run.yaml").write_text(json.dumps({text: text + name}))
    folders = sorted(str(path) for path in folder.iterdir())
    run([folders[0]])
    run([*folders, "--output_dir", str(folder / "compared")])
    found_pages = {Path(folders[0]) / "report.html", folder / "compared" / "compare.html"}
    return {path.name: path.read_text(encoding="utf-8") for path in found_pages}


@pytest.mark.parametrize("before", [True, False], ids=["compared", "alone"])
def test_hostile_text_in_every_field_changes_no_tag_of_any_page(tmp_path, before) -> None:
    hostile, plain = (pages(tmp_path / name, text, before) for name, text in (("h", HOSTILE), ("p", PLAIN)))
    for name, page in hostile.items():
        found, expected = Structure(page), Structure(plain[name])
        assert found.tags == expected.tags and len(found.tags) > 500
        shown = HOSTILE.replace("\x1b", "\ufffd").replace("/", _SLASH)
        texts, values = ([one.replace("/", _SLASH) for one in all_of] for all_of in (found.texts, found.values))
        assert sum(shown in text for text in texts) > 20 and any(shown in value for value in values)
        assert "1337" not in page and "\x1b" not in page
        assert "x()<" not in page and "<img" not in page and html.escape("<img") in page
