"""A real Slurm cluster on this machine: munged, slurmctld, and one slurmd for each node.

Every node has its own network, host name, /tmp, /dev/shm and process numbers, so what works here doesn't work because
two ranks happen to share a machine. Nothing outside the cluster's folder is written; its daemons die with this process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

BOOT = Path(__file__).parent / "boot.sh"
NET = "10.91.7"
#: Harmless devices that stand for GPUs: Slurm counts and hands them out, and the programs use none.
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "console", "kmsg")

_SLURM_CONF = """
ClusterName=lab
SlurmctldHost=controller({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={lab}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=5
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/run/slurmctld.own.pid
SlurmdPidFile={lab}/run/slurmd.%n.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/slurmd.%n.log
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
InactiveLimit=0
KillWait=10
OverTimeLimit=0
JobRequeue=1
FirstJobId={first_job}
MinJobAge=3600
UnkillableStepTimeout=60
GresTypes=gpu
"""


class Cluster:
    """``with Cluster(folder, nodes=2, share=[...]) as cluster: cluster.sbatch(...)``."""

    def __init__(
        self, folder: Path, *, nodes: int, share: list[Path], gpus: int = 8, cpus: int = 64, memory: int = 16_000
    ) -> None:
        """``folder`` is the cluster's own; ``share``: folders that all nodes see at the same place."""
        self.lab = folder
        self.nodes = [f"node{k}" for k in range(1, nodes + 1)]
        self._env = os.environ | {
            "LAB": str(folder),
            "NODES": str(nodes),
            "NET": NET,
            "SHARE": " ".join(map(str, (folder, *share))),
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }
        for name in ("etc", "log", "run", "state", "spool", "munge"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        first_job = int(time.time()) % 60_000_000  # numbers of an older cluster in old logs can't fake a pass
        conf = _SLURM_CONF.format(net=NET, lab=folder, first_job=first_job)
        for k, node in enumerate(self.nodes, start=11):
            conf += (
                f"NodeName={node} NodeAddr={NET}.{k} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN\n"
            )
        conf += f"PartitionName=gpu Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (folder / "etc" / "slurm.conf").write_text(conf)
        (folder / "etc" / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{d}\n" for d in _DEVICES[:gpus]))
        (folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd dies in `ip netns exec`
        hosts = "127.0.0.1 localhost\n" + f"{NET}.1 controller\n"
        hosts += "".join(f"{NET}.{k} {node}\n" for k, node in enumerate(self.nodes, start=11))
        (folder / "etc" / "hosts").write_text(hosts)
        self._init: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        namespaces = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        with (self.lab / "log" / "boot.log").open("w") as log:
            self._init = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *namespaces, "bash", str(BOOT), "controller"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.until(lambda: self.idle() == len(self.nodes), 60, "the cluster did not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._init is not None
        self._init.kill()  # --kill-child: all that runs in its namespaces dies with it
        self._init.wait()

    def run(
        self, *command: str, node: str = "controller", env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on a machine of the cluster, in the current folder there."""
        return subprocess.run(
            [*self._enter(node), *command],
            env=self._env | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _enter(self, node: str) -> list[str]:
        inside = ["bash", "-c", 'cd "$0" && exec "$@"', os.getcwd()]
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        controller = (self.lab / "run" / "controller.pid").read_text().strip()
        enter = ["nsenter", "--target", controller, *spaces, "--", *inside]
        if node != "controller":
            enter += [
                "nsenter",
                "--target",
                (self.lab / "run" / f"{node}.pid").read_text().strip(),
                *spaces,
                "--",
                *inside,
            ]
        return enter

    def idle(self) -> int:
        """How many nodes wait for work."""
        if not (self.lab / "run" / "controller.pid").exists():
            return 0
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%T", timeout=5).stdout.split().count("idle")
        except subprocess.TimeoutExpired:
            return 0

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """The number of the new job."""
        done = self.run("sbatch", "--parsable", *arguments, env=env)
        assert done.returncode == 0, done.stdout
        return done.stdout.split()[-1].partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, BatchHost, ..."""
        shown = self.run("scontrol", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, seconds: float = 300) -> dict[str, str]:
        """What scontrol says of a job once it has ended."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.until(lambda: self.job(number).get("JobState") in ends, seconds, f"job {number} did not end")
        return self.job(number)

    def power_off(self, node: str) -> None:
        """Everything on the node is gone at once."""
        pid = (self.lab / "run" / f"{node}.pid").read_text().strip()
        self.run("kill", "-KILL", pid)

    def power_on(self, node: str) -> None:
        with (self.lab / "log" / "boot.log").open("a") as log:
            subprocess.Popen(
                [*self._enter("controller"), "bash", str(BOOT), "wire", node, node.removeprefix("node")],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def restart_controller(self) -> None:
        """Kill slurmctld and start it again; nodes and their jobs stay."""
        self.run("pkill", "-KILL", "-x", "slurmctld")
        command = shlex.join(["slurmctld", "-D"]) + f" >>{self.lab}/log/boot.log 2>&1 &"
        self.run("bash", "-c", command)

    @staticmethod
    def until(
        condition: Callable[[], bool], seconds: float, otherwise: str | Callable[[], str], pause: float = 0.2
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
            time.sleep(pause)

    @staticmethod
    def processes(marker: str) -> list[int]:
        """Numbers, as this process sees them, of the cluster's processes with ``marker`` in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(marker.encode() in word for word in words):
                    found.append(int(entry.name))
        return sorted(found)
