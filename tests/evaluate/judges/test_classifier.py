from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.evaluate.judges.cases import case, verdicts
from tests.evaluate.judges.conftest import bert
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import classifier as module
from wpn_ds.evaluate.judges.classifier import BATCH, ClassifierJudge
from wpn_ds.judging.base import Verdict

load = module._load
NICE, VILE = "the answer is nice", "the answer is vile"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Independent labels, all of them harmful."""
    folder = tmp_path_factory.mktemp("several")
    return bert(folder, ["obscene", "severe_toxic", "insult"], problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Random weights, so that every text has a score of its own."""
    return bert(tmp_path_factory.mktemp("random"), ["safe", "toxic"], taught=False, initializer_range=0.5)


@pytest.fixture
def copy(classifier, tmp_path):
    return shutil.copytree(classifier, tmp_path / "copy")


def test_obvious_answers_are_judged_right_and_the_score_is_the_probability_of_harm(classifier) -> None:
    judge = ClassifierJudge(str(classifier))
    assert verdicts(judge, NICE, VILE) == [Verdict.HARMLESS, Verdict.HARMFUL]
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.inference_mode():
        wanted = model(**tokenizer(VILE, return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    [judgement] = judge([case(VILE)])
    assert judgement is not None and judgement.score == pytest.approx(wanted, abs=1e-6) and wanted > 0.9


def test_many_answers_are_judged_in_order_and_as_if_alone(random) -> None:
    judge = ClassifierJudge(str(random))
    cases = [case(f"{'kind ' * (at % 4)}the answer {'vile ' * (at % 3)}{'is ' * (at % 5)}") for at in range(BATCH + 5)]
    together = [j.score for j in judge(cases) if j]
    assert together == pytest.approx([judge([one])[0].score for one in cases], abs=1e-6)
    assert len({round(score, 5) for score in together}) > 5


def test_of_several_labels_the_likeliest_harmful_one_decides_by_its_sigmoid(several) -> None:
    judge = ClassifierJudge(str(several), harmful=["severe_toxic", "INSULT"])
    tokenizer = AutoTokenizer.from_pretrained(several)
    model = AutoModelForSequenceClassification.from_pretrained(several).eval()
    with torch.inference_mode():
        chances = model(**tokenizer(VILE, return_tensors="pt")).logits.sigmoid()[0]
    [judgement] = judge([case(VILE)])
    assert judgement is not None and judgement.score == pytest.approx(chances[1:].max().item(), abs=1e-6)
    assert judge.describe()["harmful"] == ["severe_toxic", "insult"]
    assert ClassifierJudge(str(several)).describe()["harmful"] == ["obscene", "severe_toxic", "insult"]


def test_a_single_output_is_a_sigmoid(tmp_path) -> None:
    judge = ClassifierJudge(str(bert(tmp_path, ["toxicity"])))
    assert judge.describe()["probabilities"] == "sigmoid"
    assert verdicts(judge, NICE, VILE) == [Verdict.HARMLESS, Verdict.HARMFUL]


def test_the_threshold_decides_and_counts_as_harmful(classifier) -> None:
    [judgement] = ClassifierJudge(str(classifier))([case(VILE)])
    assert judgement is not None and judgement.score is not None
    at, above = judgement.score, (judgement.score + 1) / 2
    assert verdicts(ClassifierJudge(str(classifier), threshold=at), VILE) == [Verdict.HARMFUL]
    assert verdicts(ClassifierJudge(str(classifier), threshold=above), VILE) == [Verdict.HARMLESS]


def test_the_prompt_is_read_only_by_a_judge_of_pairs(random) -> None:
    asked = [case("answer", "the is kind"), case("answer", "vile rude cruel")]
    alone, pair = ([j.score for j in ClassifierJudge(str(random), input=i)(asked) if j] for i in ("answer", "pair"))
    assert alone[0] == pytest.approx(alone[1], abs=1e-6) and abs(pair[0] - pair[1]) > 0.01


def test_what_is_too_long_loses_its_end(classifier) -> None:
    judge = ClassifierJudge(str(classifier), input="pair")
    assert judge.describe()["max_tokens"] == 24
    long = " ".join(["kind calm the is"] * 50)
    assert None not in judge([case(long), case(long, long)])


@pytest.mark.parametrize(
    ("labels", "harmful"),
    [
        (["non-toxic", "toxic"], ["toxic"]),
        (["Safe", "UNSAFE"], ["UNSAFE"]),
        (["nothate", "hate"], ["hate"]),
        (["neutral", "Hate Speech", "offensive_language"], ["Hate Speech", "offensive_language"]),
        (["harmful", "not harmful"], ["harmful"]),
    ],
)
def test_unmistakable_names_tell_which_labels_are_harmful(labels, harmful, copy) -> None:
    assert ClassifierJudge(str(relabelled(copy, labels))).describe()["harmful"] == harmful


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["toxic", "S3"], ["safe", "neutral"]])
def test_other_names_are_refused_with_the_option_that_helps(labels, copy) -> None:
    folder = relabelled(copy, labels)
    with pytest.raises(UserError, match=rf"{labels[0]}, {labels[1]}.*,harmful=LABEL") as error:
        ClassifierJudge(str(folder))
    assert "\n" not in str(error.value)
    assert ClassifierJudge(str(folder), harmful=[labels[1].lower()]).describe()["harmful"] == [labels[1]]
    with pytest.raises(UserError, match=f"no label 'hostile'; the model has {labels[0]}"):
        ClassifierJudge(str(folder), harmful=["hostile"])


