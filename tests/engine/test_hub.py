"""Pushing to the hub, of which a stand-in listens on this machine: what goes there, what doesn't, and what is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.runs import cached, flags
from tests.launching import ROOT, environment
from tests.standin_hub import TOKEN, Hub, standin_hub
from wpn_ds.engine.hub import chosen

WRITTEN = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "adapter",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "README.md": "---\ntags: [unlearning]\n---\n# Card\n",
    "report.json": "{}",
    "evaluation/report.html": "<p>",
}
OWN = {
    "run.yaml": "train_file: /home/me/forget.jsonl",
    "metrics.jsonl": "{}",
    "trackers.json": "{}",
    "logs/rank-0.log": "a log",
    "checkpoint-2/model.safetensors": "a checkpoint",
    "wandb/run/config.json": "{}",
    "answers.jsonl": "{}",
    ".env": "HF_TOKEN=x",
}


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    for name, text in (WRITTEN | OWN).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin_hub() as made:
        yield made


def around(hub: Hub | None, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of somebody with a home in ``folder`` who knows only this hub."""
    there = hub.address if hub else "http://127.0.0.1:9"
    own = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home" / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return own | {"HF_ENDPOINT": there, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token or ""}


def push(folder: Path, env: dict[str, str], repo: str = "me/mild") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wpn_ds.cli", "push", str(folder), "--push_to_hub", repo]
    return subprocess.run(command, env=environment(env), capture_output=True, text=True, check=False, timeout=300)


def test_model_adapter_card_and_report_go_to_a_private_repository_and_nothing_else(run, hub, tmp_path) -> None:
    assert chosen(run) == sorted(WRITTEN)
    done = push(run, around(hub, tmp_path))
    assert done.returncode == 0 and done.stdout.strip() == f"{hub.address}/me/mild", done.stderr
    assert hub.repos == {"me/mild": True}
    assert {path: content.decode() for path, content in hub.files["me/mild"].items()} == WRITTEN
    assert set(hub.seen) == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_the_token_of_a_login_is_taken(run, hub, tmp_path) -> None:
    env = around(hub, tmp_path, token=None)
    login = Path(env["HF_HOME"], "token")
    login.parent.mkdir(parents=True)
    login.write_text(TOKEN)
    assert push(run, env).returncode == 0 and "me/mild" in hub.files


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "me/mild", "nobody is logged in: hf auth login, or set HF_TOKEN"),
        ("hf_NoTokenOfThisHubButItLooksLikeOne", "me/mild", "refused with 401: Invalid token: Bearer ***"),
        (TOKEN, "others/mild", "refused with 403"),
        (TOKEN, "a/b/c", "Repo id must be"),
    ],
)
def test_who_may_not_push_is_told_in_one_line_without_the_token(run, hub, tmp_path, token, repo, said) -> None:
    done = push(run, around(hub, tmp_path, token), repo)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: --push_to_hub {repo}: ") and said in line
    assert not token or token not in done.stdout + done.stderr
    assert hub.files == {}


def test_a_folder_without_a_model_is_refused_before_anybody_is_asked(hub, tmp_path) -> None:
    done = push(tmp_path / "nothing", around(hub, tmp_path))
    assert done.returncode == 2 and "holds no model" in done.stderr and hub.seen == []


def test_a_hub_that_is_not_reached_is_one_line(run, tmp_path) -> None:
    done = push(run, around(None, tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "http://127.0.0.1:9 isn't reached: " in line


def pushed_run(tiny: Path, out: Path, env: dict[str, str]) -> tuple[int, str]:
    """A run of one step whose model shall be pushed: its exit code, and what it says. A process of its own, as
    huggingface_hub reads its environment when it is imported."""
    line = flags(tiny, out, "--max_steps", "1", "--probe_prompts", "0", "--push_to_hub", "me/mild", ds="zero0")
    done = subprocess.run(
        [sys.executable, *line],
        cwd=ROOT,
        env=environment(cached(tiny) | env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
    )
    return done.returncode, done.stdout


@pytest.mark.distributed
def test_a_run_pushes_its_model_when_it_has_ended_well(tiny, hub, tmp_path) -> None:
    out = tmp_path / "out"
    code, said = pushed_run(tiny, out, around(hub, tmp_path))
    assert code == 0 and f"pushed to {hub.address}/me/mild" in said, said
    pushed = hub.files["me/mild"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= pushed.keys()
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert str(tiny) not in pushed["README.md"].decode(), "where files lay is nobody's business"
    written = [path for path in out.rglob("*") if path.is_file()]
    assert TOKEN not in said and not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.distributed
def test_a_run_whose_hub_is_not_reached_ends_well_and_says_what_to_do_later(tiny, tmp_path) -> None:
    out = tmp_path / "out"
    code, said = pushed_run(tiny, out, around(None, tmp_path))
    assert code == 0 and (out / "DONE").exists(), said
    assert "it is tried again at the end" in said
    assert f"later: wpn-ds push {out} --push_to_hub me/mild" in said


@pytest.mark.distributed
def test_a_run_without_a_token_is_refused_at_its_start(tiny, hub, tmp_path) -> None:
    code, said = pushed_run(tiny, tmp_path / "out", around(hub, tmp_path, token=None))
    assert code == 2 and "error: --push_to_hub me/mild: nobody is logged in" in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
