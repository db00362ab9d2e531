"""One rank of the gradient test: run every case as one real SGD step and save the update of the weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.data.made import FORMS
from tests.engine.gradient_cases import VOCABULARY, WEIGHTS, adapt, make_examples
from tests.engine.small import silent
from wpn_ds.data.layout import Layout
from wpn_ds.engine.adversary import RELEARNING, Adversary
from wpn_ds.engine.export import full_weights
from wpn_ds.engine.feed import Feed
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.meta import MetaStep
from wpn_ds.engine.policy import build_engine
from wpn_ds.engine.reading import Reader
from wpn_ds.engine.shards import Away, Shards
from wpn_ds.engine.sharpness import Sharpness
from wpn_ds.engine.start import FrozenModel, WithoutAdapters
from wpn_ds.engine.step import Step
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.jobs.distributed import World, init, sum_over_ranks
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM, train_only
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Objective, Role, Terms
from wpn_ds.settings.deepspeed import frozen_json
from wpn_ds.settings.run import TrainingConfig, UnlearningConfig


def ds_json(stage: int, world_size: int) -> dict:
    small = {"stage3_param_persistence_threshold": 200, "stage3_prefetch_bucket_size": 2000}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000} | (small if stage == 3 else {}),
        "steps_per_print": None,
    }


def objective_of(case: dict) -> Objective:
    """The case's objective, by its flags."""
    kind = find(case["objective"])
    settings = {
        "nll_weight": case["nll"],
        "nll_position_power": case["nll_power"],
        "retain_weight": WEIGHTS["retain"] if case["objective"] != "ga" else 0.0,
        "retain_loss": case["retain_loss"],
        "ascent_weight": case["ascent"],
        "preference_weight": WEIGHTS["preference"],
        "wpn_weight": WEIGHTS["npair"],
        "beta": case["beta"],
        "gamma": case["gamma"],
        "importance": case["importance"],
        "forget_weight": WEIGHTS["forget"],
        "steering": case["steering"],
        "rmu_depth": 0.5,
        "rmu_trained": case["trained"],
        "wpn_position_power": case["power"],
        **{f"wpn_{name}": case[name] for name in ("pooling", "scoring", "temperature", "targets", "negatives")},
    }
    own = {entry.name for entry in fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in own})


def layout_of(case: dict, world: World) -> Layout:
    budget = (24 if "flat" in FORMS[case["layout"]] else 48) if case["several"] else 10_000
    return Layout(row_length=48, tokens_per_micro_batch=budget, world_size=world.size, **FORMS[case["layout"]])


def load(folder: Path, config: dict, flat: bool, **settings: Any) -> Any:
    stage3 = config["zero_optimization"]["stage"] == 3
    return load_model(
        Source(str(folder)),
        dtype=torch.float32,
        attention="wpn_packed" if flat else "auto",
        zero3={k: v for k, v in config.items() if k != "train_batch_size"} if stage3 else None,
        **settings,
    )


@cache
def starting_engine(
    folder: Path, stage: int, flat: bool, packed: bool, four_bits: bool, depth: float | None, world: World
) -> Any:
    """Of the starting model, which no case changes: an engine takes as long as a step."""
    config = ds_json(stage, world.size)
    lm = load(folder, config, flat, four_bits=four_bits)
    return build_engine(PackedLM(lm, packed=packed, depth=depth), config, None)


@cache
def frozen_model(folder: Path, stage: int, flat: bool, packed: bool, kind: str, world: World) -> FrozenModel:
    config = ds_json(stage, world.size)
    return FrozenModel(load(folder, config, flat), packed, frozen_json(config, kind), world)


