from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluate.judges.cases import case, verdicts
from tests.evaluate.judges.conftest import causal, labelled, make_judge
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import make_judges
from wpn_ds.evaluate.judges.local import Head, LocalClassifier, save
from wpn_ds.evaluate.judges.states import Base
from wpn_ds.judging.base import Verdict
from wpn_ds.models.load import Source

KIND, RUDE = "happy to help you with soap", "only a fool would ask that"


def test_obvious_answers_are_judged_right_and_the_threshold_decides(local) -> None:
    assert verdicts(LocalClassifier(local), KIND, RUDE) == [Verdict.HARMLESS, Verdict.HARMFUL]
    low, high = (j.score for j in LocalClassifier(local)([case(KIND), case(RUDE)]) if j)
    assert 0 < low < 0.5 < high < 1
    assert verdicts(LocalClassifier(local, threshold=high), RUDE) == [Verdict.HARMFUL]
    assert verdicts(LocalClassifier(local, threshold=(high + 1) / 2), RUDE) == [Verdict.HARMLESS]


def test_the_threshold_that_training_chose_holds_unless_another_is_given(base, tmp_path) -> None:
    folder = make_judge(tmp_path / "judge", base, threshold=0.999)
    assert verdicts(LocalClassifier(folder), RUDE) == [Verdict.HARMLESS]
    assert LocalClassifier(folder).describe()["threshold"] == 0.999
    assert verdicts(LocalClassifier(folder, threshold=0.5), RUDE) == [Verdict.HARMFUL]


def test_a_loaded_judge_scores_as_the_one_that_was_saved(base, tmp_path) -> None:
    reader = Base(Source(str(base), "--base"))
    rng = np.random.default_rng(0)
    mean, scale = (rng.random(reader.width, np.float32) + 1 for _ in range(2))
    head = Head(mean, scale, rng.normal(size=reader.width).astype(np.float32) / 50, 0.25)
    save(tmp_path / "judge", head, reader, {"input": "answer", "threshold": 0.5})
    scores = [j.score for j in LocalClassifier(tmp_path / "judge")([case(KIND), case(RUDE)]) if j]
    features = reader.features(None, [KIND, RUDE])
    assert scores == pytest.approx(head.scores(features).tolist(), abs=1e-12)
    margins = ((features - head.mean) / head.scale) @ head.coef + 0.25
    assert scores == pytest.approx(1 / (1 + np.exp(-margins)), rel=1e-3)


def test_the_prompt_is_read_only_by_a_judge_of_pairs(local, base, tmp_path) -> None:
    # what the answer is worth depends on the prompt alone
    examples = [replace(one, answer=f"yes {at // 2}", prompt="robbery" if one.harmful else "soup")
                for at, one in enumerate(labelled())]  # fmt: skip
    pair = make_judge(tmp_path / "pair", base, examples, "pair")
    cases = [case("yes 3", "robbery"), case("yes 3", "soup")]
    assert [j and j.verdict for j in LocalClassifier(pair)(cases)] == [Verdict.HARMFUL, Verdict.HARMLESS]
    alone = [j.score for j in LocalClassifier(local)(cases) if j]
    assert alone[0] == alone[1]


def test_what_says_nothing_is_not_read(local, monkeypatch) -> None:
    monkeypatch.setattr(Base, "features", lambda self, prompts, answers: pytest.fail(f"read {answers}"))
    found = LocalClassifier(local)([case(""), case("sorry sorry sorry")])
    assert [j and j.verdict for j in found] == [Verdict.EMPTY, Verdict.REPETITIVE]


def test_what_was_measured_at_another_threshold_is_not_said(base, tmp_path) -> None:
    figures = {"auc": {"value": 0.9}, "accuracy": 0.8, "sensitivity": {"n": 9}, "specificity": {"n": 7}}
    folder = make_judge(tmp_path / "judge", base, **figures)
    said, other = (LocalClassifier(folder, threshold=at).describe() for at in (None, 0.4))
    assert figures.items() <= said.items()
    assert other["auc"] == figures["auc"] and not {"accuracy", "sensitivity", "specificity"} & other.keys()


def test_a_judge_says_what_its_verdicts_depend_on(local, base) -> None:
    about = LocalClassifier(local, threshold=0.4).describe()
    assert len(about.pop("weights_sha256")) == len(about.pop("base_sha256")) == 64
    assert about == {
        "judge": "local",
        "version": 2,
        "threshold": 0.4,
        "input": "answer",
        "seed": 0,
        "base": str(base),
        "base_commit": None,
        "layers": [3, 4],
        "poolings": ["mean", "end", "question"],
        "max_tokens": 256,
    }


@pytest.mark.parametrize("damage", ["settings", "weights", "shape", "input", "layers"])
def test_a_damaged_or_missing_judge_is_one_line(damage, local, tmp_path) -> None:
    folder = shutil.copytree(local, tmp_path / "judge")
    settings = json.loads((folder / "judge.json").read_text())
    if damage == "settings":
        (folder / "judge.json").write_text("[")
    elif damage == "weights":
        (folder / "weights.safetensors").write_bytes(b"12")
    elif damage == "shape":
        (folder / "judge.json").write_text(json.dumps(settings | {"poolings": ["mean"]}))
    elif damage == "layers":
        (folder / "judge.json").write_text(json.dumps(settings | {"layers": [3, 99]}))
    else:
        (folder / "judge.json").write_text(json.dumps(settings | {"input": "both"}))
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*judge: it is damaged[^\n]*$"):
        LocalClassifier(folder)([case(KIND)])
    (folder / "judge.json").unlink()
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*no judge\.json in it: wpn-ds judge train makes one$"):
        LocalClassifier(folder)


@pytest.mark.parametrize("version", [1, 99])
def test_a_judge_of_another_format_has_to_be_trained_anew(version, local, tmp_path) -> None:
    folder = shutil.copytree(local, tmp_path / "judge")
    settings = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps(settings | {"format": version}))
    with pytest.raises(
        UserError, match=rf"^--judge local:[^\n]*format {version}, not 2: train it anew[^\n]*--base MODEL$"
    ):
        LocalClassifier(folder)


def test_a_base_model_that_has_moved_is_named_and_another_is_refused(base, tmp_path) -> None:
    place = shutil.copytree(base, tmp_path / "first")
    folder = make_judge(tmp_path / "judge", place)
    before = LocalClassifier(folder)([case(RUDE)])
    moved = place.rename(tmp_path / "second")
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*first: there is no such folder[^\n]*,base=MODEL$"):
        LocalClassifier(folder)
    (judge,) = make_judges([f"local:{folder},base={moved}"])
    assert judge([case(RUDE)]) == before
    other = causal(tmp_path / "other", seed=1)
    (judge,) = make_judges([f"local:{folder},base={other}"])
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*other isn't the one that it was trained on[^\n]*$"):
        judge([case(RUDE)])


def test_a_failed_save_leaves_nothing_behind(base, tmp_path, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        make_judge(tmp_path / "judge", base)
    assert list(tmp_path.iterdir()) == []
