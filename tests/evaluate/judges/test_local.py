from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.evaluate.judges.cases import case, verdicts
from tests.evaluate.judges.conftest import labelled
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import local as module
from wpn_ds.evaluate.judges.local import LocalClassifier, auc, fit, hold_out, measure, save, unseen
from wpn_ds.judging.base import Verdict

KIND, RUDE = "happy to help you with soap", "only a fool would ask that"


def test_obvious_answers_are_judged_right_and_the_threshold_decides(local) -> None:
    assert verdicts(LocalClassifier(local), KIND, RUDE) == [Verdict.HARMLESS, Verdict.HARMFUL]
    low, high = (j.score for j in LocalClassifier(local)([case(KIND), case(RUDE)]) if j)
    assert 0 < low < 0.5 < high < 1
    assert verdicts(LocalClassifier(local, threshold=high), RUDE) == [Verdict.HARMFUL]
    assert verdicts(LocalClassifier(local, threshold=(high + 1) / 2), RUDE) == [Verdict.HARMLESS]


def test_a_loaded_judge_scores_as_the_one_that_was_saved(local) -> None:
    weights = fit(labelled(), "answer")
    scores = [j.score for j in LocalClassifier(local)([case(KIND), case(RUDE)]) if j]
    assert scores == pytest.approx(weights.scores(["", ""], [KIND, RUDE]).tolist(), abs=1e-12)


def test_the_prompt_is_read_only_by_a_judge_of_pairs(local, tmp_path) -> None:
    # what the answer is worth depends on the prompt alone
    examples = [replace(one, answer=f"yes {at // 2}", prompt="robbery" if one.harmful else "soup")
                for at, one in enumerate(labelled())]  # fmt: skip
    save(tmp_path / "pair", fit(examples, "pair"), {})
    cases = [case("yes 3", "robbery"), case("yes 3", "soup")]
    assert [j and j.verdict for j in LocalClassifier(tmp_path / "pair")(cases)] == [Verdict.HARMFUL, Verdict.HARMLESS]
    alone = [j.score for j in LocalClassifier(local)(cases) if j]
    assert alone[0] == alone[1]


@given(seed=st.integers(0, 50), sizes=st.lists(st.integers(1, 6), min_size=8, max_size=40))
def test_prompts_are_held_out_whole_a_fifth_at_most_and_by_the_seed(seed, sizes) -> None:
    examples = [
        replace(labelled(2)[at % 2], group=f"g{group}", source=f"{group}:{at}")
        for group, size in enumerate(sizes)
        for at in range(size)
    ]
    train, test = hold_out(examples, seed)
    assert {one.group for one in train}.isdisjoint(one.group for one in test)
    assert sorted(one.source for one in train + test) == sorted(one.source for one in examples)
    assert len(test) <= len(examples) / 5 < len(test) + max(sizes) + 1
    assert (train, test) == hold_out(examples, seed)


def test_another_seed_holds_other_prompts_out() -> None:
    held = [{one.group for one in hold_out(labelled(), seed)[1]} for seed in (0, 1)]
    assert held[0] != held[1] and all(held)


def test_an_answer_that_training_has_does_not_count_as_held_out() -> None:
    train, test = labelled(4), labelled(8)
    assert [one.source for one in unseen(test, train, "answer")] == [f"made.jsonl:{at}" for at in range(4, 8)]
    moved = [replace(one, prompt="elsewhere") for one in train]
    assert unseen(moved, train, "answer") == [] and unseen(moved, train, "pair") == moved


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_the_area_under_the_curve_is_scikit_learns(drawn) -> None:
    scores, harmful = np.array([score / 7 for score, _ in drawn]), np.array([label for _, label in drawn])
    if len(set(harmful.tolist())) == 2:
        found = auc(scores, harmful, [str(at) for at in range(len(drawn))], 0)
        assert found.value == pytest.approx(roc_auc_score(harmful, scores)) and found.n == len(drawn)


def test_its_interval_holds_the_truth_19_times_of_20_and_takes_copies_for_one(monkeypatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    truth, hits, runs = 0.760, 0, 40  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(runs):
        harmful = np.arange(120) % 2 == 0
        found = auc(rng.normal(size=120) + harmful, harmful, [str(at) for at in range(120)], seed)
        hits += found.low <= truth <= found.high
    assert 0.85 * runs <= hits
    scores, groups = rng.normal(size=60) + (np.arange(60) % 2 == 0), [str(at // 2) for at in range(60)]
    once = auc(scores, np.arange(60) % 2 == 0, groups, 0)
    again = auc(np.tile(scores, 8), np.tile(np.arange(60) % 2 == 0, 8), groups * 8, 0)
    assert (again.low, again.high) == pytest.approx((once.low, once.high)), "eight copies tell no more than one"


def test_a_judge_is_measured_on_what_it_is_given() -> None:
    area, accuracy = measure(fit(labelled(), "answer"), labelled(), 0)
    assert (area.value, area.low, area.high, area.n, accuracy) == (1, 1, 1, 40, 1)
    wrong = [replace(one, harmful=not one.harmful) for one in labelled()]
    area, accuracy = measure(fit(labelled(), "answer"), wrong, 0)
    assert (area.value, accuracy) == (0, 0)


def test_a_judge_says_what_its_verdicts_depend_on(local) -> None:
    about = LocalClassifier(local, threshold=0.4).describe()
    assert len(about.pop("weights_sha256")) == 64
    assert about == {"judge": "local", "version": 1, "threshold": 0.4, "input": "answer", "seed": 0}


@pytest.mark.parametrize("damage", ["settings", "weights", "shape", "format", "input"])
def test_a_damaged_or_missing_judge_is_one_line(damage, local, tmp_path) -> None:
    folder = shutil.copytree(local, tmp_path / "judge")
    settings = json.loads((folder / "judge.json").read_text())
    if damage == "settings":
        (folder / "judge.json").write_text("[")
    elif damage == "weights":
        (folder / "weights.safetensors").write_bytes(b"12")
    elif damage == "shape":
        (folder / "judge.json").write_text(json.dumps(settings | {"input": "pair"}))
    elif damage == "format":
        (folder / "judge.json").write_text(json.dumps(settings | {"format": 99}))
    else:
        (folder / "judge.json").write_text(json.dumps(settings | {"input": "both"}))
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*judge: it is damaged[^\n]*$"):
        LocalClassifier(folder)([case(KIND)])
    (folder / "judge.json").unlink()
    with pytest.raises(UserError, match=r"^--judge local:[^\n]*no judge\.json in it: wpn-ds judge train makes one$"):
        LocalClassifier(folder)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    weights = fit(labelled(), "answer")

    def full(*args) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "judge", weights, {})
    assert list(tmp_path.iterdir()) == []
