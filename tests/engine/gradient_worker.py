"""One process of the gradient test: run every case as one real SGD step and save the update of the weights."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engine.gradient_cases import WEIGHTS, make_examples
from wpn_ds.data.plan import Layout, plan_step
from wpn_ds.engine.bank import Bank, answer_vectors, fresh_targets
from wpn_ds.engine.build import build_frozen, build_policy, full_weights
from wpn_ds.engine.distributed import init, shutdown, sum_over_ranks
from wpn_ds.engine.step import Step
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM
from wpn_ds.objectives.wpn import WPN


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


watched: list[dict[str, torch.Tensor]] = []


def run_case(case: dict, models: Path, world) -> tuple[dict, dict | None]:
    config = ds_json(case["stage"], world.size)
    zero3 = {k: v for k, v in config.items() if k != "train_batch_size"} if case["stage"] == 3 else None

    def load(folder: str) -> PackedLM:
        lm = load_model(
            Source(str(models / folder)),
            dtype=torch.float32,
            gradient_checkpointing=case["checkpointing"] and folder == "start",
            dropout=case["dropout"] if folder == "start" else 0.0,
            zero3=zero3,
        )
        return PackedLM(lm, packed=case["packed"])

    model = load("start")
    engine = build_policy(model, config, None)
    reference = build_frozen(load("reference"), config, world)
    objective = Watched(
        pooling=case["pooling"],
        scoring=case["scoring"],
        temperature=case["temperature"],
        targets=case["targets"],
        negatives=case["negatives"],
        retain_loss=case["retain_loss"],
        wpn_weight=WEIGHTS["npair"],
        nll_weight=WEIGHTS["nll"],
        retain_weight=WEIGHTS["retain"],
    )
    examples = make_examples()
    layout = Layout(48, 48 if case["several"] else 10_000, case["packed"], world.size)
    plan = plan_step(examples, [3, 0, 4, 2, 1], range(len(examples.retain)), layout, with_unwanted=objective.coupled)
    count = len(plan.micro_batches[world.rank])
    if case["several"]:
        assert count > 1, "the case is to have several micro-batches"
    if not case["several"]:
        assert count == 1, "the case is to have one micro-batch"
    targets = None
    if case["targets"] == "detached":
        targets = fresh_targets(engine, objective, examples, plan, layout, 0, world)
    elif objective.frozen:
        vectors = answer_vectors(engine, objective, examples.answers, layout, 0, world)
        targets = Bank.of(examples, vectors).targets(plan, objective)
    step = Step(engine, objective, world, 0, reference if objective.needs_reference_logits else None)
    runs = []
    norm = next(m for name, m in model.lm.named_modules() if name.endswith((".0.self_attn_layer_norm", ".0.ln_1")))
    norm.register_forward_hook(lambda *_: runs.append(1))
    watched.clear()
    result = step(plan, targets)
    if case["targets"] == "live" and case["several"]:
        for first, second in zip(watched[:count], watched[count:], strict=True):
            for name in first:
                assert torch.equal(first[name], second[name]), "the second forward isn't the first again"
    planned = count * (2 if objective.coupled and count > 1 else 1)
    assert len(runs) == planned + (count if case["checkpointing"] else 0), "the case isn't the one it says it is"
    assert not result.skipped
    totals = sum_over_ranks(result.sums.totals, world.device)
    parts = {name: total / result.sums.counts[name] for name, total in totals.items()}
    weights = full_weights(model.lm, world)
    parts["grad_norm"] = result.grad_norm
    engine.destroy()
    return parts, weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    world = init(timeout_minutes=2)
    for k, case in enumerate(json.loads(args.cases.read_text())):
        parts, weights = run_case(case, args.models, world)
        if weights is not None:
            save_file(weights, args.out / f"{k}.safetensors", metadata={"parts": json.dumps(parts)})
    shutdown()
    os._exit(0)  # see wpn_ds.engine.loop.run_guarded


if __name__ == "__main__":
    main()
