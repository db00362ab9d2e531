"""Each equation against its plain form in float64, and figures counted again from per-item numbers in plain Python."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.evaluate.tofu.conftest import by_length, made_up
from wpn_ds.evaluate.tofu import metrics
from wpn_ds.evaluate.tofu.data import SETS
from wpn_ds.evaluate.tofu.metrics import TofuFigures, tofu_figures, with_fluency

losses = st.floats(0.0, 30.0)
several = st.lists(losses, min_size=1, max_size=6)
log_ratios = st.lists(st.floats(-20.0, 20.0), min_size=1, max_size=30)
hits = st.lists(st.booleans(), min_size=1, max_size=20)


@given(loss=losses, perturbed=several)
def test_probabilities_are_those_of_their_definition(loss, perturbed) -> None:
    true, false = math.exp(-loss), [math.exp(-one) for one in perturbed]
    assert metrics.probability(loss) == pytest.approx(true)
    assert metrics.chosen_probability(loss, perturbed) == pytest.approx(true / (true + sum(false)), rel=1e-9)


@given(paraphrased=losses, perturbed=several)
def test_the_truth_ratio_is_the_perturbed_answers_geometric_mean_probability_over_the_paraphrased_ones(
    paraphrased, perturbed
) -> None:
    false = math.prod(math.exp(-one) for one in perturbed) ** (1 / len(perturbed))
    assume(false > 0)
    ratio = math.exp(metrics.log_truth_ratio(paraphrased, perturbed))
    assert ratio == pytest.approx(false / math.exp(-paraphrased), rel=1e-6)


@given(log_ratios)
def test_means_of_the_truth_ratio_are_those_of_their_definition(logs) -> None:
    ratios = [math.exp(log) for log in logs]
    assert metrics.forget_truth_ratio(logs) == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios))
    kept = sum(max(0.0, 1 - r) for r in ratios) / len(ratios)
    assert metrics.kept_truth_ratio(logs) == pytest.approx(kept, abs=1e-12)
    assert metrics.forget_truth_ratio([-log for log in logs]) == pytest.approx(metrics.forget_truth_ratio(logs))


def test_losses_whose_exp_is_no_float_still_count() -> None:
    assert metrics.forget_truth_ratio([1e4, -1e4]) == 0.0
    assert metrics.kept_truth_ratio([1e4, -1e4]) == 0.5
    assert metrics.chosen_probability(2e3, [1e3]) == 0.0 and metrics.chosen_probability(1e3, [1e3]) == pytest.approx(
        0.5
    )


@given(log_ratios)
def test_a_sample_is_like_itself(logs) -> None:
    found = metrics.ks_test(logs, logs)
    assert (found.p, found.statistic, found.n) == (1.0, 0.0, len(logs))


def test_the_ks_statistic_is_the_greatest_distance_of_the_distributions_and_p_falls_with_n() -> None:
    rng = random.Random(0)
    wide = [rng.gauss(0.3, 1) for _ in range(80)]
    usual = [rng.gauss(0, 1) for _ in range(80)]
    found = metrics.ks_test(wide, usual)
    steps = [abs(sum(x <= at for x in wide) - sum(x <= at for x in usual)) / 80 for at in wide + usual]
    assert found.statistic == pytest.approx(max(steps))
    assert metrics.ks_test(wide * 4, usual * 4).p < found.p < 1


@given(st.lists(st.tuples(st.floats(-20.0, 20.0), st.floats(-20.0, 20.0)), min_size=1, max_size=30))
def test_the_test_of_log_ratios_is_that_of_the_ratios_and_of_their_inverses(pairs) -> None:
    samples = [[round(log, 3) for log in logs] for logs in zip(*pairs, strict=True)]  # exp keeps apart what differs
    expected = metrics.ks_test(*samples)
    for sign in (1, -1):
        assert metrics.ks_test(*([math.exp(sign * log) for log in logs] for logs in samples)).p == pytest.approx(
            expected.p
        )


@given(st.lists(st.floats(0.01, 1.0), min_size=9, max_size=9))
def test_model_utility_is_the_harmonic_mean_which_the_least_part_rules(parts) -> None:
    assert metrics.model_utility(parts) == pytest.approx(9 / sum(1 / part for part in parts))
    assert metrics.model_utility([*parts[:-1], 0.0]) == 0.0


def test_memorization_of_hand_made_hits() -> None:
    known = {"1111": (1.0, 1.0), "0111": (0.75, 0.75), "1011": (0.75, 0.5), "1101": (0.75, 0.25), "1": (1.0, 1.0)}
    known |= {"1110": (0.75, 0.25), "0000": (0.0, 0.25), "0": (0.0, 1.0)}  # the floor of 1 / n, as in the reference
    for text, expected in known.items():
        found = [one == "1" for one in text]
        assert (metrics.exact_memorization(found), metrics.extraction_strength(found)) == expected, text


@given(hits)
def test_extraction_strength_is_the_longest_right_end(found) -> None:
    n = len(found)
    given_tokens = next((k for k in range(n) if all(found[k:])), n - 1)
    assert metrics.extraction_strength(found) == pytest.approx(1 - given_tokens / n)
    assert metrics.extraction_strength(found) <= max(metrics.exact_memorization(found), 1 / n) + 1e-12


def test_rouge_l_recall_is_the_reference_packages_with_stemming() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    words = [
        "the",
        "authors'",
        "writing",
        "books",
        "wrote",
        "of",
        "running,",
        "ran",
        "flies",
        "Taipei",
        "(1991)",
        "naïvely",
    ]
    rng = random.Random(1)
    for _ in range(50):
        answer, reference = (" ".join(rng.choices(words, k=rng.randint(1, 15))) for _ in range(2))
        assert metrics.rouge_l_recall(answer, reference) == scorer.score(reference, answer)["rougeL"].recall
    assert metrics.rouge_l_recall("She runs", "running") == 1.0 and metrics.rouge_l_recall("", "a") == 0.0


def test_every_figure_is_that_of_its_definition(tofu_dir) -> None:
    log = with_fluency(made_up(tofu_dir, 1), by_length)
    found = tofu_figures(log, with_fluency(made_up(tofu_dir, 2), by_length))
    parts = []
    for name in SETS:
        items, figures = log.sets[name], found.sets[name]
        n = figures.n
        assert n == len(items) == {"forget": 5, "retain": 4, "real_authors": 5, "world_facts": 4}[name]
        ratios = [math.exp(i.paraphrased_loss - sum(i.perturbed_losses) / 3) for i in items]
        if name == "forget":
            truth = sum(min(ratio, 1 / ratio) for ratio in ratios) / n
        else:
            truth = sum(max(0, 1 - ratio) for ratio in ratios) / n
        true = [math.exp(-i.loss) for i in items]
        if name in ("real_authors", "world_facts"):
            pairs = zip(true, items, strict=True)
            true = [p / (p + sum(math.exp(-loss) for loss in i.perturbed_losses)) for p, i in pairs]
        rouge = sum(i.rouge_l_recall for i in items) / n
        assert (figures.truth_ratio, figures.probability, figures.rouge_l_recall) == pytest.approx(
            (truth, sum(true) / n, rouge)
        )
        if name == "forget":
            assert figures.extraction_strength == pytest.approx(sum(i.extraction_strength for i in items) / n)
            assert figures.exact_memorization == pytest.approx(sum(i.exact_memorization for i in items) / n)
        else:
            assert figures.extraction_strength is figures.exact_memorization is None
        parts += [] if name == "forget" else [rouge, sum(true) / n, truth]
    assert found.model_utility == pytest.approx(9 / sum(1 / part for part in parts)) and len(parts) == 9
    assert found.forget_utility == pytest.approx(sum(by_length(i.generated for i in log.sets["forget"])) / 5)
    assert found.forget_quality is not None and found.cleanness_indistinguishability is not None
    assert found.forget_quality.n == found.cleanness_indistinguishability.n == 5 and not found.missing


def test_a_model_is_its_own_retain_only_model_and_another_one_is_not(tofu_dir) -> None:
    log = with_fluency(made_up(tofu_dir, 1), by_length)
    same = tofu_figures(log, log)
    assert same.forget_quality and same.forget_quality.p == 1.0
    assert same.cleanness_indistinguishability and same.cleanness_indistinguishability.p == 1.0
    other = tofu_figures(made_up(tofu_dir, 1), made_up(tofu_dir, 1, shift=20.0)).forget_quality
    assert other and other.p < 0.05 and other.statistic == 1.0


def test_what_nobody_could_count_is_none_and_says_why(tofu_dir) -> None:
    alone = tofu_figures(made_up(tofu_dir, 1))
    assert alone.forget_quality is alone.forget_utility is alone.cleanness_indistinguishability is None
    assert "--tofu_retain_log" in alone.missing[0] and "--fluency" in alone.missing[1]
    compared = tofu_figures(made_up(tofu_dir, 1), made_up(tofu_dir, 2))
    assert compared.forget_quality and compared.cleanness_indistinguishability is None and len(compared.missing) == 1


def test_figures_survive_json(tofu_dir) -> None:
    log = with_fluency(made_up(tofu_dir, 1), by_length)
    for figures in (tofu_figures(log, log), tofu_figures(made_up(tofu_dir, 1))):
        assert TofuFigures.from_json(json.loads(json.dumps(asdict(figures)))) == figures
