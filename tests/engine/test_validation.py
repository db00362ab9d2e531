"""Evaluations: their figures are those of texts read alone, and the best one is remembered, by a resumed run too."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.made import FORMS
from tests.engine.gradient_cases import make_examples
from tests.engine.small import alone, silent, small_reader
from wpn_ds.data.examples import ExampleSet
from wpn_ds.engine import validation as validation_module
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.engine.validation import Validation, validation_losses
from wpn_ds.jobs.distributed import World
from wpn_ds.judging.base import Judgement, Verdict
from wpn_ds.objectives.terms import Terms
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.run import LoggingConfig

EXAMPLES = make_examples()
STOPPING = LoggingConfig(early_stopping="harmless>=0.75", eval_steps=1, retain_bound=1.5)


class Log:
    """What is logged: {step: figures}, and the evaluations' lines."""

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.figures[step] = dict(values)

    def evaluation(self, step: int, line: str) -> None:
        self.lines.append(line)

    def text(self, step: int, name: str, text: str) -> None:
        raise AssertionError("no prompt is asked")


class Asked:
    """A probe of four prompts, of which ``harmless`` are answered without harm."""

    cases: tuple[()] = ()
    harmless = 0

    def answers(self, generation: Any) -> list[str]:
        return [""] * 4

    def judgements(self, answers: list[str]) -> list[Judgement]:
        return [Judgement(Verdict.HARMLESS if k < self.harmless else Verdict.HARMFUL) for k in range(len(answers))]


def validation_of(world: World, past: dict[str, Any] | None = None, logging: LoggingConfig = STOPPING) -> Validation:
    reader: Any = SimpleNamespace(world=world)
    probe: Any = Asked()
    generation: Any = None
    return Validation(reader, ExampleSet(), probe, generation, logging, past)


def evaluate(validation: Validation, step: int, harmless: int, perplexity: float, log: Log) -> None:
    probe: Any = validation.probe
    probe.harmless = harmless
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation_module, "validation_losses", lambda *_: {"eval/retain_perplexity": perplexity})
        validation.evaluate(step, log, None, None)  # type: ignore[arg-type]


EVALUATIONS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 2.0, 2.5, 3.0, 3.5, math.nan])), min_size=1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 4), found=EVALUATIONS, data=st.data())
def test_the_best_evaluation_within_the_bound_is_remembered_by_a_resumed_run_too(world, start, found, data) -> None:
    log, validation = Log(), validation_of(world)
    evaluate(validation, 0, start, 2.0, log)
    assert validation.best_step == 0 and not validation.reached, "the start is no candidate"
    resumed = data.draw(st.sets(st.integers(1, len(found))))
    for step, (harmless, perplexity) in enumerate(found, 1):
        validation.weights_changed(step)
        assert not validation.done and validation.measured is None
        if step in resumed:
            again = validation_of(world, json.loads(json.dumps(validation.state())))
            assert again.state() == validation.state()
            validation = again
        evaluate(validation, step, harmless, perplexity, log)
        allowed = [(h, -p, -s) for s, (h, p) in enumerate(found[:step], 1) if p <= 1.5 * 2.0]
        best = -max(allowed)[2] if allowed else 0
        assert validation.done and validation.state()["best_step"] == best == log.figures[step]["eval/best_step"]
        assert log.lines[-1].endswith("the best so far") == (best == step)
        assert validation.state()["best"].get("eval/harmless_rate") == (max(allowed)[0] / 4 if allowed else None)
        assert validation.reached == bool(allowed and max(allowed)[0] >= 3)
        assert validation.state()["start_perplexity"] == 2.0
        assert validation.measured is not None and validation.measured["eval/harmless_rate"] == harmless / 4


def test_without_early_stopping_no_evaluation_is_the_best(world) -> None:
    log, validation = Log(), validation_of(world, logging=LoggingConfig(eval_steps=1))
    for step in (0, 1):
        evaluate(validation, step, 4, 1.0, log)
    assert validation.state()["best_step"] == 0 and not validation.reached
    assert "eval/best_step" not in log.figures[1] and log.figures[1]["eval/harmless_rate"] == 1


@given(every=st.integers(0, 4), step=st.integers(1, 12))
def test_an_evaluation_is_due_every_so_many_steps_and_stays_so_until_it_is_made(every, step) -> None:
    main = World(0, 1, 0, torch.device("cpu"))
    validation = validation_of(main, logging=LoggingConfig(eval_steps=every))
    assert validation.done, "a run begins with its own"
    validation.weights_changed(step)
    assert validation.done == (not every or step % every != 0)
    assert validation_of(main, validation.state(), validation.logging).done == validation.done


# ---- figures ----


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_means_over_the_tokens_of_texts_read_alone(world, form) -> None:
    sides = {
        "eval/nll_wanted": [answer.segment for example in EXAMPLES.forget for answer in example.wanted],
        "eval/nll_unwanted": [answer.segment for example in EXAMPLES.forget for answer in example.unwanted],
        "eval/nll_retain": EXAMPLES.retain,
    }
    expected = {}
    for name, segments in sides.items():
        losses = [-alone(s)[1][t - 1, s.ids[t]].item() for s in segments for t in range(s.answer_start, len(s))]
        expected[name] = sum(losses) / len(losses)
    values = validation_losses(small_reader(world, form), EXAMPLES)
    perplexity = values.pop("eval/retain_perplexity")
    assert values == pytest.approx(expected, rel=1e-5)
    assert perplexity == pytest.approx(math.exp(expected["eval/nll_retain"]), rel=1e-4)


def test_what_there_are_no_examples_of_has_no_figure(world) -> None:
    reader = small_reader(world)
    assert validation_losses(reader, ExampleSet()) == {}
    only = validation_losses(reader, ExampleSet([], EXAMPLES.retain))
    assert only.keys() == {"eval/nll_retain", "eval/retain_perplexity"}
    assert validation_losses(reader, ExampleSet(EXAMPLES.forget)).keys() == {"eval/nll_wanted", "eval/nll_unwanted"}


@pytest.mark.parametrize(("targets", "told"), [("reference", True), ("live", False)])
def test_how_similar_answers_are_at_the_start_is_told_where_they_are_compared_to_frozen_ones(
    world, tmp_path, targets, told
) -> None:
    reader, log = small_reader(world), Log()
    terms = Terms.of(WPN(wpn_targets=targets, wpn_pooling="mean", retain_loss="nll"))
    start = Tabulator(reader, Tables(tmp_path, {}), silent).start(terms, EXAMPLES, lambda segments: None)  # type: ignore[arg-type, return-value]
    validation = validation_of(world)
    validation.reader = reader
    values = validation.similarities(start, log)  # type: ignore[arg-type]
    assert log.figures.get(0, {}) == values and bool(values) == told
    if told:
        cosines = []
        for example in EXAMPLES.forget:
            s = example.wanted[0].segment
            states = alone(s)[0]
            prompt, answer = states[s.prompt_start : s.answer_start].mean(0), states[s.answer_start :].mean(0)
            cosines.append(torch.cosine_similarity(prompt, answer, dim=0).item())
        assert values["start/cosine_wanted"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
