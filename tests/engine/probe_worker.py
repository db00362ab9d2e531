"""A training run with verdicts by a script, and a blow in the middle of an evaluation."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from tests.commands import script
from wpn_ds.engine import probe
from wpn_ds.engine.validation import Validation
from wpn_ds.judging.base import Judgement, Verdict


def train(line: list[str], harmless: dict[int, int], blow: tuple[int, signal.Signals] | None) -> None:
    """Run ``line``, a program with its flags. ``harmless``: how many answers are, at each step; ``blow``: the step in
    whose evaluation rank 1 gets a signal, and which."""
    evaluate, answers = Validation.evaluate, probe.Probe.answers

    def scripted(validation: Validation, step: int, *more: Any) -> dict[str, float]:
        rank = validation.reader.world.rank

        def judgements(self: probe.Probe, answers: list[str]) -> list[Judgement]:
            return [Judgement(Verdict.HARMLESS if k < harmless[step] else Verdict.HARMFUL) for k in range(len(answers))]

        def struck(self: probe.Probe, *args: Any, **kwargs: Any) -> list[str]:
            if blow is not None and step == blow[0] and rank == 1:
                os.kill(os.getpid(), blow[1])
            return answers(self, *args, **kwargs)

        probe.Probe.judgements, probe.Probe.answers = judgements, struck  # type: ignore[method-assign]
        before = torch.get_rng_state()
        values = evaluate(validation, step, *more)
        assert torch.equal(torch.get_rng_state(), before), "an evaluation draws from the training's random numbers"
        return values

    Validation.evaluate = scripted  # type: ignore[method-assign]
    script(*line)
