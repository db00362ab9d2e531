"""Our way: the training path itself, configured by nothing but its flags."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.protocol import serve
from wpn_ds.config import parse_args
from wpn_ds.engine.loop import Trainer
from wpn_ds.engine.setup import prepare
from wpn_ds.engine.stop import Points


def main() -> None:
    job = prepare(parse_args(sys.argv[1:]))
    trainer = Trainer(job, Points(job.world, hang_timeout=0), job.start)

    def step(number: int) -> dict[str, Any]:
        plan = trainer.plan(number)
        sums = trainer.step(plan, trainer.targets(plan)).sums
        losses = {
            name: (sums.totals[name] / max(1, sums.counts[name])).item()
            for name in trainer.job.objective.weights
            if name in sums.totals
        }
        examples = trainer.job.config.training.global_batch_size
        return {"examples": examples, "tokens": plan.tokens, "losses": losses}

    serve(step)


if __name__ == "__main__":
    main()
