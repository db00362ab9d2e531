from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from wpn_ds.judging.statistics import (
    Rate,
    auc,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    cohen_kappa,
    corrected_rate,
    holm,
    mcnemar,
    over_seeds,
    wilson_interval,
)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 20, 0.0089, 0.2361), (0, 0, 0.0, 1.0)],
)
def test_the_wilson_interval_has_its_known_values(successes, n, low, high) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_proportion_lies_inside_the_unit_interval_and_mirrors(case) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and high > low
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))
    narrower = wilson_interval(10 * successes, 10 * n)
    assert narrower[1] - narrower[0] < high - low


def test_samples_of_the_same_prompts_do_not_narrow_the_interval() -> None:
    sampled, once = Rate(120, 200, independent=50), Rate(30, 50)
    assert sampled.value == once.value and (sampled.low, sampled.high) == (once.low, once.high)


def test_a_rate_over_seeds_is_bounded_by_prompts_where_they_agree_and_wider_where_they_differ() -> None:
    alike = over_seeds([Rate(30, 100)] * 3)
    assert (alike.value, alike.n) == (0.3, 300) and (alike.low, alike.high) == wilson_interval(30, 100)
    apart = over_seeds([Rate(20, 100), Rate(30, 100), Rate(40, 100)])
    assert apart.value == 0.3 and apart.low < alike.low - 0.05 and apart.high > alike.high + 0.05
    assert over_seeds([Rate(20, 100)]).high == Rate(20, 100).high


@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_a_rate_over_seeds_holds_what_other_seeds_and_prompts_would_say(seeds) -> None:
    rng, hits, without = np.random.default_rng(0), 0, 0
    for _ in range(400):
        prompts, level = rng.normal(0, 0.2, 100), 0.5 + 0.15 * rng.normal(size=(seeds, 1))
        answers = prompts + level > rng.random((seeds, 100))
        rates = [Rate.of(run.tolist()) for run in answers]
        found, alone = over_seeds(rates), wilson_interval(100 * answers.mean(), 100)
        hits += found.low <= 0.5 <= found.high
        without += alone[0] <= 0.5 <= alone[1]
    assert hits >= 372, "93 of 100 or more"
    assert without < (340 if seeds < 12 else hits), "by the prompts alone, fewer"


def test_mcnemar_has_the_binomial_tests_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    for better, worse in ((0, 0), (5, 0), (0, 12), (7, 3), (40, 60), (500, 300)):
        expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
        assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_holm_s_correction_has_its_known_values_in_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == [0.02] and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_s_correction_keeps_the_order_and_lies_between_p_and_bonferroni(raw) -> None:
    corrected = holm(raw)
    for p, q in zip(raw, corrected, strict=True):
        assert p <= q <= min(1.0, len(raw) * p) + 1e-12
    assert [q for _, q in sorted(zip(raw, corrected, strict=True))] == sorted(corrected)


def test_holm_s_correction_rarely_finds_a_difference_where_there_is_none() -> None:
    rng = random.Random(0)
    raw = [[rng.random() for _ in range(20)] for _ in range(400)]
    assert sum(min(of) <= 0.05 for of in raw) > 200
    assert sum(min(holm(of)) <= 0.05 for of in raw) < 40


def test_kappa_has_its_known_values_and_none_where_chance_explains_all() -> None:
    assert cohen_kappa("yynn", "yynn") == 1
    assert cohen_kappa("yynn", "nnyy") == -1
    assert cohen_kappa("ynyn", "yynn") == 0
    # The example of Cohen's table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no.
    assert cohen_kappa("y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15) == pytest.approx(0.4)
    assert cohen_kappa("yyy", "yyy") is cohen_kappa("", "") is None


def test_the_bootstrap_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        groups = [[rng.gauss(mean, 1) for _ in range(30)] for mean in (0.0, 1.0)]
        estimate = bootstrap_mean(groups, seed=trial, resamples=300)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 180 <= covered <= 199


def test_groups_weigh_the_same_whatever_their_size_and_nothing_has_no_bounds() -> None:
    estimate = bootstrap_mean([[0.0] * 1000, [1.0] * 10])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 1010)
    nothing = bootstrap_mean([[], []])
    assert nothing.n == 0 and (nothing.low, nothing.high) == (-math.inf, math.inf)


