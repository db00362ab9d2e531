"""What is reported is what happened: rates, flops, and a metrics file that a resumed run continues."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.data.made import layout
from tests.engine.gradient_cases import adapt, make_examples
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.data.plan import Segment
from wpn_ds.engine.telemetry import ModelShape, Telemetry, step_flops
from wpn_ds.jobs.distributed import World
from wpn_ds.objectives.terms import Role

NONE: frozenset[Role] = frozenset()
MAIN = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def test_step_flops_are_three_times_what_a_counter_sees_in_the_forward():
    from torch.utils.flop_counter import FlopCounterMode

    from wpn_ds.data.batch import collate
    from wpn_ds.models.packed import PackedLM

    config = OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4
    )
    lm = OPTForCausalLM._from_config(config, attn_implementation="eager")
    examples = make_examples()
    roles = frozenset({Role.WANTED, Role.RETAIN})
    plan = plan_step(examples, range(5), range(3), Layout(48, 48, False, 1), roles=roles)
    model, counted, squares = PackedLM(lm, packed=True), 0, 0
    for rows in plan.micro_batches[0]:
        for row in rows:  # one segment a row, without padding
            with FlopCounterMode(display=False) as counter:
                model(collate((row,), 0, roles=roles))
            counted += counter.get_total_flops()
            squares += len(row[0].segment) ** 2
    shape = ModelShape.of(lm)
    dense = counted - 2 * shape.layers * shape.width * squares  # the counter sees the masked half of the scores too
    assert step_flops(plan, shape, roles) == pytest.approx(3 * dense)


def test_a_shared_prompt_s_flops_count_once():
    segments = [Segment((2, 5, 6, 7, *range(10, 10 + n)), 1, 4) for n in (3, 9)]
    items = [Answer(segment, k, k) for k, segment in enumerate(segments)]
    examples, shape = ExampleSet([ForgetExample((items[0],), (items[1],))]), ModelShape(1000, 0, 2, 8)
    plans = [plan_step(examples, [0], [], layout(form), roles=frozenset(Role)) for form in ("flat", "shared")]
    apart, shared = (step_flops(plan, shape, NONE) for plan in plans)
    alone = Segment((2, 5, 6, 7), 1, 4)  # what is not computed again, as a text of its own
    assert apart - shared == 3 * (2 * shape.body * len(alone) + 2 * shape.layers * shape.width * len(alone) ** 2)


def test_a_frozen_weight_has_no_gradient_to_compute():
    lm = OPTForCausalLM(
        OPTConfig(
            vocab_size=96,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=3,
            ffn_dim=64,
            num_attention_heads=4,
        )
    )
    whole = ModelShape.of(lm)
    adapt(lm, rank=4)
    shape = ModelShape.of(lm)
    adapters = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert shape == replace(whole, body=whole.body + adapters, frozen_body=whole.body, frozen_head=whole.head)
    examples = make_examples()
    plan = plan_step(examples, range(5), range(3), Layout(48, 48, False, 1), roles=frozenset({Role.WANTED}))
    labels = sum(answer.segment.answer_length for example in examples.forget[:5] for answer in example.wanted)
    unfrozen = replace(shape, frozen_body=0, frozen_head=0)
    saved = step_flops(plan, unfrozen, frozenset({Role.WANTED})) - step_flops(plan, shape, frozenset({Role.WANTED}))
    assert saved == 2 * (whole.body * plan.tokens + whole.head * labels)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint_and_a_torn_line(tmp_path):
    lines = [json.dumps({"step": step, "x": step}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "x"')
    telemetry = Telemetry(tmp_path, tmp_path / "runs", MAIN, total_steps=6, done=2)
    telemetry.log(3, {"x": float("nan"), "y": 1.5})
    telemetry.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": None, "y": 1.5}]


def test_other_ranks_write_nothing(tmp_path):
    other = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    telemetry = Telemetry(tmp_path, tmp_path / "runs", other, total_steps=6, done=0)
    telemetry.log(1, {"x": 1.0})
    telemetry.progress(1, {"loss/total": 1.0}, train_seconds=1.0)
    telemetry.close()
    assert list(tmp_path.iterdir()) == []
