"""Training jobs on a real Slurm of several nodes: launched, preempted, killed, on other numbers of ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from tests.launching import environment, free_port, launch
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import logs

pytestmark = pytest.mark.distributed


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss/total"]) for m in metrics(run) if "loss/total" in m]


def weights(run: Path) -> dict:
    return load_file(run / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def nearly_same(one: Path, other: Path) -> bool:
    """But for the order of sums, which ranks change (and OPT's k_proj biases, whose gradient is nothing else)."""
    a, b = weights(one), weights(other)
    pairs = [(x, y) for (_, x), (_, y) in zip(losses(one), losses(other), strict=True)]
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in b) and all(
        abs(x - y) <= 1e-4 * abs(y) for x, y in pairs
    )


def by_launcher(ranks: int, recipe: list[str], out: Path, job_env, *extra: str) -> Path:
    """The same training outside Slurm."""
    program = ["launch/train.py", "--deepspeed", "ds_configs/zero3.json", *recipe, "--output_dir", str(out), *extra]
    env = {"WPN_DS_CACHE": job_env["WPN_DS_CACHE"]}
    done = launch(ranks, program, port=free_port(), env=env)
    assert done.returncode == 0, done.stdout[-5000:]
    return out


@pytest.fixture(scope="module")
def alone(recipe, job_env, tmp_path_factory) -> Path:
    """One process that nothing disturbs."""
    return by_launcher(1, recipe, tmp_path_factory.mktemp("alone") / "run", job_env)


@pytest.fixture(scope="module")
def unbroken(recipe, job_env, tmp_path_factory) -> Path:
    """Two ranks that nothing disturbs."""
    return by_launcher(2, recipe, tmp_path_factory.mktemp("unbroken") / "run", job_env)


def steps_done(run: Path) -> int:
    try:
        return json.loads((run / "status.json").read_text())["step"]
    except (OSError, ValueError):
        return -1


def starts(run: Path) -> list[dict]:
    path = run / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ranks_of(run: Path) -> list[int]:
    """The training processes, in order of their numbers."""
    found = []
    for pid in Cluster.processes(str(run)):
        try:
            program = Path(f"/proc/{pid}/exe").resolve().name
        except OSError:
            continue
        if program.startswith("python"):
            found.append(pid)
    return found


