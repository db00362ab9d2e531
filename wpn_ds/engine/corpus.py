"""The data of a run as tokens: read and tokenised once, by the first process of each machine, kept in files, and mapped
by all of its ranks.

The files lie in the cache folder under what they depend on: the contents of the data files, the tokenizer, the settings
that matter, and the code that reads. A later start so reads no record.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from wpn_ds import data
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.examples import ExampleSet, build_examples
from wpn_ds.data.inspect import contradiction_note
from wpn_ds.data.origins import Origin, origin_of
from wpn_ds.data.records import (
    ForgetRecord,
    RetainRecord,
    read_answers,
    read_forget,
    read_retain,
    with_random_wanted,
)
from wpn_ds.data.segments import mapped
from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import render_prompt
from wpn_ds.engine.probe import asked_of
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce, max_over_ranks, patiently, progress_bar
from wpn_ds.models.load import max_positions
from wpn_ds.settings.run import Config
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import cache_folder, cause, publish, remove_abandoned, sha256, sha256_of_all

logger = logging.getLogger(__name__)

#: Retain examples on which their NLL is measured at an evaluation.
RETAIN_EXAMPLES_MEASURED = 256

#: Raised whenever the files change their meaning though the code in ``wpn_ds/data`` doesn't: older ones are not found.
FORMAT = 1
_ABOUT = "about.json"


class Records(NamedTuple):
    """The data as they are read: ``asked`` is what the probe asks."""

    forget: list[ForgetRecord]
    retain: list[RetainRecord]
    validation: list[ForgetRecord]
    asked: list[ForgetRecord]


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens; ``row_length``: most tokens of one."""

    tokenizer: Any
    style: PromptStyle
    row_length: int

    @classmethod
    def of(cls, config: Config, tokenizer: Any, lm_config: Any) -> Encoding:
        # GPT-Neo's stock attention can't take a row that is longer than the model has positions.
        row_length = min(config.data.max_length, max_positions(lm_config) or config.data.max_length)
        return cls(tokenizer, PromptStyle.of(config.to_flat()), row_length)