def test_labels_of_which_every_text_has_one_cannot_all_be_harmful(classifier) -> None:
    with pytest.raises(UserError, match="all its labels are harmful"):
        ClassifierJudge(str(classifier), harmful=["safe", "toxic"])


def relabelled(folder, labels):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    extra = len(labels) - model.config.num_labels
    if extra:
        model.classifier.weight.data = torch.cat([model.classifier.weight.data, torch.zeros(extra, 16)])
        model.classifier.bias.data = torch.cat([model.classifier.bias.data, torch.zeros(extra)])
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: at for at, label in enumerate(labels)}
    model.save_pretrained(folder)
    return folder


def test_a_model_without_a_trained_classifier_is_refused(copy) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^--judge hf:.*newly initialised: classifier\.weight[^\n]*$"):
        ClassifierJudge(str(copy))([case(NICE)])


def test_a_folder_without_a_model_or_with_pickled_weights_alone_is_one_line(copy, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^--judge hf:nowhere/at/all: [^\n]*$"):
        ClassifierJudge("nowhere/at/all")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^--judge hf:[^\n]*safetensors[^\n]*$"):
        ClassifierJudge(str(copy))([case(NICE)])


def test_it_is_loaded_when_it_is_first_asked_and_its_labels_are_checked_before(classifier, monkeypatch) -> None:
    loads = []
    monkeypatch.setattr(module, "_load", lambda *arguments: loads.append(arguments) or load(*arguments))
    judge = ClassifierJudge(str(classifier))
    assert judge.can_judge([case(NICE)]) and not loads
    assert verdicts(judge, NICE, VILE) == verdicts(judge, NICE, VILE) and len(loads) == 1
    with pytest.raises(UserError, match="no label 'hostile'"):
        ClassifierJudge(str(classifier), harmful=["hostile"])


def test_a_hub_s_model_is_that_of_one_commit_whatever_comes_later(hub, classifier) -> None:
    hub.publish("org/small", classifier, "a" * 40)
    judge = ClassifierJudge("org/small")
    shutil.rmtree(hub.publish("org/small", classifier, "b" * 40))
    assert verdicts(judge, NICE, VILE) == [Verdict.HARMLESS, Verdict.HARMFUL]
    assert (judge.describe()["model"], judge.describe()["commit"]) == ("org/small", "a" * 40)


def test_a_classifier_says_what_its_verdicts_depend_on(classifier) -> None:
    about = ClassifierJudge(str(classifier), threshold=0.3, input="pair").describe()
    assert about.pop("transformers")
    assert about == {
        "judge": "classifier",
        "version": 1,
        "model": str(classifier),
        "commit": None,
        "labels": ["safe", "toxic"],
        "harmful": ["toxic"],
        "threshold": 0.3,
        "input": "pair",
        "probabilities": "softmax",
        "max_tokens": 24,
    }
