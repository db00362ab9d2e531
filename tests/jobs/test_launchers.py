"""Who started this process, from its environment alone; and where its ranks meet."""

from __future__ import annotations

import signal
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.launching import free_port
from wpn_ds.errors import UserError
from wpn_ds.jobs import launchers, signals
from wpn_ds.jobs.launchers import discover, meeting, tell

SIX = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "12345"}
SRUN = {
    "SLURM_JOB_ID": "70007",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "node1,node2,node5,node6",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_NTASKS": "7",
}


def test_srun_gives_rank_and_rendezvous() -> None:
    name, found = discover(SRUN)
    assert name == "srun"
    assert [found[key] for key in SIX] == ["6", "7", "0", "1", "node1", "20007"]
    assert discover(SRUN | {"SLURM_NODEID": "1"})[1]["LOCAL_WORLD_SIZE"] == "2"


def test_a_rendezvous_that_the_batch_script_exports_wins() -> None:
    _, found = discover(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "4242")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "environment"),
        ({"CROSS_SIZE": "1", "CROSS_RANK": "0", "LOCAL_SIZE": "4"}, "deepspeed"),
        ({"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_launchers_that_set_the_variables_themselves(more, expected) -> None:
    assert discover(BY_HAND | more)[0] == expected


def test_torchrun_once_a_node_under_srun_is_one_job() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2"}
    assert discover(SRUN | BY_HAND | torchrun)[0] == "torchrun"


def test_nobody_is_a_job_of_one() -> None:
    name, found = discover({"HOME": "/root"})
    assert name == "none" and [found[key] for key in SIX] == ["0", "1", "0", "1", "127.0.0.1", "0"]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (BY_HAND | {"WORLD_SIZE": "1"}, "don't fit"),
        (BY_HAND | {"RANK": "first"}, "RANK='first'"),
        # What silently gave two trainings of one rank each: each task starts a launcher of its own.
        (SRUN | BY_HAND | {"WORLD_SIZE": "2", "CROSS_SIZE": "1"}, "would train apart"),
        (SRUN | BY_HAND | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1"}, "would train apart"),
        (SRUN | BY_HAND, "would train apart"),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "a launcher that is not known"),
        # The batch script itself, without srun.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, "start it with srun"),
    ],
)
def test_half_set_and_split_jobs_are_refused(env, said) -> None:
    with pytest.raises(UserError, match=None) as refused:
        discover(env)
    assert said in str(refused.value)


def meet(monkeypatch, port: str, rank: int = 0) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with meeting():
        dist.init_process_group(
            "gloo", init_method="env://", rank=rank, world_size=2, timeout=timedelta(milliseconds=500)
        )


def test_a_port_in_use_is_one_line(monkeypatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^port {port} of .* is in use, .*--master_port to deepspeed.*MASTER_PORT$"
        ):
            meet(monkeypatch, str(port))


@pytest.mark.parametrize("port", ["", "abc", "70000", "-1"])
def test_what_is_no_port_is_one_line(monkeypatch, port) -> None:
    with pytest.raises(UserError, match=r"MASTER_PORT=.* is no port"):
        meet(monkeypatch, port)


def test_a_rank_that_meets_nobody_says_where(monkeypatch) -> None:
    port = free_port()
    with pytest.raises(
        UserError, match=rf"^the ranks can't meet at 127\.0\.0\.1:{port} \(MASTER_ADDR, MASTER_PORT\): .+$"
    ):
        meet(monkeypatch, str(port), rank=1)


@pytest.mark.parametrize(
    ("rank", "ended_by", "said"),
    [
        ("0", None, "error: wrong\n"),
        ("1", None, "error: rank 1: wrong\n"),
        ("1", signal.SIGTERM, ""),
        ("0", signal.SIGTERM, "error: wrong\n"),
    ],
)
def test_a_rank_that_the_launcher_ends_while_it_starts_leaves_the_word_to_rank_0(
    monkeypatch, capsys, rank, ended_by, said
) -> None:
    monkeypatch.setattr(launchers, "_LET_RANK_0_SPEAK", 0)
    monkeypatch.setattr(signals, "_received", [ended_by] if ended_by else [])
    before = signal.getsignal(signal.SIGTERM)
    tell(UserError("wrong"), rank)
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == said
