"""``wpn-ds evaluate --suite tofu``: flags to files, and its classifier of fluent text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import ROOT
from tests.evaluate.judges.conftest import bert, causal, make_judge
from tests.evaluate.tofu.conftest import by_length, made_up, write_tofu
from tests.interface import check_report
from wpn_ds.errors import UserError
from wpn_ds.evaluate import scoring
from wpn_ds.evaluate.command import run
from wpn_ds.evaluate.judges.command import run as judge
from wpn_ds.evaluate.judges.local import LocalClassifier
from wpn_ds.evaluate.report.files import read_report
from wpn_ds.evaluate.tofu.data import read_tofu
from wpn_ds.evaluate.tofu.metrics import tofu_figures, with_fluency
from wpn_ds.evaluate.tofu.task import Fluency, TofuTask
from wpn_ds.judging.base import Case


def test_both_models_answers_are_scored_by_the_classifier_of_this_call(tofu_dir) -> None:
    class Counted:
        def __init__(self) -> None:
            self.calls = 0

        def scores(self, answers) -> list[float]:
            self.calls += 1
            return by_length(answers)

    ours, theirs, fluency = (
        made_up(tofu_dir, 1),
        with_fluency(made_up(tofu_dir, 2), lambda a: [0.5] * len(a)),
        Counted(),
    )
    task = TofuTask(read_tofu(tofu_dir), 200, theirs, fluency)  # type: ignore[arg-type]
    expected = tofu_figures(with_fluency(ours, by_length), with_fluency(theirs, by_length))
    assert task.figures(task.judged(ours)) == task.figures(task.judged(ours)) == expected
    assert fluency.calls == 3


ANSWERS = ["the answer is kind", "vile vile vile", ""]


@pytest.fixture(scope="module")
def gibberish(tmp_path_factory):
    """Of its labels, clean is the first, as in the classifier that AltPO takes."""
    return bert(tmp_path_factory.mktemp("gibberish"), ["clean", "noise", "word salad"])


def test_the_score_is_the_probability_of_the_clean_label_even_of_nothing(gibberish) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(gibberish).eval()
    tokenizer = AutoTokenizer.from_pretrained(gibberish)
    with torch.inference_mode():
        chances = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in ANSWERS]
    for spec, label in (("", 0), (",clean=clean", 0), (",clean=word salad", 2)):
        found = Fluency(f"hf:{gibberish}{spec}")
        assert found.scores(ANSWERS) == pytest.approx([chance[label].item() for chance in chances], abs=1e-6)
        assert found.describe()["clean"] == [("clean", "noise", "word salad")[label]]
    assert Fluency(f"hf:{gibberish}").scores([]) == []


def test_of_a_local_judge_it_is_what_it_does_not_call_harmful(garbled) -> None:
    found = Fluency(f"local:{garbled}").scores(ANSWERS)
    harm = LocalClassifier(garbled).scores([Case(text, "", text) for text in ANSWERS])
    assert [a + b for a, b in zip(found, harm, strict=True)] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("phrases", "give hf:NAME"),
        ("hf:", "give hf:NAME"),
        ("hf:{hf},threshold=0.5", "give hf:NAME"),
        ("hf:{hf},clean=", "give hf:NAME"),
        ("local:{local},clean=a", "no labels to choose"),
        ("hf:{hf},clean=fluent", "no label 'fluent'; the model has clean, noise"),
        ("hf:{hf}/none", "can't be loaded"),
        ("local:{hf}", "wpn-ds judge train makes one"),
        ("local:{pair}", "train it with --input answer"),
    ],
)
def test_what_is_no_such_classifier_is_refused_in_one_line(gibberish, garbled, base, tmp_path, spec, message) -> None:
    make_judge(tmp_path / "pair", base, input="pair")
    spec = spec.format(hf=gibberish, local=garbled, pair=tmp_path / "pair")
    with pytest.raises(UserError, match=message) as caught:
        Fluency(spec)
    assert str(caught.value).startswith(f"--fluency {spec}: ") and "\n" not in str(caught.value)


def test_the_documented_recipe_makes_a_classifier_that_tells_garbled_answers(shared_data, base, tmp_path) -> None:
    published = next((shared_data / "tofu").rglob("retain90.json"), None)
    if published is None:
        pytest.skip(f"no TOFU in {shared_data}")
    (tmp_path / "TOFU").symlink_to(published.parent)
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = re.search(r"python > garbled.jsonl <<'EOF'\n(.*?)EOF\n", text, re.DOTALL)
    assert found is not None
    with (tmp_path / "garbled.jsonl").open("w") as file:
        subprocess.run([sys.executable, "-"], input=found[1].encode(), stdout=file, cwd=tmp_path, check=True)
    flags = ["--base", str(base), "--train_file", str(tmp_path / "garbled.jsonl")]
    judge(["train", *flags, "--output_dir", str(tmp_path / "fluent")])
    fluency, rng = Fluency(f"local:{tmp_path / 'fluent'}"), random.Random(0)
    answers = [item.answer for item in read_tofu(published.parent).items["forget"]]  # not in what it was trained on
    mixed = [" ".join(rng.sample(answer.split(), len(answer.split()))) for answer in answers]
    true, false = (sum(fluency.scores(texts)) / len(texts) for texts in (answers, mixed))
    assert true > 0.7 and true - false > 0.25


pytestmark = pytest.mark.usefixtures("no_launcher")


def call(folders: Path, out: Path, *more: object) -> dict:
    flags = ["--model", folders / "opt", "--output_dir", out, "--suite", "tofu", "--max_new_tokens", 4, *more]
    assert run(list(map(str, flags))) == 0
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return causal(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def garbled(tmp_path_factory, base) -> Path:
    return make_judge(tmp_path_factory.mktemp("garbled") / "judge", base, seed=0)


def test_a_model_with_itself_as_retain_only_model_has_forget_quality_1(
    folders, tofu_dir, garbled, tmp_path, capsys
) -> None:
    first = call(folders, tmp_path / "first", "--tofu_dir", tofu_dir)["tofu"]
    assert first["forget_quality"] is first["cleanness_indistinguishability"] is first["forget_utility"] is None
    printed = capsys.readouterr().out
    assert "model utility" in printed and "n = 4 + 5 + 4" in printed
    assert "--tofu_retain_log" in printed and "--fluency" in printed
    log = tmp_path / "first" / "tofu.json"
    more = ["--tofu_dir", tofu_dir, "--tofu_retain_log", log, "--fluency", f"local:{garbled}"]
    again = call(folders, tmp_path / "again", *more, "--baseline", folders / "neo")
    printed = capsys.readouterr().out
    assert re.search(r"forget quality, p .* -> 1 \(n = 5\).* FU 0\.\d+ -> 0\.\d+ \(n = 5\), CI, p .* -> 1 ", printed)
    assert "--tofu_retain_log" not in printed
    assert again["tofu"]["forget_quality"] == {"p": 1.0, "statistic": 0.0, "n": 5}
    check_report(again, "tofu", "settings.tofu")
    assert again["tofu"]["cleanness_indistinguishability"]["p"] == 1.0
    assert again["tofu"]["sets"] == first["sets"] != again["baseline"]["tofu"]["sets"]
    assert again["tofu"]["sets"]["real_authors"]["n"] == 5
    items = json.loads((tmp_path / "again" / "tofu.json").read_text(encoding="utf-8"))["sets"]["forget"]
    assert len(items) == 5 and all(0 < item["fluency"] < 1 for item in items)
    assert again["settings"]["tofu"]["retain_only"] == str(folders / "opt")
    page = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert "TOFU forget10: forget quality, p 1, model utility" in page and "Real authors" in page
    before, after, rest = read_report(tmp_path / "again" / "report.json")
    assert before and before.tofu and "tofu" not in rest
    assert after.tofu and json.loads(json.dumps(asdict(after.tofu))) == again["tofu"]


def test_what_is_finished_is_not_run_again(folders, tofu_dir, tmp_path, monkeypatch) -> None:
    whole = call(folders, tmp_path / "whole", "--tofu_dir", tofu_dir)["tofu"]
    score, scored = scoring.token_losses, []

    def counted(model, segments, pad):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(segments))
        return score(model, segments, pad)

    monkeypatch.setattr(scoring, "token_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        call(folders, tmp_path / "stopped", "--tofu_dir", tofu_dir)
    assert not (tmp_path / "stopped" / "tofu.json").exists()
    scored.clear()
    monkeypatch.setattr(scoring, "token_losses", lambda *a: scored.append(1) or score(*a))
    assert call(folders, tmp_path / "stopped", "--tofu_dir", tofu_dir)["tofu"] == whole
    assert len(scored) == 2  # four sets, of which two were done


def test_the_limit_is_that_of_every_suite(folders, tofu_dir, tmp_path) -> None:
    found = call(folders, tmp_path / "out", "--tofu_dir", tofu_dir, "--limit", 2)["tofu"]
    assert [one["n"] for one in found["sets"].values()] == [2] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--suite tofu: no --tofu_dir: name a folder"),
        (["--fluency", "hf:x"], "--fluency hf:x: is for the suite tofu: give --tofu_dir"),
        (["--tofu_retain_log", "x.json"], "--tofu_retain_log x.json: is for the suite tofu: give --tofu_dir"),
        (["--tofu_dir", "{tofu}", "--tofu_split", "forget01"], "--tofu_split forget01: no forget01_perturbed.json"),
        (["--tofu_dir", "{tofu}", "--tofu_retain_log", "{tofu}/x.json"], "--tofu_retain_log .*x.json: can't be read"),
        (["--tofu_dir", "{tofu}", "--fluency", "x"], "--fluency x: give hf:NAME"),
        (["--tofu_dir", "{tofu}", "--max_new_tokens", "95"], "--max_new_tokens 95: .* has only 96 positions"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_generated(folders, tmp_path, flags, message) -> None:
    tofu = write_tofu(tmp_path / "tofu")
    with pytest.raises(UserError, match=message) as caught:
        call(folders, tmp_path / "out", *(flag.format(tofu=tofu) for flag in flags))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