def node_of(pid: int) -> str:
    """The node that a task of Slurm's runs on."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(word.partition("=")[2] for word in variables if word.startswith("SLURMD_NODENAME="))


def slowly(folder: Path) -> dict[str, str]:
    """An environment in which every step, and every file of a save, takes a tenth of a second longer: time to disturb
    them. SIGUSR2 makes a rank raise."""
    (folder / "sitecustomize.py").write_text(
        "import signal, sys, time\n"
        "def fall(*_): raise RuntimeError('asked to')\n"
        "signal.signal(signal.SIGUSR2, fall)\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Slow(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name not in ('wpn_ds.engine.step', 'wpn_ds.engine.writer'): return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import importlib.util\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        load = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            load(module)\n"
        "            owner, attribute = (module.Step, '__call__') if 'Step' in vars(module) else (module, '_write')\n"
        "            call = getattr(owner, attribute)\n"
        "            def slow(*args):\n"
        "                time.sleep(0.1)\n"
        "                return call(*args)\n"
        "            setattr(owner, attribute, slow)\n"
        "        spec.loader.exec_module = exec_module\n"
        "        sys.meta_path.insert(0, self)\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_every_script_is_accepted(cluster) -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        text = script.read_text()
        if "#SBATCH --nodes=" not in text:
            continue
        nodes = min(4, int(re.search(r"--nodes=(\d+)", text)[1]))  # the cluster has four
        done = cluster.run("sbatch", "--test-only", f"--nodes={nodes}", str(script))
        assert done.returncode == 0 and "to start at" in done.stdout, f"{script.name}: {done.stdout}"


def test_training_over_two_nodes_equals_one_process_and_report_follows(
    cluster, alone, recipe, job_env, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"
    size = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        f"--output={tmp_path}/%x-%j.log",
    ]
    submit = [str(ROOT / "slurm" / "submit.sh"), *size, "opt-125m", *recipe, "--output_dir", str(run)]
    monkeypatch.chdir(tmp_path)  # evaluate.sh writes its log where it was submitted
    done = cluster.run(*submit, env=job_env)
    found = re.search(r"training is job (\d+), .*evaluation is job (\d+)", done.stdout, re.DOTALL)
    assert found is not None, done.stdout
    evaluation = cluster.wait(found[2], 240)
    assert evaluation["JobState"] == "COMPLETED", logs(tmp_path)
    assert cluster.job(found[1])["JobState"] == "COMPLETED"
    assert nearly_same(run, alone)
    log = logs(tmp_path)
    assert "started by srun: 2 ranks" in log
    assert re.search(r"2 nodes \(node\d, node\d\): cpu, all-reduce [0-9.]+ GB/s", log)
    assert "summary: " in log
    report = json.loads((run / "report.json").read_text())
    own = {name: recipe[recipe.index(f"--{name}_file") + 1] for name in ("train", "retain")}
    assert {name: report["settings"]["files"][name] for name in own} == {name: [file] for name, file in own.items()}
    assert (run / "report.html").stat().st_size > 1000


def test_the_script_of_a_large_model_runs_as_it_stands(cluster, recipe, job_env, tmp_path) -> None:
    run = tmp_path / "run"
    flags = [*recipe, "--max_steps", "2", "--save_steps", "0", "--output_dir", str(run)]
    job = cluster.sbatch(f"--output={tmp_path}/%x-%j.log", str(ROOT / "slurm" / "opt-6.7b.sh"), *flags, env=job_env)
    assert cluster.wait(job, 400)["JobState"] == "COMPLETED", logs(tmp_path)[-4000:]
    assert starts(run)[0]["ranks"] == 16 and (run / "DONE").exists()


def test_preempted_five_times_nothing_is_repeated_or_skipped(cluster, submit, recipe, job_env, tmp_path) -> None:
    flags = [*recipe, "--max_steps", "60", "--save_steps", "0", "--eval_steps", "20"]
    calm = by_launcher(2, flags, tmp_path / "calm", job_env)
    run = tmp_path / "run"
    job = submit("opt-125m.sh", *flags, "--output_dir", str(run), env=slowly(tmp_path))
    for number in range(1, 6):
        goal = steps_done(run) + 4
        cluster.until(
            lambda n=number, g=goal: len(starts(run)) == n and steps_done(run) >= g, 120, lambda: logs(tmp_path)[-3000:]
        )
        cluster.run("scancel", "--signal=USR1", "--batch", job)
        cluster.until(
            lambda n=number: len(starts(run)) > n, 120, lambda: f"not started again\n{logs(tmp_path)[-3000:]}"
        )
    assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
    assert int(cluster.job(job)["Restarts"]) == 5
    assert [start["ended"] for start in starts(run)] == ["", *["stopped by SIGUSR1"] * 5]
    log = logs(tmp_path)  # within the signal's lead, and not as the requeue took the step down
    assert log.count("stopped by SIGUSR1: go on") == 5 and "ended without a word" not in log
    assert "5 restarts (5 stopped by SIGUSR1)" in log  # the run's own summary
    assert all(log.index("stopped by") < at.start() for at in re.finditer("DUE TO JOB REQUEUE", log))
    told = [m["step"] for m in metrics(run) if "loss/total" in m]
    assert told == list(range(1, 61))
    assert losses(run) == losses(calm) and same_weights(run, calm)
    board = EventAccumulator(str(run / "runs"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/total")] == told
    evaluated = [m["step"] for m in metrics(run) if "eval/nll_wanted" in m]
    assert evaluated == [m["step"] for m in metrics(calm) if "eval/nll_wanted" in m]


def test_adapters_go_on_after_a_preemption_as_if_nothing_had_been(cluster, submit, recipe, job_env, tmp_path) -> None:
    lora = ["--lora_r", "4", "--lora_target", "all-linear", "--max_steps", "30", "--save_steps", "0"]
    calm, run = by_launcher(2, [*recipe, *lora], tmp_path / "calm", job_env), tmp_path / "run"
    job = submit("opt-125m.sh", *recipe, *lora, "--output_dir", str(run), env=slowly(tmp_path))
    cluster.until(lambda: steps_done(run) >= 4, 120, lambda: logs(tmp_path)[-3000:])
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
    assert int(cluster.job(job)["Restarts"]) == 1 and losses(run) == losses(calm)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (run, calm))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_cancelled_job_leaves_a_checkpoint_and_stays_away(cluster, submit, unbroken, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    flags = [*recipe, "--save_steps", "0", "--output_dir", str(run)]
    job = submit("opt-125m.sh", *flags, env=slowly(tmp_path))
    cluster.until(lambda: steps_done(run) >= 4, 120, lambda: logs(tmp_path)[-3000:])
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    cluster.until(lambda: (run / "REQUEUE").exists(), 20, lambda: logs(tmp_path)[-3000:])
    assert f"sbatch the same with --output_dir {run}" in logs(tmp_path) and "requeueing" not in logs(tmp_path)
    again = submit("opt-125m.sh", *flags)
    assert cluster.wait(again)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
    assert starts(run)[1]["step"] >= 4 and losses(run) == losses(unbroken) and same_weights(run, unbroken)


@pytest.mark.parametrize("ranks", [1, 4])
def test_resumed_on_another_number_of_nodes_the_data_order_is_kept(
    cluster, submit, unbroken, recipe, job_env, tmp_path, ranks
) -> None:
    run = by_launcher(2, [*recipe, "--save_total_limit", "9"], tmp_path / "run", job_env)
    for step in (8, 12):  # as if it had been killed after step 7
        subprocess.run(["rm", "-r", str(run / f"checkpoint-{step}")], check=False)
    (run / "DONE").unlink()
    if not (run / "checkpoint-4").exists():
        pytest.fail("the checkpoint of step 4 is gone")
    job = submit("opt-125m.sh", *recipe, "--output_dir", str(run), ranks=ranks)
    assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
    assert starts(run)[-1] == starts(run)[-1] | {"ranks": ranks, "step": 4}
    assert nearly_same(run, unbroken)


def test_a_hung_rank_ends_the_step_with_every_stack_and_its_node_is_left_out(cluster, submit, recipe, tmp_path) -> None:
    hang = "import signal, time\nsignal.signal(signal.SIGUSR2, lambda *_: time.sleep(10**6))\n"
    env = slowly(tmp_path)
    with (tmp_path / "sitecustomize.py").open("a") as stream:
        stream.write(hang)
    run = tmp_path / "run"
    flags = [*recipe, "--max_steps", "80", "--output_dir", str(run), "--hang_timeout", "10"]
    job = submit("opt-125m.sh", *flags, env=env | {"WPN_SPARE_NODES": "1"}, sbatch=("--no-kill",), ranks=3)
    cluster.until(lambda: steps_done(run) >= 6, 120, lambda: logs(tmp_path)[-3000:])
    ranks = ranks_of(run)
    assert len(ranks) == 2
    begun, bad = time.monotonic(), node_of(ranks[1])
    os.kill(ranks[1], signal.SIGUSR2)
    cluster.until(
        lambda: len(starts(run)) == 2, 60, lambda: f"it hung on\n{logs(tmp_path)[-3000:]}"
    )  # and was started again
    took = time.monotonic() - begun
    log = logs(tmp_path)
    for rank in (0, 1):
        assert f"rank {rank}: no progress for 10 s (--hang_timeout) in micro-batch" in log, log[-4000:]
        assert "no progress for 10 s" in (run / "logs" / f"rank-{rank}.log").read_text()
    assert f'{tmp_path}/sitecustomize.py", line' in log  # where the one hung
    assert log.count('launch/train.py", line') == 2  # both whole, from the first call on
    assert took < 10 + 5 + 30
    assert starts(run)[1]["ended"] == f"in the job: a rank hung on {bad}"
    assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]


def test_a_lost_node_is_replaced(cluster, submit, unbroken, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    flags = [*recipe, "--max_steps", "12", "--save_steps", "4", "--output_dir", str(run)]
    env = slowly(tmp_path)
    job = submit("opt-125m.sh", *flags, env=env)
    cluster.until(lambda: (run / "checkpoint-4").exists(), 120, lambda: logs(tmp_path)[-3000:])
    lost = cluster.job(job)["NodeList"]
    victim = cluster.run("scontrol", "show", "hostnames", lost).stdout.split()[-1]
    cluster.power_off(victim)
    try:
        assert cluster.wait(job, 240)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
        assert len(starts(run)) >= 2 and same_weights(run, unbroken)
        assert losses(run) == losses(unbroken)
    finally:
        cluster.power_on(victim)
        cluster.until(lambda: cluster.idle() == 4, 90, "the node did not come back")


def test_the_controller_may_be_restarted_meanwhile(cluster, submit, unbroken, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    job = submit("opt-125m.sh", *recipe, "--output_dir", str(run), env=slowly(tmp_path))
    cluster.until(lambda: steps_done(run) >= 2, 120, lambda: logs(tmp_path)[-3000:])
    cluster.restart_controller()
    cluster.until(lambda: cluster.run("scontrol", "ping").stdout.count("UP") == 1, 60, "slurmctld did not come back")
    assert cluster.wait(job)["JobState"] == "COMPLETED", logs(tmp_path)[-3000:]
    assert same_weights(run, unbroken)


def test_a_mistake_is_said_once_and_not_requeued(cluster, submit, recipe, tmp_path) -> None:
    job = submit("opt-125m.sh", *recipe, "--output_dir", str(tmp_path / "run"), "--max_stepz", "3")
    assert cluster.wait(job)["JobState"] == "FAILED"
    log = logs(tmp_path)
    assert log.count("unknown flag --max_stepz; did you mean --max_steps?") == 1 and "Traceback" not in log
    assert "training did not start" in log and cluster.job(job)["Restarts"] == "0"


@pytest.mark.parametrize(
    ("known", "noted", "said"),
    [("count()", 3, "started 3 times from step 0 and came no further"), ("0", 1, "training did not start")],
    ids=["killed after each start was noted", "killed before a second one was"],
)
def test_a_job_that_makes_no_progress_is_not_requeued_for_ever(
    cluster, submit, recipe, tmp_path, known, noted, said
) -> None:
    run = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def count():\n"
        f"    try: return len(open({str(run / 'starts.jsonl')!r}).readlines())\n"
        "    except OSError: return 0\n"
        f"known = {known}\n"
        "def watch():\n"
        "    while count() <= known: time.sleep(0.05)\n"
        "    time.sleep(0.3); os.kill(os.getpid(), 9)\n"
        "if any('train.py' in word for word in sys.orig_argv): threading.Thread(target=watch, daemon=True).start()\n"
    )
    job = submit("opt-125m.sh", *recipe, "--output_dir", str(run), env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert len(starts(run)) == noted, logs(tmp_path)[-3000:]
    assert said in logs(tmp_path) and cluster.job(job)["Restarts"] == "3"


def test_a_signal_as_early_as_the_start_is_refused(cluster, submit, recipe, tmp_path) -> None:
    job = submit("opt-125m.sh", *recipe, "--output_dir", str(tmp_path / "run"), sbatch=("--time=2",))
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "the time limit, 120 s, is no longer than the signal's lead, 300 s" in logs(tmp_path)
    assert not (tmp_path / "run").exists()


def test_deepspeed_in_every_task_is_refused(cluster, recipe, job_env, tmp_path) -> None:
    """Without a word, this would be two trainings of one rank each, and a success."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "1",
        "--master_port",
        str(free_port()),
    ]
    program = [
        "launch/train.py",
        "--deepspeed",
        "ds_configs/zero3.json",
        *recipe,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = cluster.run("srun", "--nodes=2", "--ntasks=2", *command, *program, env=job_env, timeout=120)
    assert done.returncode != 0 and "they would train apart" in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_array_has_a_run_for_each_set_of_flags(cluster, recipe, job_env, tmp_path) -> None:
    folder = os.getcwd()
    os.chdir(tmp_path)
    try:
        size = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        script = str(ROOT / "slurm" / "array.sh")
        flags = " ".join([*recipe, "--max_steps", "20", "--save_steps", "0"])
        env = job_env | slowly(tmp_path)
        done = cluster.run(script, *size, "opt-125m", f"{flags} --seed 1", f"{flags} --seed 2", env=env)
        job = done.stdout.split()[-1]
        # The task whose number is that of the whole array must not take its sibling along.
        told = next(
            task
            for task in (0, 1)
            if f"JobId={job} ArrayJobId" in cluster.run("scontrol", "show", "job", f"{job}_{task}").stdout or task
        )
        run = tmp_path / "runs" / f"opt-125m-{job}-{told}"
        cluster.until(lambda: steps_done(run) >= 3, 120, lambda: logs(tmp_path)[-3000:])
        cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_{told}")
        cluster.until(
            lambda: cluster.run("scontrol", "show", "job", job).stdout.count("JobState=COMPLETED") == 2,
            200,
            lambda: f"the array did not end: {done.stdout}{logs(tmp_path)[-3000:]}",
        )
    finally:
        os.chdir(folder)
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == [f"opt-125m-{job}-{task}" for task in (0, 1)]
    seeds = [re.search(r"^seed: (\d+)$", (run / "run.yaml").read_text(), re.MULTILINE)[1] for run in runs]
    assert seeds == ["1", "2"]
    assert len(starts(runs[told])) == 2 and len(starts(runs[1 - told])) == 1


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_other_launchers_give_the_weights_of_deepspeed(unbroken, recipe, job_env, tmp_path, launcher) -> None:
    starter = Path(sys.executable).parent / launcher
    if not starter.exists() and not os.environ.get("WPN_DS_REQUIRE_SLURM"):
        pytest.skip(f"no {launcher} beside this Python: pip install mpi4py mpich")
    ranks = (
        ["-n", "2", sys.executable] if launcher == "mpirun" else ["--nproc-per-node=2", f"--master-port={free_port()}"]
    )
    run = tmp_path / "run"
    program = ["launch/train.py", "--deepspeed", "ds_configs/zero3.json", *recipe, "--output_dir", str(run)]
    done = subprocess.run(
        [str(starter), *ranks, *program],
        cwd=ROOT,
        env=environment({"WPN_DS_CACHE": job_env["WPN_DS_CACHE"]}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 and f"started by {launcher}: 2 ranks" in done.stdout, done.stdout[-3000:]
    assert same_weights(run, unbroken)
