"""One rank: SGD steps with a running mean of the weights, and what the model says with the mean in their place."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engine.gradient_cases import make_examples
from tests.engine.gradient_worker import ds_json
from wpn_ds.data.plan import Layout, plan_step
from wpn_ds.engine.build import build_policy, full_weights
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.redraw import Ema
from wpn_ds.engine.refinement import token_probabilities
from wpn_ds.engine.step import Step
from wpn_ds.jobs.distributed import init
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.objective import Objective

DECAY, STEPS = 0.6, 3


def run(folder: Path, stage: int, out: Path) -> None:
    """Rank 0 saves in ``out`` the weights as ``<step>.<name>``, and the probabilities of all answers: ``averaged`` with
    the mean in place, ``before`` and ``after`` it."""
    world = init(timeout_minutes=2)
    config = ds_json(stage, world.size)
    zero3 = {k: v for k, v in config.items() if k != "train_batch_size"} if stage == 3 else None
    layout = Layout(48, 10_000, packed=True, world_size=world.size, flat=True)
    lm = load_model(Source(str(folder)), dtype=torch.float32, attention="wpn_packed", zero3=zero3)
    model = PackedLM(lm, packed=True)
    engine = build_policy(model, config, None)
    if stage == 3:
        assert engine.optimizer.persistent_parameters, "no parameter stays gathered: the test would miss them"
    objective = Objective(retain_weight=0.0)
    examples, step = make_examples(), Step(engine, objective, world, layout, 0)
    reader, ema = Reader(engine, layout, 0, world), Ema(engine, DECAY)
    segments = [answer.segment for answer in examples.answers]
    saved = [full_weights(lm, world)]
    for _ in range(STEPS):
        step(plan_step(examples, range(len(examples.forget)), [], layout, roles=objective.read), None)
        ema.update()
        saved.append(full_weights(lm, world))
    before = token_probabilities(reader, segments)
    with ema.in_place():
        averaged = token_probabilities(reader, segments)
    after = token_probabilities(reader, segments)
    if world.is_main:
        found = {"before": before, "averaged": averaged, "after": after}
        for k, weights in enumerate(saved):
            assert weights is not None
            found |= {f"{k}.{name}": value for name, value in weights.items()}
        save_file({name: value.contiguous() for name, value in found.items()}, out)
