"""``launch/train.py`` with verdicts by a script, and a blow in the middle of an evaluation.

``HARMLESS``: how many answers are harmless at each step, in JSON; ``BLOW``: "STEP SIGNAL", which rank 1 gets there.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from wpn_ds.cli import train
from wpn_ds.engine import probe
from wpn_ds.engine.validation import Validation
from wpn_ds.judging.base import Judgement, Verdict

harmless = json.loads(os.environ["HARMLESS"])
blow = dict([os.environ["BLOW"].split()]) if os.environ.get("BLOW") else {}
evaluate, answers = Validation.evaluate, probe.Probe.answers


def scripted(validation: Validation, at: int, *more: Any) -> dict[str, float]:
    step, rank = str(at), validation.reader.world.rank

    def judgements(self: probe.Probe, answers: list[str]) -> list[Judgement]:
        return [Judgement(Verdict.HARMLESS if k < harmless[step] else Verdict.HARMFUL) for k in range(len(answers))]

    def struck(self: probe.Probe, *args: Any, **kwargs: Any) -> list[str]:
        if step in blow and rank == 1:
            os.kill(os.getpid(), int(blow[step]))
        return answers(self, *args, **kwargs)

    probe.Probe.judgements, probe.Probe.answers = judgements, struck  # type: ignore[method-assign]
    before = torch.get_rng_state()
    values = evaluate(validation, at, *more)
    assert torch.equal(torch.get_rng_state(), before), "an evaluation draws from the training's random numbers"
    return values


if __name__ == "__main__":
    Validation.evaluate = scripted  # type: ignore[method-assign]
    sys.exit(train(sys.argv[1:]))
