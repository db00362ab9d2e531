"""``wpn-ds``: one command for everything that isn't started by a launcher."""

from __future__ import annotations

import getpass
import importlib
import io
import logging
import os
import re
import sys
from argparse import REMAINDER
from collections.abc import Callable, Sequence

from wpn_ds.errors import UserError
from wpn_ds.settings.parse import Count, Parser, convert
from wpn_ds.system.files import home, refusal

_COMMANDS = {
    "train": "unlearn a model (under `deepspeed`: launch/train.py, the same flags)",
    "ranks": "train or another command on several ranks of a machine without a GPU, which import once",
    "evaluate": "the proof: harmless rates on every suite, attacks, benchmarks, before and after",
    "certify": "does it stay forgotten: rounded, fine-tuned, sampled, attacked, on one page",
    "report": "report.html anew, or several runs side by side",
    "judge": "train a judge of your own on labelled answers, or hold judges against them",
    "ablate": "what each part of the objective buys: a grid of short runs, one table and a plot",
    "objectives": "the losses that --objective names: what each minimises, its paper, its defaults",
    "estimate": "memory and communication of a run, whether it fits, and what to change if not",
    "status": "how far a run is, and whether it lives; for a login node",
    "checkpoint": "list, verify, convert and export a run's checkpoints",
    "mix": "a model between two, before unlearning and after it, to compare methods at equal damage",
    "alternates": "other answers to what shall be forgotten, by the starting model, for AltPO",
    "select": "forget data without outliers, the hardest of it, or its nearest retain data, by a model",
    "inspect": "counts, token lengths, padding waste, truncation and duplicates of data files",
    "push": "a run's model or adapter, card and report, to the Hugging Face hub",
    "slurm-scripts": "slurm/, ds_configs/ and launch/ for a cluster, from a package installed without a clone",
    "plant": "train the demo's small model with its unwanted answers",
    "demo": "plant, evaluate, unlearn, evaluate: the whole story in minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names; a user's mistake is one line and exit code 2."""
    try:
        _make_ready()
    except (UserError, OSError) as error:
        return _fail(error if isinstance(error, UserError) else refusal(error) or UserError(str(error)))
    args = [_HOME.sub(_at_home, argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, _COMMANDS))
        lines = (f"  {name:<{width}}  {what}" for name, what in _COMMANDS.items())
        print("usage: wpn-ds COMMAND ...    (wpn-ds COMMAND --help for its flags)\n\n" + "\n".join(lines))
        return 0 if args else 2
    if args[0] not in _COMMANDS:
        from wpn_ds.errors import nearest

        print(f"error: {args[0]!r} is not a command{nearest(args[0], _COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return _COMMAND_FUNCTIONS[args[0]](args[1:])
    except BrokenPipeError:  # `wpn-ds inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


#: A home folder that a shell has not written out: it does where ~ begins a word, not in --flag=~/x or quotation marks.
_HOME = re.compile(r"\A((?:--\w+=)?(?:(?:local|hf):)?)(~[^/\s]*/)")


def _at_home(found: re.Match[str]) -> str:
    return found[1] + os.path.expanduser(found[2])


def launched(command: str, argv: Sequence[str]) -> int:
    """``wpn-ds COMMAND`` on this rank, without the argument that deepspeed (--local_rank=N) and torchrun add."""
    return main([command, *(word for word in argv if not word.startswith(("--local_rank=", "--local-rank=")))])


def train(argv: Sequence[str]) -> int:
    """A training job on this rank; the demo's recipe lies under the flags unless a model is named."""
    from wpn_ds.jobs import launchers, signals
    from wpn_ds.settings.run import parse_args

    signals.install()
    try:
        _make_ready()
        if not {"-h", "--help"}.isdisjoint(argv):
            parse_args(argv)  # shows it and ends, also where nothing could be trained
        launcher = launchers.join()
        _quieten()
        _refuse_unreadable(argv)
        config = parse_args(argv)
        if config.model.model_name_or_path is None:
            from wpn_ds.data.embedded import recipe

            config = parse_args(argv, base=recipe())
    except UserError as error:
        return _fail(error)
    from wpn_ds.engine.train import train
    from wpn_ds.jobs.guard import run_guarded

    if launcher not in ("none", "environment") and os.environ["RANK"] == "0":
        print(f"started by {launcher}: {os.environ['WORLD_SIZE']} ranks", file=sys.stderr)
    return run_guarded(lambda: train(config))


def ranks(argv: Sequence[str]) -> int:
    """``wpn-ds ranks N COMMAND ...``: the command on N ranks, forks of this process."""
    about = "Several ranks on a machine without a GPU, forks of one process that imports once."
    made = Parser(prog="wpn-ds ranks", usage="wpn-ds ranks N COMMAND ...", description=about, allow_abbrev=False)
    made.add_argument("ranks", metavar="N", help="how many")
    made.add_argument("command", metavar="COMMAND", choices=_ON_RANKS, help=f"one of {', '.join(_ON_RANKS)}")
    made.add_argument("flags", nargs=REMAINDER, metavar="...", help="the command's own flags; --help shows them")
    given = made.parse_args(argv)
    line = [given.command, *given.flags]
    if not {"-h", "--help"}.isdisjoint(given.flags):
        return main(line)
    from wpn_ds.jobs import forks

    number, trains = convert(Count, given.ranks, "N"), given.command == "train"
    modules = [_ON_RANKS[given.command], *(forks.LATER if trains else ())]
    return forks.run(number, modules, lambda: main(line), heeds_requests=trains)


def _refuse_unreadable(argv: Sequence[str]) -> None:
    """Raises UserError where the locale can't read an argument: TensorBoard can't write to such a path."""
    for text in argv:
        shown = text.encode("utf-8", "backslashreplace").decode()
        if shown != text:
            raise UserError(
                f"{shown}: not to be read as {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or give a name without "
                "such letters"
            )


def _make_ready() -> None:
    """The terminal takes every text, and there is a home and a user's name, whatever the environment lacks: libraries
    stumble over each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    home()
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = str(os.getuid())
    _quieten()


def _quieten() -> None:
    """No progress bars of the libraries' own in logs, nor one from every rank; and nothing of bitsandbytes, which comes
    with PEFT wherever it is installed, on a package that it would take on a CPU. Before they are imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _guarded(work: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    def command(argv: Sequence[str]) -> int:
        try:
            return work(argv)
        except UserError as error:
            return _fail(error)
        except OSError as error:
            if (told := refusal(error)) is None:
                raise
            return _fail(told)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return command


def _fail(error: UserError) -> int:
    """Say it, once for the job even if its ranks have not joined yet."""
    from wpn_ds.jobs.launchers import tell

    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    tell(error, next(filter(None, ranks), "0"))
    return error.exit_code


def _lazily(place: str) -> Callable[[Sequence[str]], int]:
    """The command at "module:function", loaded when it is called: --help of one needs no torch for another."""
    module, _, name = place.partition(":")

    def command(argv: Sequence[str]) -> int:
        return getattr(importlib.import_module(module), name)(argv)

    return _guarded(command)


#: Commands that several ranks may do together, and the module that each of them would import.
_ON_RANKS = {
    "train": "wpn_ds.engine.train",
    "evaluate": "wpn_ds.evaluate.evaluation",
    "certify": "wpn_ds.evaluate.certificate.certify",
    "alternates": "wpn_ds.tools.alternates.making",
    "select": "wpn_ds.tools.select.methods",
}

_COMMAND_FUNCTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "ranks": _guarded(ranks),
    "evaluate": _lazily("wpn_ds.evaluate.command:run"),
    "certify": _lazily("wpn_ds.evaluate.certificate.command:run"),
    "report": _lazily("wpn_ds.evaluate.report.command:run"),
    "judge": _lazily("wpn_ds.evaluate.judges.command:run"),
    "ablate": _lazily("wpn_ds.tools.ablate.command:run"),
    "objectives": _lazily("wpn_ds.tools.objectives:run"),
    "estimate": _lazily("wpn_ds.tools.estimate.command:run"),
    "status": _lazily("wpn_ds.tools.status:run"),
    "checkpoint": _lazily("wpn_ds.tools.checkpoint:run"),
    "mix": _lazily("wpn_ds.tools.mix:run"),
    "alternates": _lazily("wpn_ds.tools.alternates.command:run"),
    "select": _lazily("wpn_ds.tools.select.command:run"),
    "inspect": _lazily("wpn_ds.tools.inspect:run"),
    "push": _lazily("wpn_ds.tools.push:run"),
    "slurm-scripts": _lazily("wpn_ds.tools.slurm_scripts:run"),
    "plant": _lazily("wpn_ds.tools.plant:run"),
    "demo": _lazily("wpn_ds.tools.demo:run"),
}

if __name__ == "__main__":
    sys.exit(main())
