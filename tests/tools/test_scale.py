"""``wpn-ds estimate --table``: a roofline, held against what others measured, and the ways to shard that it chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from wpn_ds.errors import UserError
from wpn_ds.models.sizes import KNOWN
from wpn_ds.tools.estimate import command
from wpn_ds.tools.estimate.changes import resolved_zero
from wpn_ds.tools.estimate.memory import Job
from wpn_ds.tools.estimate.network import communication
from wpn_ds.tools.estimate.scale import WAYS, Machine, best, hiding_batch, table, timed

H100 = Machine(989e12, 0.47, intra_gbps=3600, inter_gbps=3200, room=75 * 2**30)
A100 = Machine(312e12, 0.4, intra_gbps=2400, inter_gbps=200, room=75 * 2**30)


def job(name: str = "opt-6.7b", **values: Any) -> Job:
    defaults: dict[str, Any] = {"nodes": 1, "gpus_per_node": 8, "zero": {"stage": 3}, "bf16": True}
    defaults |= {"gradient_checkpointing": False, "tokens_per_micro_batch": 4096, "max_length": 1024}
    defaults |= {"reference": "states", "global_batch_size": 1024, "tokens_per_example": 512}
    return Job(model=KNOWN[name], **{**defaults, **values})


@pytest.mark.parametrize(
    ("name", "parameters", "nodes", "texts", "checkpointing", "mfu"),
    [
        ("opt-6.7b", 6_658_859_008, 1, 6, False, 0.464),
        ("opt-13b", 12_853_954_560, 1, 2, False, 0.398),
        ("opt-13b", 12_853_954_560, 2, 2, False, 0.396),
        ("opt-13b", 12_853_954_560, 4, 2, False, 0.400),
        ("opt-13b", 12_853_954_560, 8, 2, False, 0.399),
        ("opt-30b", 29_975_214_080, 1, 3, True, 0.381),
        ("opt-30b", 29_975_214_080, 2, 10, True, 0.431),
        ("opt-30b", 29_975_214_080, 4, 14, True, 0.439),
        ("opt-66b", 64_862_437_376, 4, 2, True, 0.362),
        ("opt-66b", 64_862_437_376, 8, 8, True, 0.426),
    ],
)
def test_the_roofline_is_within_a_fifth_of_what_llm_foundry_publishes(
    name, parameters, nodes, texts, checkpointing, mfu
) -> None:
    """Fully sharded pretraining on H100s, ``texts`` of 2,048 tokens a GPU and micro-batch (its benchmarking README)."""
    made = job(
        nodes=nodes,
        gradient_checkpointing=checkpointing,
        tokens_per_micro_batch=2048 * texts,
        tokens_per_example=2048,
        global_batch_size=8 * nodes * texts,
        reference="none",
    )
    made = replace(made, model=replace(KNOWN[name], parameters=parameters))
    made = replace(made, zero=resolved_zero(WAYS["3"], made))
    assert timed("3", made, H100).mfu(H100) == pytest.approx(mfu, rel=0.2)


def test_twice_the_gpus_halve_the_computing_and_the_network_is_short_at_last() -> None:
    rows = table(job(), A100)
    assert [row["gpus"] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for row, next_row in pairwise(rows):
        assert next_row["computing_seconds"] == pytest.approx(row["computing_seconds"] / 2)
        assert next_row["tokens_per_second"] >= row["tokens_per_second"] * 0.97
    assert rows[0]["mfu"] == pytest.approx(0.4) and rows[-1]["mfu"] < 0.2
    assert rows[-1]["sending_seconds"] > rows[-1]["computing_seconds"]
    assert rows[-1]["hiding_batch"] > 1024 > rows[0]["hiding_batch"]


def test_what_fits_whole_is_not_sharded_further_and_checkpointing_is_for_what_fits_no_other_way() -> None:
    small = best(job("opt-1.3b"), A100)
    assert small is not None and small.way == "1" and not small.job.gradient_checkpointing
    large = best(job("opt-66b", nodes=4), A100)
    assert large is not None and large.way.startswith("3") and large.job.gradient_checkpointing
    assert best(job("opt-66b"), A100) is None
    slow = replace(A100, inter_gbps=50.0)
    inside = best(job("opt-30b", nodes=8), slow)
    assert inside is not None and inside.way == "3, hpZ 8", "gathers inside a node where the network is slow"


def test_more_examples_a_step_hide_the_network() -> None:
    point = best(job(nodes=64, global_batch_size=512), A100)
    assert point is not None and point.sending > point.computing
    batch = hiding_batch(point, A100)
    assert batch is not None
    enough, short = (timed(point.way, replace(point.job, global_batch_size=n), A100) for n in (batch, batch // 2))
    assert enough.computing >= enough.sending and short.computing < short.sending
    assert hiding_batch(point, replace(A100, inter_gbps=0.01)) is None


def test_the_table_is_printed_and_what_fits_nowhere_is_said(capsys) -> None:
    flags = ["--model", "opt-66b", "--table", "--reference", "states", "--global_batch_size", "1024"]
    assert command.run([*flags, "--mtbf_hours", "2000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 8 and "goodput" in lines[2]
    assert "none fits" in lines[3] and lines[3].endswith("memory") and "network" in lines[-1]
    assert command.run([*flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    last = job("opt-66b", nodes=128)
    assert rows[-1]["sent_bytes"] == sum(communication(replace(last, zero=resolved_zero(WAYS["3"], last))).values())
    assert command.run([*flags, "--gpu_memory", "10"]) == 1
    with pytest.raises(UserError, match=r"--efficiency 1\.5: a share is at most 1"):
        command.run([*flags, "--efficiency", "1.5"])
