from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.judging.membership import auc, auc_estimate, min_k, privleak, privleak_estimate

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.sampled_from([0.05, 0.2, 0.4, 1.0]))
def test_min_k_is_the_mean_of_the_least_likely_tokens_whatever_their_order(log_probs, share) -> None:
    count = max(1, int(len(log_probs) * share))
    assert min_k(log_probs, share) == pytest.approx(sum(sorted(log_probs)[:count]) / count)
    assert min_k(log_probs[::-1], share) == min_k(log_probs, share) <= np.mean(log_probs) + 1e-9


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_that_are_told_apart_and_ties_are_half(members, others) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(others, members) == pytest.approx(1 - auc(members, others))
    assert auc([math.exp(a) for a in members], [math.exp(b) for b in others]) == auc(members, others)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_privleak_is_muse_s_of_areas_that_are_counted_the_other_way_round(area, retain) -> None:
    ours, theirs = 1 - area, 1 - retain
    assert privleak(area, retain) == pytest.approx((ours - theirs) / theirs * 100)
    assert privleak(area, area) == 0 and privleak(1.0, retain) == pytest.approx(-100)
    assert (privleak(area, retain) < 0) == (area > retain)
    assert math.isnan(privleak(area, 1.0))


def test_the_interval_holds_the_truth_about_95_times_in_100() -> None:
    rng, true, hits = np.random.default_rng(0), 0.7602, 0  # P(x > y) for normals that are 1 apart: Phi(1 / sqrt(2))
    for _ in range(100):
        found = auc_estimate(rng.normal(1, 1, 40).tolist(), rng.normal(0, 1, 40).tolist(), resamples=200)
        hits += found.low <= true <= found.high
    assert 88 <= hits <= 99 and found.n == 80


def test_a_model_that_still_knows_the_texts_leaks_and_the_retain_only_one_does_not() -> None:
    rng = np.random.default_rng(0)
    base = [rng.normal(0, 1, 60) for _ in range(2)]
    clean = tuple((scores + 0.1 * rng.normal(size=60)).tolist() for scores in base)
    knowing = ((base[0] + 3).tolist(), base[1].tolist())
    leaks, same = privleak_estimate(knowing, clean), privleak_estimate(clean, clean)
    assert -100 <= leaks.low <= leaks.value <= leaks.high < -80 and leaks.n == 120
    assert (same.value, same.low, same.high) == (0, 0, 0), "drawn together, equal models don't differ"
    hidden = privleak_estimate(((base[0] - 3).tolist(), base[1].tolist()), clean)
    assert hidden.low > 50, "texts that have become unlikely tell as much"