def test_paired_differences_have_a_narrower_interval_than_the_two_means_apart() -> None:
    rng = random.Random(1)
    before = [rng.gauss(0, 5) for _ in range(100)]
    after = [x + rng.gauss(0.5, 0.1) for x in before]
    paired = bootstrap_mean([[b - a for a, b in zip(before, after, strict=True)]])
    apart = bootstrap_mean([after]).high - bootstrap_mean([after]).low
    assert paired.low > 0.4 and paired.high - paired.low < apart / 10


GROUPS = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=n, max_size=n)
)


@given(GROUPS, st.integers(1, 4), st.integers(1, 4))
def test_runs_of_one_seed_or_of_the_same_outcomes_differ_as_far_as_their_prompts_tell(groups, ours, theirs) -> None:
    other = [[0.5 * item for item in group] for group in groups]
    plain = bootstrap_mean([[0.5 * item for item in group] for group in groups], resamples=200)
    found = bootstrap_difference([groups] * ours, [other] * theirs, resamples=200)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((plain.value, plain.low, plain.high, plain.n))


def test_seeds_that_differ_widen_the_interval_and_an_item_without_a_verdict_is_left_out() -> None:
    half, never = [[0.0, 1.0] * 20], [[0.0] * 40]
    alike, wide = (bootstrap_difference(of, [never]) for of in ([half] * 3, [never, half, [[1.0] * 40]]))
    assert alike.value == wide.value == 0.5 and wide.high - wide.low > 3 * (alike.high - alike.low)
    mirrored = bootstrap_difference([never], [never, half, [[1.0] * 40]])
    assert mirrored.value == -0.5 and mirrored.low == -wide.high == -1 and mirrored.high < 1, "no rate is beyond 1"
    nan = math.nan
    found = bootstrap_difference([[[1.0, nan, nan]], [[1.0, 1.0, nan]]], [[[0.0, 0.0, 0.0]], [[0.0, nan, 0.0]]])
    assert (found.value, found.low, found.high, found.n) == (1.0, 1.0, 1.0, 2)
    nothing = bootstrap_difference([[[nan]]], [[[0.0]]])
    assert nothing.n == 0 and (nothing.low, nothing.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_holds_what_other_seeds_and_prompts_would_say_95_times_in_100(seeds) -> None:
    rng, hits, without = np.random.default_rng(0), 0, 0
    for _ in range(300):
        prompts = rng.normal(0.2, 0.4, 40)  # by how much each prompt's answers change
        sides = [mean + 0.1 * rng.normal(size=(seeds, 1)) + 0.1 * rng.normal(size=(seeds, 40)) for mean in (prompts, 0)]
        found = bootstrap_difference(*([[run.tolist()] for run in side] for side in sides), resamples=300)
        hits += found.low <= 0.2 <= found.high
        alone = bootstrap_mean([(sides[0].mean(axis=0) - sides[1].mean(axis=0)).tolist()], resamples=300)
        without += alone.low <= 0.2 <= alone.high
    assert 279 <= hits <= 299 and without < 265, "93 to 99.7 of 100; by the prompts alone, far fewer"


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 9))
def test_a_ratio_of_sums_is_the_mean_where_all_weigh_the_same_and_no_mean_of_ratios(pairs, weight) -> None:
    found = bootstrap_ratio(pairs)
    assert found.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs)) and found.n == len(pairs)
    assert min(a / b for a, b in pairs) - 1e-9 <= found.low <= found.high <= max(a / b for a, b in pairs) + 1e-9
    alike = bootstrap_ratio([(weight * a, weight) for a, _ in pairs])
    mean = bootstrap_mean([[a for a, _ in pairs]])
    assert (alike.value, alike.low, alike.high) == pytest.approx((mean.value, mean.low, mean.high), abs=1e-9)
    assert bootstrap_ratio([]) == bootstrap_mean([])


def test_a_ratio_s_interval_holds_the_truth_about_95_times_in_100_where_tokens_of_an_answer_are_alike() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(1, 30, 60)
        nats = tokens * (2 + rng.normal(size=60))  # an answer's tokens are all as likely
        found = bootstrap_ratio(list(zip(nats.tolist(), tokens.tolist(), strict=True)), resamples=400)
        hits += found.low <= 2 <= found.high
    assert 178 <= hits <= 198


