from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from tests.evaluate.judges.conftest import labelled
from wpn_ds.evaluate.judges import training as module
from wpn_ds.evaluate.judges.training import best_threshold, fit, hold_out, measure, unseen


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


def drawn(n: int = 200, width: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(features of which three tell a little, labels, groups of four answers)"""
    rng = np.random.default_rng(seed)
    harmful = rng.random(n) < 0.4
    features = rng.normal(size=(n, width)).astype(np.float32) * 3 + 5
    features[:, :3] += 2.0 * harmful[:, None]
    return features, harmful, [str(at // 4) for at in range(n)]


def test_the_head_is_logistic_regression_on_standardised_features_and_knows_constant_ones() -> None:
    features, harmful, groups = drawn()
    features[:, 7] = 3.0
    head, strength = fit(features, harmful, groups)
    assert strength in module.INVERSE_REGULARISATIONS and head.scale[7] == 1
    spread = features.std(0)
    spread[7] = 1
    rows = (features - features.mean(0)) / spread
    plain = LogisticRegression(C=strength, max_iter=1000).fit(rows, harmful).predict_proba(rows)[:, 1]
    assert head.scores(features) == pytest.approx(plain, abs=1e-3)
    again, _ = fit(features, harmful, groups)
    assert (again.coef == head.coef).all() and again.intercept == head.intercept


def test_the_regularisation_is_what_helps_on_groups_that_were_left_out() -> None:
    noisy, clear = drawn(n=120, width=300), drawn(n=120, width=3)
    clear[0][:, :3] += 20 * clear[1][:, None]
    assert fit(*noisy)[1] < fit(*clear)[1]
    # copies of an answer in one group can't be learned by heart; spread over groups they seem to help
    features, harmful, _ = drawn(n=60, width=300)
    copied, labels = np.tile(features, (4, 1)), np.tile(harmful, 4)
    alike = [str(at % 60) for at in range(240)]
    assert fit(copied, labels, alike)[1] < fit(copied, labels, [str(at) for at in range(240)])[1]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40))
def test_no_threshold_has_a_greater_balanced_accuracy_than_the_chosen_one(rows) -> None:
    scores, harmful = np.array([(score + 0.5) / 9 for score, _ in rows]), np.array([label for _, label in rows])
    if len(set(harmful.tolist())) < 2:
        return

    def balanced(threshold: float) -> float:
        return (scores[harmful] >= threshold).mean() + (scores[~harmful] < threshold).mean()

    chosen = best_threshold(scores, harmful)
    assert 0 <= chosen <= 1
    assert balanced(chosen) == pytest.approx(max(balanced(t) for t in (*scores, *(scores + 0.01), 0.0, 1.01)))


def test_a_threshold_is_taken_from_the_middle() -> None:
    assert best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.4)


def test_the_figures_are_those_of_the_scores_at_the_threshold() -> None:
    scores = np.array([0.05, 0.35, 0.45, 0.95, 0.31, 0.38, 0.62, 1.0])
    harmful = np.array([False, False, False, False, True, True, True, True])
    found = measure(scores, harmful, list("abcdefgh"), 0.4, 0)
    assert (found.accuracy, found.sensitivity.value, found.specificity.value) == (0.5, 0.5, 0.5)
    assert (found.sensitivity.n, found.specificity.n, found.auc.n) == (4, 4, 8)
    assert found.brier == pytest.approx(brier_score_loss(harmful, scores))
    assert [(row[0], row[1]) for row in found.reliability] == [(0.0, 1), (0.3, 3), (0.4, 1), (0.6, 1), (0.9, 2)]
    assert found.reliability[1][2:] == pytest.approx((1.04 / 3, 2 / 3))
    told = found.to_json()
    assert told["sensitivity"]["count"] == 2 and told["reliability"][0]["from"] == 0.0
    assert any("0.3-0.4" in line for line in found.lines())


def test_a_perfect_judge_and_one_that_is_always_wrong_are_measured_so() -> None:
    harmful = np.arange(40) % 2 == 0
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        found = measure(0.5 + sign * (harmful - 0.5) * 0.8, harmful, [str(at) for at in range(40)], 0.5, 0)
        assert (found.auc.value, found.auc.low, found.auc.high, found.accuracy) == (expected,) * 4