@dataclass(frozen=True)
class About:
    """What is known of the data besides their tokens.

    Attributes:
        forget, retain: how many records there are.
        warnings: what was said of the data while they were read.
        note: on texts that are wanted in one record and unwanted in another, where both are read.
        first_prompt: the first record's, as the model reads it; of plain text all of it.
        asked: the records that the probe asks.
        facts: :meth:`ExampleSet.facts` of each set, once it is there.
        sizes: bytes of each file.
    """

    forget: int
    retain: int
    warnings: list[str]
    note: str
    first_prompt: str
    asked: list[ForgetRecord]
    facts: dict[str, dict[str, Any]]
    sizes: dict[str, int]

    @classmethod
    def of(cls, records: Records, config: Config, encoding: Encoding, warnings: list[str]) -> About:
        return cls(
            forget=len(records.forget),
            retain=len(records.retain),
            warnings=warnings,
            note=contradiction_note(records.forget) if config.terms.compares_wanted else "",
            first_prompt=_first_read(records.forget[0], encoding),
            asked=asked_of(records.asked, config.logging.probe_prompts),
            facts={},
            sizes={},
        )

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises OSError, ValueError, TypeError where it isn't there or not whole."""
        found = cls(**json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
        return replace(found, asked=[_record(one) for one in found.asked])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Corpus:
    """The data of a run.

    Attributes:
        about: what is known of them.
        examples: what is trained on.
        held_out: what the losses are measured on.
    """

    about: About
    examples: ExampleSet
    held_out: ExampleSet


class CorpusBuilder:
    """The data, found as tokens or read as records: enough to check the settings before all is tokenised."""

    def __init__(self, config: Config, encoding: Encoding, world: World) -> None:
        """Every rank must call it.

        Raises:
            UserError: the data don't allow the run.
        """
        self._config, self._encoding, self._world = config, encoding, world
        self._records: Records | None = None
        self._key = self._of_this_machine()
        self._path = cache_folder() / f"data-{self._key}"
        found = _open(self._path) if self._key else None
        missing = max_over_ranks(float(found is None), world.device) > 0
        self._found = None if missing else found
        about = None if self._found is None else self._found.about
        if about is None:
            about = next(filter(None, patiently(self._read)))
        elif world.is_main:
            for line in about.warnings:
                logger.warning(line)
        self.about: About = about

    def _of_this_machine(self) -> str:
        """The key that the first process of this machine has found; empty where it can't be known."""
        host, first = socket.gethostname(), self._world.local_rank == 0
        keys = patiently(lambda: (host, _key(self._config, self._encoding) if first else ""))
        return next((key for where, key in keys if where == host and key), "")

    def _read(self) -> About | None:
        """The first process of a machine reads the records."""
        if self._world.local_rank != 0:
            return None
        with _heard() as warnings:
            self._records = read_records(self._config)
        return About.of(self._records, self._config, self._encoding, warnings)

    def corpus(self) -> Corpus:
        """The data as tokens. Every rank must call it.

        Raises:
            UserError: a text can't be tokenised; or the processes of a machine don't see the same folder.
        """
        if self._found is not None:
            return self._found
        failed = next(filter(None, patiently(self._write)), "")
        if failed:  # the run has what it needs; later ones must read again, and every rank has its own
            announce(self._world, f"the tokens {failed}; or set WPN_DS_CACHE to another folder")
            records = self._records or read_records(self._config)
            return Corpus(self.about, *_sets(records, self._encoding, self._bar, None))
        self._records = None
        _give_back()
        if (found := _open(self._path)) is None:
            raise UserError(
                f"{self._path} was written but isn't there: set WPN_DS_CACHE to one folder for all processes"
            )
        return found

    def _write(self) -> str:
        """The first process of a machine leaves the files; why it can't, or nothing."""
        if not self._key:
            return "can't be kept: a file that they depend on can't be read or written"
        if self._records is None:
            return ""
        remove_abandoned(self._path.parent, r"data-[0-9a-f]+\..*tmp")
        partial_ = self._path.with_name(f"{self._path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            partial_.mkdir(parents=True)
            sets = dict(zip(_SETS, _sets(self._records, self._encoding, self._bar, partial_), strict=True))
            files = sorted(partial_.rglob("*.bin"))
            about = replace(
                self.about,
                facts={name: made.facts() for name, made in sets.items()},
                sizes={str(file.relative_to(partial_)): file.stat().st_size for file in files},
            )
            (partial_ / _ABOUT).write_text(json.dumps(asdict(about)) + "\n", encoding="utf-8")
            publish(partial_, self._path, lambda: _open(self._path) is not None)
        except OSError as error:
            return f"can't be kept in {self._path.parent}: {cause(error)}"
        finally:
            shutil.rmtree(partial_, ignore_errors=True)
        return ""

    def _bar(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return progress_bar(self._world, items, what)


_SETS = ("examples", "held_out")


def _sets(
    records: Records, encoding: Encoding, bar: Callable[[Iterable[Any], str], Iterable[Any]], folder: Path | None
) -> Iterator[ExampleSet]:
    """What is trained on, and what the losses are measured on, in folders of these names."""
    held = records.validation, records.retain[:RETAIN_EXAMPLES_MEASURED]
    for name, (forget, retain) in zip(_SETS, ((records.forget, records.retain), held), strict=True):
        own = None if folder is None else folder / name
        if own is not None:
            own.mkdir()
        yield build_examples(forget, retain, encoding.tokenizer, encoding.style, encoding.row_length, bar, own)


def _open(path: Path) -> Corpus | None:
    """What lies there; None if it isn't whole."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        about = About.read(path)
        if all((path / file).stat().st_size == size for file, size in about.sizes.items()):
            columns = [mapped(path / name, ExampleSet.SHAPES) for name in _SETS]
            return Corpus(about, *map(ExampleSet.of, columns, (about.facts[name] for name in _SETS)))
    return None


def _first_read(record: ForgetRecord, encoding: Encoding) -> str:
    return render_prompt(record.prompt, encoding.tokenizer, encoding.style) if record.prompt else record.rejected[0]


def _record(of: Mapping[str, Any]) -> ForgetRecord:
    """A record that went through JSON."""
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in of.items()}
    if isinstance(made["prompt"], tuple):
        made["prompt"] = tuple(Message(**turn) for turn in made["prompt"])
    return ForgetRecord(**made)


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """The lines that reading data logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    named = logging.getLogger(data.__name__)
    named.addHandler(handler)
    try:
        yield lines
    finally:
        named.removeHandler(handler)


def _give_back() -> None:
    """Memory of what is no more, which the C library would keep for this process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ---- what the files depend on ----


def _key(config: Config, encoding: Encoding) -> str:
    """Stands for all that the files depend on; empty if something can't be read, or the tokenizer not written."""
    own, drawn = config.data, _draws_wanted(config)
    code = sorted(Path(data.__file__).parent.glob("*.py"))
    try:
        about = {
            "format": FORMAT,
            "code": sha256_of_all([*code, Path(__file__)]),
            "versions": [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
            "tokenizer": _tokenizer_digest(encoding.tokenizer),
            "style": asdict(encoding.style),
            "row_length": encoding.row_length,
            "origins": [origin.identity() for origin in _origins(config)],
            "wanted": [config.terms.compares_wanted, config.objective.wanted],
            "wanted_file": [sha256(Path(path)) for path in own.wanted_file or []],
            "seed": config.training.seed if drawn else None,
            "asked": config.logging.probe_prompts,
        }
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _tokenizer_digest(tokenizer: Any) -> str:
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sha256_of_all(sorted(path for path in Path(folder).rglob("*") if path.is_file()))


# ---- records ----


def read_records(config: Config) -> Records:
    """The records of the data that are named, or else the embedded ones.

    Wanted answers that are drawn are trained on; what is harmless, a record's own ones say better, if it has them.
    """
    drawn = _draws_wanted(config)
    alone = drawn or not config.terms.compares_wanted
    train, kept, held = _origins(config)
    forget = read_forget(train, alone=alone, plain=True)
    validation = read_forget(held, alone=alone, plain=True)
    retain = read_retain(kept)
    asked = validation or forget
    if drawn:
        answers, seed = _wanted_answers(config, retain), config.training.seed
        forget = with_random_wanted(forget, answers, seed)
        if not any(record.chosen for record in validation):
            validation = with_random_wanted(validation, answers, seed)
        if not any(record.chosen for record in asked):
            asked = validation or forget
    return Records(forget, retain, validation, asked)


def _draws_wanted(config: Config) -> bool:
    drawn = bool(config.data.wanted_file) or config.objective.wanted != "records"
    return config.terms.compares_wanted and drawn


def _origins(config: Config) -> tuple[Origin, Origin, Origin]:
    """Of what is trained on, retained, and held out."""
    settings, own = config.to_flat(), config.data
    train, kept, held = (origin_of(settings, part) for part in ("train", "retain", "validation"))
    if own.embedded:
        train = replace(train, files=[embedded_file("forget")])
        kept = kept if own.names_retain else Origin([embedded_file("retain")])
        held = held if own.names_validation else Origin([embedded_file("heldout")])
    return train, kept, held


def _wanted_answers(config: Config, retain: Sequence[RetainRecord]) -> list[str]:
    """What prompts get their wanted answers from.

    Raises:
        UserError: they are random answers of the retain data, and there are none.
    """
    if config.data.wanted_file:
        return read_answers(config.data.wanted_file)
    if config.objective.wanted == "dont_know":
        return read_answers([embedded_file("dont_know", "txt")])
    if not retain:
        raise UserError(
            f"--objective {config.unlearning.objective} draws its wanted answers from retain data: add --retain_file "
            "or --wanted_file"
        )
    return [record.response for record in retain if record.prompt is not None] or [r.response for r in retain]