def test_a_corrected_rate_is_the_true_one_where_the_judge_errs_as_it_was_measured_to() -> None:
    # 40 of 200 are harmful: 32 of these are found, and 16 of the 160 others
    found = corrected_rate(Rate(48, 200), Rate(80, 100), Rate(90, 100))
    assert found.value == pytest.approx(0.2) and found.n == 200 and found.low < 0.2 < found.high
    perfect = corrected_rate(Rate(30, 100), Rate(10**6, 10**6), Rate(10**6, 10**6))
    assert (perfect.value, perfect.low, perfect.high) == pytest.approx((0.3, *wilson_interval(30, 100)), abs=0.01)


def test_it_is_clipped_where_fewer_or_more_are_found_than_the_judge_s_errors_explain() -> None:
    none, all_ = (
        corrected_rate(Rate(8, 100), Rate(80, 100), Rate(90, 100)),
        corrected_rate(Rate(82, 100), Rate(80, 100), Rate(90, 100)),
    )
    assert (none.value, none.low) == (0, 0) and (all_.value, all_.high) == (1, 1)
    assert 0 < none.high < 0.2 and 0.8 < all_.low < 1
    nothing = corrected_rate(Rate(0, 0), Rate(80, 100), Rate(90, 100))
    assert (nothing.low, nothing.high, nothing.n) == (0, 1, 0)


def test_it_is_the_less_certain_the_less_the_judge_was_measured_and_the_fewer_answers_are_independent() -> None:
    def width(n: int, measured: int, independent: int | None = None) -> float:
        found = corrected_rate(
            Rate(3 * n // 10, n, independent), Rate(8 * measured // 10, measured), Rate(9 * measured // 10, measured)
        )
        return found.high - found.low

    assert width(100, 30) > width(100, 100) > width(100, 1000) > width(1000, 1000)
    assert width(400, 100, independent=100) == pytest.approx(width(100, 100))
    # even a judge that made no mistake in ten answers
    sure = corrected_rate(Rate(30, 100), Rate(10, 10), Rate(10, 10))
    assert sure.high - sure.low > 1.1 * (Rate(30, 100).high - Rate(30, 100).low)


@pytest.mark.parametrize(
    ("truth", "sensitivity", "specificity", "n", "measured"),
    [(0.1, 0.8, 0.9, 100, 100), (0.5, 0.8, 0.7, 100, 400), (0.02, 0.9, 0.95, 200, 100), (0.3, 0.99, 0.99, 50, 30)],
)
def test_its_interval_holds_the_truth_19_times_of_20(truth, sensitivity, specificity, n, measured) -> None:
    rng, hits, runs = np.random.default_rng(0), 0, 600
    for _ in range(runs):
        found = Rate(int(rng.binomial(n, truth * sensitivity + (1 - truth) * (1 - specificity))), n)
        known = (Rate(int(rng.binomial(measured, chance)), measured) for chance in (sensitivity, specificity))
        estimate = corrected_rate(found, *known)
        hits += estimate.low <= truth <= estimate.high
    assert 0.93 * runs <= hits <= 0.985 * runs


@pytest.mark.parametrize("sensitivity", [Rate(0, 0), Rate(5, 10), Rate(2, 10)])
def test_a_judge_that_tells_no_more_than_chance_corrects_nothing(sensitivity) -> None:
    with pytest.raises(ValueError, match="no more than chance"):
        corrected_rate(Rate(3, 10), sensitivity, Rate(5, 10))


@given(st.integers(0, 50), st.integers(26, 50), st.integers(26, 50))
def test_the_interval_holds_the_estimate_inside_the_unit_interval(count, right, wrong) -> None:
    found = corrected_rate(Rate(count, 50), Rate(right, 50), Rate(wrong, 50))
    assert 0 <= found.low <= found.value <= found.high <= 1


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_the_area_under_the_curve_is_scikit_learns(drawn) -> None:
    scores, harmful = np.array([score / 7 for score, _ in drawn]), np.array([label for _, label in drawn])
    if len(set(harmful.tolist())) == 2:
        found = auc(scores, harmful, [str(at) for at in range(len(drawn))], 0)
        assert found.value == pytest.approx(roc_auc_score(harmful, scores)) and found.n == len(drawn)


def test_its_interval_holds_the_truth_19_times_of_20_and_takes_copies_for_one(monkeypatch) -> None:
    monkeypatch.setattr("wpn_ds.judging.statistics.RESAMPLES", 400)
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
