"""One rank: steps of SGD whose forget gradient is taken where the weights have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine.gradient_cases import make_examples
from tests.engine.gradient_worker import ds_json
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine.export import full_weights
from wpn_ds.engine.policy import build_engine
from wpn_ds.engine.reading import Reader
from wpn_ds.engine.shards import Shards
from wpn_ds.engine.sharpness import Sharpness
from wpn_ds.engine.start import Start
from wpn_ds.engine.step import Step
from wpn_ds.jobs.distributed import World, init, sum_over_ranks
from wpn_ds.jobs.heartbeat import Stopped
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.pmpo import PMPO
from wpn_ds.objectives.terms import Role, Terms

RHO = 0.3


def run(folder: Path, cases: list[tuple[int, bool, bool]]) -> list[dict[str, Any]]:
    """:func:`found` of each case."""
    world = init(timeout_minutes=2)
    return [found(folder, world, *case) for case in cases]


def found(folder: Path, world: World, stage: int, bf16: bool, offload: bool) -> dict[str, Any]:
    """Two steps, one that is stopped where the weights have moved, and in fp32 one whose gradient is not finite:

    ``distances`` that the weights moved; how far this rank's were away at each micro-batch of the second step: of the
    ``first`` pass, where they are ``moved``, and those to ``retain``; whether they were ``back`` before each update,
    after the stop and at the end; whether the last step was ``skipped``; on rank 0 the first one's ``weights``, and the
    ``norm`` of its gradient.
    """
    config = ds_json(stage, world.size)
    config["optimizer"]["params"]["lr"] = 0.01
    config["zero_force_ds_cpu_optimizer"] = False
    if bf16:
        config["bf16"] = {"enabled": True}
        config |= {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}
    if offload:
        parts = ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",)
        config["zero_optimization"] |= {part: {"device": "cpu"} for part in parts}
    zero3 = {k: v for k, v in config.items() if k != "train_batch_size"} if stage == 3 else None
    dtype = torch.bfloat16 if bf16 else torch.float32
    lm = load_model(Source(str(folder)), dtype=dtype, attention="wpn_packed", zero3=zero3)
    engine = build_engine(PackedLM(lm, packed=True), config, None)
    layout, examples = Layout(48, 24, packed=True, world_size=world.size, flat=True), make_examples()
    sharpness = Sharpness(Shards(engine, world), RHO)

    def weights() -> list[Tensor]:
        return [getattr(p, "ds_tensor", p.data).clone() for p in lm.parameters()]

    def step(beat: Any, weight: float = 1.0) -> Any:
        terms = Terms.of(PMPO(nll_weight=weight, ascent_weight=0.5, retain_weight=1.0, retain_loss="nll"))
        start = Start(terms, examples, Reader(engine, layout, 0, world))
        plan = plan_step(examples, range(len(examples.forget)), range(3), layout, roles=terms.read)
        forget[:] = [k for k in range(len(plan.micro_batches[0])) if Role.RETAIN not in plan.roles(k)]
        return Step(engine, terms, world, layout, 0, start, None, sharpness, beat)(plan)

    back: list[bool] = []
    forget: list[int] = []
    places: list[float] = []
    distances: list[float] = []
    norms: list[float] = []
    saved: list[Any] = []
    held, update = weights(), engine.step

    def is_back() -> bool:
        return all(map(torch.equal, weights(), held))

    def updating() -> None:
        back.append(is_back())
        update()

    def beat(_: str) -> None:
        moved = [(now.double() - was.double()).square().sum() for now, was in zip(weights(), held, strict=True)]
        places.append(float(torch.stack(moved).sum().sqrt()))

    def stopping(_: str) -> None:
        if not is_back():
            raise Stopped("SIGTERM")

    engine.step = updating
    for _ in range(2):
        places.clear()
        result = step(beat)
        norms.append(float(result.grad_norm))
        distances.append(sum_over_ranks(result.sums.totals, world.device)["sam/distance"])
        saved.append(full_weights(lm, world))
        held[:] = weights()
    n = len(forget)
    passes = {"first": places[:n], "moved": places[n : 2 * n], "retain": places[2 * n :]}
    try:
        step(stopping)
        back.append(False)
    except Stopped:
        back.append(is_back())
    skipped = None if bf16 else step(lambda _: None, 1e39).skipped
    back.append(is_back())
    engine.destroy()
    return {"distances": distances, "back": back, "skipped": skipped, "weights": saved[0], "norm": norms[0]} | passes
