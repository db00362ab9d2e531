"""One rank: SGD steps with a running mean of the weights, and what the model says with the mean in their place."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engine.gradient_cases import make_examples
from tests.engine.gradient_worker import ds_json
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine.export import full_weights
from wpn_ds.engine.policy import build_engine
from wpn_ds.engine.reading import Reader, answer_scores
from wpn_ds.engine.redraw import Ema
from wpn_ds.engine.start import Start
from wpn_ds.engine.step import Step
from wpn_ds.jobs.distributed import init
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.pmpo import PMPO
from wpn_ds.objectives.terms import Terms

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
    engine = build_engine(model, config, None)
    if stage == 3:
        assert engine.optimizer.persistent_parameters, "no parameter stays gathered: the test would miss them"
    terms = Terms.of(PMPO(nll_weight=1.0, ascent_weight=0.0, retain_weight=0.0))
    examples, reader, ema = make_examples(), Reader(engine, layout, 0, world), Ema(engine, DECAY)
    step = Step(engine, terms, world, layout, 0, Start(terms, examples, reader))
    segments = [answer.segment for answer in examples.answers]
    saved = [full_weights(lm, world)]
    for _ in range(STEPS):
        step(plan_step(examples, range(len(examples.forget)), [], layout, roles=terms.read))
        ema.update()
        saved.append(full_weights(lm, world))
    before = answer_scores(reader, "mean", segments).exp()
    with ema.in_place():
        averaged = answer_scores(reader, "mean", segments).exp()
    after = answer_scores(reader, "mean", segments).exp()
    if world.is_main:
        found = {"before": before, "averaged": averaged, "after": after}
        for k, weights in enumerate(saved):
            assert weights is not None
            found |= {f"{k}.{name}": value for name, value in weights.items()}
        save_file({name: value.contiguous() for name, value in found.items()}, out)
    engine.destroy()