def run_case(case: dict, models: Path, cache: Path, world: World) -> tuple[dict, dict | None]:
    """One step of the product's own parts. The starting model is another one than the policy's, or the gradient of KL
    would be zero; under adapters it is the policy's without them."""
    layout = layout_of(case, world)
    start_of = (models / ("start" if case["lora"] else "reference"), case["stage"], layout.flat, layout.packed)
    config = ds_json(case["stage"], world.size)
    lm = load(
        models / "start",
        config,
        layout.flat,
        gradient_checkpointing=case["checkpointing"],
        four_bits=case["four_bits"],
        dropout=case["dropout"],
    )
    terms, examples, tables = (
        Terms.of(objective_of(case)),
        make_examples(case["headed"]),
        Tables(cache, {"case": str(case)}),
    )
    if case["lora"]:
        adapt(lm, case["lora"])
    elif terms.trained:
        assert terms.depth is not None
        train_only(lm, terms.depth, terms.trained)
    model = PackedLM(lm, packed=layout.packed, depth=terms.depth)
    policy = Reader(build_engine(model, config, None), layout, 0, world)
    from_tables = terms.needs_start_distribution and case["reference"] in ("states", "topk")
    starting = policy
    if terms.keeps_answers or from_tables or terms.states:
        starting = Reader(starting_engine(*start_of, case["four_bits"], terms.depth, world), layout, 0, world)
    # With all tokens but one, topk is exact.
    settings = UnlearningConfig(reference=case["reference"], reference_topk=VOCABULARY - 1)
    tabulator = Tabulator(starting, tables, silent)
    frozen = partial(frozen_model, *start_of, case["reference"], world)
    if case["lora"]:
        frozen = partial(WithoutAdapters, policy.engine)
    start = tabulator.start(terms, examples, partial(tabulator.reference, settings, frozen))
    start.reader = policy
    training = TrainingConfig(global_batch_size=len(examples.forget))
    read = terms.read | (RELEARNING.read if case["adversary"] else set())
    plan = Feed(examples, training, len(examples.retain), layout, read, halves=case["meta"] > 0).plan(1)
    count = len(plan.micro_batches[world.rank])
    kinds = len({role is Role.RETAIN for role in read}) + (plan.support > 0)
    assert (count > kinds) if case["several"] else (count == kinds), "the case is to have one or several micro-batches"
    harmony = Harmony(policy.engine, world) if case["harmonise"] else None
    shards = Shards(policy.engine, world)
    away: Away | None = None
    if case["sam_rho"]:
        away = Sharpness(shards, case["sam_rho"])
    if case["adversary"]:
        away = Adversary(shards, policy, examples, case["adversary"], case["adversary_rate"])
    if case["meta"]:
        away = MetaStep(shards, case["meta"])
    step = Step(policy.engine, terms, world, layout, 0, start, harmony, away)
    held = [getattr(p, "ds_tensor", p.data).clone() for p in lm.parameters()]
    update = policy.engine.step

    def unmoved() -> None:
        now = [getattr(p, "ds_tensor", p.data) for p in lm.parameters()]
        assert all(map(torch.equal, now, held)), "the weights are not where they were"
        update()

    policy.engine.step = unmoved
    runs: list[int] = []
    norm = next(
        m
        for name, m in lm.named_modules()
        if name.endswith((".0.self_attn_layer_norm", ".0.ln_1", ".0.input_layernorm"))
    )

    def of_policy(note: Callable[[Any], None]) -> Callable[..., None]:
        """A hook for the forwards of the policy, and not for those of the model without its adapters."""
        return lambda *call: (
            None if any(getattr(m, "_disable_adapters", False) for m in lm.modules()) else note(call[-1])
        )

    norm.register_forward_hook(of_policy(lambda _: runs.append(1)))
    hidden: list[torch.Tensor] = []
    policy.engine.module.register_forward_hook(of_policy(lambda output: hidden.append(output.hidden.detach().clone())))
    result = step(plan)
    two_passes = count > 1 and any(t.coupled and not plan.is_local(plan.mask(t.pairs)) for t in terms.answers)
    # These are read once more, before the step.
    detached = any(t.answers == "detached" and t.vectors is not None for t in terms.answers)
    forget = sum(bool(plan.roles(k) & {Role.WANTED, Role.UNWANTED}) for k in range(count))
    before = forget * case["adversary"]
    times = (1 + two_passes) * (1 + bool(case["sam_rho"]))  # that they are read
    readings = [hidden[before:][i * forget : (i + 1) * forget] for i in range(times)]
    if plan.support:  # what is read twice is read in another order
        readings = []
    for k, reading in enumerate(readings):  # where dropout is seen, the weights don't move to speak of
        first = readings[0 if case["dropout"] or k < 2 else 2] if two_passes or case["dropout"] else reading
        assert all(map(torch.equal, reading, first)), "the second forward isn't the first again"
    again = (before + count + bool(case["sam_rho"]) * forget) * case["checkpointing"]
    planned = before + count - forget + times * forget
    if support := plan.support:
        planned = count + two_passes * (forget - support) + support * (1 + 2 * (two_passes and support > 1))
        again = (count + support) * case["checkpointing"]
    assert detached or len(runs) == planned + again, "the case isn't the one it says it is"
    assert not result.skipped
    totals = sum_over_ranks(result.sums.totals, world.device)
    parts = {name: total / result.sums.counts[name] for name, total in totals.items()}
    weights = full_weights(lm, world, adapters_alone=bool(case["lora"]))
    parts["grad_norm"] = float(result.grad_norm)
    policy.engine.destroy()
    return parts, weights


def run_cases(cases: list[dict], models: Path, out: Path) -> None:
    """Rank 0 saves the weights and the loss parts of case k as ``<k>.safetensors`` in ``out``."""
    world = init(timeout_minutes=2)
    for k, case in enumerate(cases):
        parts, weights = run_case(case, models, out / "cache", world)
        if weights is not None:
            save_file(weights, out / f"{k}.safetensors", metadata={"parts": json.dumps(parts)})
        gc.freeze()  # what DeepSpeed keeps of each engine, or its collections would look at all of them again
