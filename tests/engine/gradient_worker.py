"""One rank of the gradient test: run every case as one real SGD step and save the update of the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.data.made import FORMS
from tests.engine.gradient_cases import VOCABULARY, WEIGHTS, make_examples
from tests.engine.small import silent
from wpn_ds.data.plan import Layout, Role, plan_step
from wpn_ds.engine.bank import Bank, bank_vectors, fresh_targets, starting_scores
from wpn_ds.engine.build import build_policy, full_weights
from wpn_ds.engine.harmony import Harmony
from wpn_ds.engine.reader import Reader
from wpn_ds.engine.reference import FrozenModel, cached_states, cached_topk, frozen_json, starting_logprobs
from wpn_ds.engine.step import Step
from wpn_ds.engine.tables import Tables
from wpn_ds.jobs.distributed import init, sum_over_ranks
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.family import build_objective
from wpn_ds.objectives.objective import Objective, StartingScores
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.run import ObjectiveConfig


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


class Watched(WPN):
    """Keeps the states of every forward."""

    def states(self, output, batch):
        found = super().states(output, batch)
        watched.append({name: values.detach().clone() for name, (values, _) in found.items()})
        return found


def width(lm) -> int:
    return getattr(lm.config, "word_embed_proj_dim", lm.config.hidden_size)


watched: list[dict[str, torch.Tensor]] = []


def run_case(case: dict, models: Path, cache: Path, world) -> tuple[dict, dict | None]:
    config = ds_json(case["stage"], world.size)
    zero3 = {k: v for k, v in config.items() if k != "train_batch_size"} if case["stage"] == 3 else None
    budget = (24 if "flat" in FORMS[case["layout"]] else 48) if case["several"] else 10_000
    layout = Layout(row_length=48, tokens_per_micro_batch=budget, world_size=world.size, **FORMS[case["layout"]])

    def load(folder: str):
        return load_model(
            Source(str(models / folder)),
            dtype=torch.float32,
            gradient_checkpointing=case["checkpointing"] and folder == "start",
            dropout=case["dropout"] if folder == "start" else 0.0,
            attention="wpn_packed" if layout.flat else "auto",
            zero3=zero3,
        )

    model = PackedLM(load("start"), packed=layout.packed)
    engine = build_policy(model, config, None)
    reader = Reader(engine, layout, 0, world)
    common = {"nll_weight": case["nll"], "retain_weight": WEIGHTS["retain"], "ascent_weight": case["ascent"]}
    objective: Objective = Watched(
        **common,
        pooling=case["pooling"],
        scoring=case["scoring"],
        temperature=case["temperature"],
        targets=case["targets"],
        negatives=case["negatives"],
        retain_loss=case["retain_loss"],
        wpn_weight=WEIGHTS["npair"],
    )
    if case["objective"] != "wpn":
        settings = ObjectiveConfig(objective=case["objective"])
        own = {"beta": case["beta"], "gamma": case["gamma"], "preference_weight": WEIGHTS["preference"]}
        own = {name: value for name, value in own.items() if not settings.without_effect(name)}
        settings = replace(settings, **common, **own, retain_loss=case["retain_loss"])
        objective = build_objective(settings, retain=case["objective"] != "ga")
    examples = make_examples()
    order, retain = [3, 0, 4, 2, 5, 1], range(len(examples.retain))
    plan = plan_step(examples, order, retain, layout, roles=objective.read)
    count = len(plan.micro_batches[world.rank])
    kinds = len({role is Role.RETAIN for role in objective.read})
    assert (count > kinds) if case["several"] else (count == kinds), "the case is to have one or several micro-batches"
    tables = Tables(cache, {"case": str(case)})
    targets: Any = None
    if case["targets"] == "detached":
        targets = fresh_targets(reader, objective, examples, plan)
    elif objective.frozen:
        vectors = bank_vectors(reader, objective, examples.answers, width(model.lm), tables, silent)
        targets = Bank.of(examples, vectors).targets(plan, objective, world.device)
    reference, other = None, None
    by_start = objective.needs_starting_scores or objective.needs_starting_logprobs
    if by_start or case["reference"] in ("states", "topk"):
        other = Reader(build_policy(PackedLM(load("reference"), packed=layout.packed), config, None), layout, 0, world)
    if objective.needs_starting_scores:
        scores = starting_scores(other, objective, examples.answers, tables, silent)
        scores = scores.to(world.device)
        targets = StartingScores(scores[torch.from_numpy(plan.wanted_ids)], scores[torch.from_numpy(plan.unwanted_ids)])
    if objective.keeps_distribution and case["reference"] == "states":
        reference = cached_states(other, examples.retain, tables, silent)
    elif objective.keeps_distribution and case["reference"] == "topk":  # with all tokens but one it is exact
        reference = cached_topk(other, examples.retain, VOCABULARY - 1, tables, silent)
    elif objective.keeps_distribution:
        reference = FrozenModel(load("reference"), layout.packed, frozen_json(config, case["reference"]), world)
    logprobs = None
    if objective.needs_starting_logprobs:
        logprobs = starting_logprobs(other, examples.answers, tables, silent)
    harmony = Harmony(engine, world) if case["harmonise"] else None
    step = Step(engine, objective, world, layout, 0, reference, logprobs, harmony)
    runs = []
    norm = next(m for name, m in model.lm.named_modules() if name.endswith((".0.self_attn_layer_norm", ".0.ln_1")))
    norm.register_forward_hook(lambda *_: runs.append(1))
    watched.clear()
    result = step(plan, targets)
    two_passes = objective.coupled and count > 1 and not plan.is_local(objective.mask(plan))
    passes = [bool(plan.roles(k) & {Role.WANTED, Role.UNWANTED}) for k in range(count)]
    if two_passes and not objective.by_likelihood:
        firsts, seconds = watched[: sum(passes)], watched[sum(passes) :]
        for first, second in zip(firsts, seconds, strict=True):
            for name in first:
                assert torch.equal(first[name], second[name]), "the second forward isn't the first again"
    planned = count + two_passes * sum(passes)
    assert len(runs) == planned + (count if case["checkpointing"] else 0), "the case isn't the one it says it is"
    assert not result.skipped
    totals = sum_over_ranks(result.sums.totals, world.device)
    parts = {name: total / result.sums.counts[name] for name, total in totals.items()}
    weights = full_weights(model.lm, world)
    parts["grad_norm"] = float(result.grad_norm)
    engine.destroy()
    return parts, weights


def run_cases(cases: list[dict], models: Path, out: Path) -> None:
    """Rank 0 saves the weights and the loss parts of case k as ``<k>.safetensors`` in ``out``."""
    world = init(timeout_minutes=2)
    for k, case in enumerate(cases):
        parts, weights = run_case(case, models, out / "cache", world)
        if weights is not None:
            save_file(weights, out / f"{k}.safetensors", metadata={"parts": json.dumps(parts)})
