"""What users' scripts rely on doesn't change unseen: `interface.yaml` is changed on purpose, with the CHANGELOG.

The metrics, the reports and the files of a run are checked where tests make such, by `tests.interface`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import signal
import sys
from collections.abc import Iterator

import pytest

import wpn_ds
from tests.interface import FROZEN, same
from wpn_ds.cli import main
from wpn_ds.errors import UserError
from wpn_ds.settings.run import Config

OBJECTIVES: dict[str, dict] = FROZEN["objectives"]


@pytest.fixture(autouse=True)
def as_alone(no_launcher, monkeypatch) -> Iterator[None]:
    """A wide terminal, no launcher, and the signals' handlers as they were."""
    monkeypatch.setenv("COLUMNS", "200")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def helped(capsys):
    """What the command line prints for ``--help`` behind some arguments."""

    def helped(*arguments: str) -> str:
        capsys.readouterr()
        try:
            code = main([*arguments, "--help"])
        except SystemExit as left:
            code = int(left.code or 0)
        assert code == 0, arguments
        return capsys.readouterr().out

    return helped


def flags_of(text: str) -> set[str]:
    """The flags at the beginning of a help's lines, not those that sentences name."""
    heads = re.findall(r"^ {2}(-.*?)(?: {2}|$)", text, re.MULTILINE)
    return {flag for head in heads for flag in re.findall(r"(?<!\S)--[A-Za-z0-9_-]+", head)}


def test_the_commands_are_the_frozen_ones(helped) -> None:
    names: set[str] = set()
    for name in re.findall(r"^ {2}([\w-]+) ", helped(), re.MULTILINE):
        below = re.search(r"^usage: wpn-ds [\w-]+ \{([\w,]+)\}", helped(name), re.MULTILINE)
        names |= {f"{name} {each}" for each in below[1].split(",")} if below else {name}
    same(names, {"train", *FROZEN["commands"]}, "commands")


@pytest.mark.parametrize("command", FROZEN["commands"])
def test_a_command_has_the_frozen_flags(command, helped) -> None:
    same(flags_of(helped(*command.split())), {"--help", *FROZEN["commands"][command]}, command)


def test_training_has_the_frozen_flags_between_all_objectives(helped) -> None:
    found = flags_of(helped("train")).union(*(flags_of(helped("train", "--objective", name)) for name in OBJECTIVES))
    names = set(FROZEN["settings"]).union(*OBJECTIVES.values())
    same(found, {"--help", "--config", *(f"--{name}" for name in names)}, "train")


def test_the_keys_of_a_yaml_file_and_their_defaults_are_the_frozen_ones() -> None:
    flat = {name: value for name, value in Config().to_flat().items() if name not in OBJECTIVES["wpn"]}
    same(set(flat), set(FROZEN["settings"]), "settings")
    assert flat == FROZEN["settings"]


def test_the_objectives_are_the_frozen_ones(capsys) -> None:
    assert main(["train", "--deepspeed", "x", "--objective", "?"]) == 2
    known = re.search(r"--objective must be one of (.*), got", capsys.readouterr().err)
    assert known
    same(set(known[1].split(", ")), set(OBJECTIVES), "objectives")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_frozen_defaults(name) -> None:
    flat = Config.from_flat({"objective": name}).resolved().to_flat()
    assert {flag: value for flag, value in flat.items() if flag not in FROZEN["settings"]} == OBJECTIVES[name]


def test_every_error_has_the_frozen_exit_code() -> None:
    names = [found.name for found in pkgutil.walk_packages(wpn_ds.__path__, "wpn_ds.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    errors = {error.__name__: error.exit_code for error in kinds(UserError)}
    constants = {k: v for module in modules for k, v in vars(module).items() if k.endswith("EXIT_CODE")}
    assert errors | constants == FROZEN["exit codes"]


def kinds(error: type[UserError]) -> Iterator[type[UserError]]:
    yield error
    for below in error.__subclasses__():
        if below.__module__.startswith("wpn_ds."):  # not those of tests
            yield from kinds(below)


def test_the_command_line_has_the_frozen_exit_codes(monkeypatch, capsys) -> None:
    assert main(["--help"]) == 0
    assert main([]) == main(["no_command"]) == main(["train", "--no_flag"]) == 2

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["wpn_ds.cli"].importlib, "import_module", interrupted)
    assert main(["status"]) == 130
