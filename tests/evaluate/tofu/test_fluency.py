from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import ROOT
from tests.evaluate.judges.conftest import bert, labelled
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.command import run
from wpn_ds.evaluate.judges.local import LocalClassifier, fit, save
from wpn_ds.evaluate.tofu.data import read_tofu
from wpn_ds.evaluate.tofu.fluency import Fluency
from wpn_ds.judging.base import Case

ANSWERS = ["the answer is kind", "vile vile vile", ""]


@pytest.fixture(scope="module")
def gibberish(tmp_path_factory):
    """Of its labels, clean is the first, as in the classifier that AltPO takes."""
    return bert(tmp_path_factory.mktemp("gibberish"), ["clean", "noise", "word salad"])


@pytest.fixture(scope="module")
def garbled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("garbled") / "judge"
    save(folder, fit(labelled(), "answer"), {"seed": 0})
    return folder


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
def test_what_is_no_such_classifier_is_refused_in_one_line(gibberish, garbled, tmp_path, spec, message) -> None:
    save(tmp_path / "pair", fit(labelled(), "pair"), {})
    spec = spec.format(hf=gibberish, local=garbled, pair=tmp_path / "pair")
    with pytest.raises(UserError, match=message) as caught:
        Fluency(spec)
    assert str(caught.value).startswith(f"--fluency {spec}: ") and "\n" not in str(caught.value)


def test_the_documented_recipe_makes_a_classifier_that_tells_garbled_answers(shared_data, tmp_path) -> None:
    published = next((shared_data / "tofu").rglob("retain90.json"), None)
    if published is None:
        pytest.skip(f"no TOFU in {shared_data}")
    (tmp_path / "TOFU").symlink_to(published.parent)
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = re.search(r"python > garbled.jsonl <<'EOF'\n(.*?)EOF\n", text, re.DOTALL)
    assert found is not None
    with (tmp_path / "garbled.jsonl").open("w") as file:
        subprocess.run([sys.executable, "-"], input=found[1].encode(), stdout=file, cwd=tmp_path, check=True)
    run(["train", "--train_file", str(tmp_path / "garbled.jsonl"), "--output_dir", str(tmp_path / "fluent")])
    fluency, rng = Fluency(f"local:{tmp_path / 'fluent'}"), random.Random(0)
    answers = [item.answer for item in read_tofu(published.parent).items["forget"]]  # not in what it was trained on
    mixed = [" ".join(rng.sample(answer.split(), len(answer.split()))) for answer in answers]
    true, false = (sum(fluency.scores(texts)) / len(texts) for texts in (answers, mixed))
    assert true > 0.7 and true - false > 0.25
