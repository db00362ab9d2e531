"""The prompts of an evaluation, by suite: which suites there are, which are asked for, and where their prompts are.

`GROUPS` is the whole list. Published prompt lists are read where the user keeps them (``--data_dir``) and are never
downloaded; a suite whose prompts aren't there is left out with a note, or an error if it was asked for by name.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.sources import Problems, field_problem, file_rows
from wpn_ds.errors import UserError, nearest
from wpn_ds.evaluate.attacks import ATTACKS, attack
from wpn_ds.evaluate.published import PUBLISHED, FoundList, find_published, unique_prompts
from wpn_ds.judging.base import PromptKind

QUICK_LIMIT = 64
"""Prompts of each suite under ``--suite quick`` (ours: what a CPU answers in minutes)."""

ATTACK_PREFIX, RELEARNING_PREFIX = "attack/", "relearning/"
"""Of the suites ``attack/NAME``, and of ``relearning/STEPS``, which are asked after so many steps."""

PREFILL = "attack/prefill"
PREFILLED = {f"{PREFILL}-{tokens}": tokens for tokens in (1, 2, 4, 8)}
"""Suites whose answers begin with so many tokens of the unwanted answer."""
FOLLOWED = {f"{ATTACK_PREFIX}are_you_sure": "Are you sure?"}
"""Suites that judge what a model says when it is asked this after its first answer."""

R = TypeVar("R", ForgetRecord, RetainRecord)

GROUPS: dict[str, tuple[str, ...]] = {
    "in_distribution": ("train", "heldout", "new_categories", "attack"),
    "ood": (
        "advbench",
        "harmbench",
        "jailbreakbench",
        "malicious_instruct",
        "tdc",
        "strongreject",
        "aart",
        "forbidden_questions",
    ),
    "attacks": (*(ATTACK_PREFIX + name for name in ATTACKS), *FOLLOWED, *PREFILLED, "latent_jailbreak"),
    "over_refusal": ("over_refusal",),
    "xstest": ("xstest/safe", "xstest/unsafe"),
    "or_bench": ("or_bench/hard", "or_bench/toxic"),
    "toxicity": ("toxicity",),
    "diversity": ("diversity",),
    "relearning": ("relearning",),
    "depth": ("depth",),
    "retain": ("retain",),
    "utility": ("utility",),
    "tofu": ("tofu",),
    "muse": ("muse",),
    "rwku": ("rwku",),
}
"""What ``--suite`` knows, in the order of every table."""

SUITES = tuple(name for names in GROUPS.values() for name in names)
NAMES = {**GROUPS, PREFILL: tuple(PREFILLED)}
"""What ``--suite`` knows besides quick, full and the suites themselves: names that stand for several."""
WITHOUT_PROMPTS = ("relearning", "depth", "retain", "utility", "tofu", "muse", "rwku")
"""Suites that ask no prompts of their own: `build_suites` leaves them to their own modules."""


@dataclass(frozen=True)
class PromptSuite:
    """Prompts that are asked and whose answers are judged.

    Attributes:
        records: prompts with their reference answers; published prompt lists have none (empty ``chosen`` and
            ``rejected``).
        kind: what the prompts are; see :data:`~wpn_ds.judging.base.PromptKind`.
        template: text around a prompt in place of ``--prompt_template``; "{prompt}" for beginnings of texts.
        samples: 0: one greedy answer a prompt; else so many sampled ones.
        prefill: tokens of a record's first unwanted answer that the model's own begins with.
        then: what is said after the model's first answer, so that it is the second one which counts; "": nothing.
        soft: vectors of a soft prompt after each question.
    """

    name: str
    records: tuple[ForgetRecord, ...]
    kind: PromptKind = "harm"
    template: str | None = None
    samples: int = 0
    prefill: int = 0
    then: str = ""
    soft: int = 0


@dataclass(frozen=True)
class Selection:
    """What ``--suite`` asks for.

    Attributes:
        suites: names out of `SUITES`, in their order.
        limit: prompts a suite at most; None: all.
        named: what the user wrote, with the suites it stands for: at least one of these has to be there. Empty for
            quick and full, which take what there is.
    """

    suites: tuple[str, ...]
    limit: int | None
    named: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Sources:
    """Where prompts come from.

    Attributes:
        train, heldout, attack: the records of the user's files or of the embedded demo set.
        benign_files, open_files: JSONL of harmless prompts, and of beginnings of texts; none: the embedded ones.
        data_dir: folder with the files of published prompt lists, anywhere below it.
        limit: prompts a suite at most, in place of the selection's.
        samples: answers a prompt in the diversity suite.
    """

    train: Sequence[ForgetRecord] = ()
    heldout: Sequence[ForgetRecord] = ()
    attack: Sequence[ForgetRecord] = ()
    benign_files: Sequence[str] = ()
    open_files: Sequence[str] = ()
    data_dir: Path | None = None
    seed: int = 0
    limit: int | None = None
    samples: int = 4


class _Missing(Exception):
    """Why a suite has no prompts, and what to do about it; ``usual``: nobody need be told who didn't name it."""

    def __init__(self, reason: str, remedy: str, *, usual: bool = False) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy, self.usual = reason, remedy, usual


def resolve_suites(text: str) -> Selection:
    """``quick`` (all suites, at most `QUICK_LIMIT` prompts each), ``full`` (all of them), or groups and suites, "a,b".

    Raises:
        UserError: something in it is unknown; names the nearest.
    """
    if text.strip() in ("quick", "full"):
        return Selection(SUITES, QUICK_LIMIT if text.strip() == "quick" else None, {})
    named = {}
    for item in map(str.strip, text.split(",")):
        if item in ("quick", "full"):
            raise UserError(f"--suite {text}: {item} is all suites: name nothing beside it")
        if item not in NAMES and item not in SUITES:
            hint = nearest(item, [*NAMES, *SUITES, "quick", "full"])
            known = f": known are quick, full, {', '.join(GROUPS)}, and the suites in these"
            raise UserError(f"--suite {text}: {item!r} is not a suite{hint or known}")
        named[item] = NAMES.get(item, (item,))
    wanted = {name for names in named.values() for name in names}
    return Selection(tuple(name for name in SUITES if name in wanted), None, named)


def build_suites(selection: Selection, sources: Sources) -> tuple[list[PromptSuite], list[str]]:
    """(the selected suites that have prompts, notes on what was left out and why).

    Raises:
        UserError: nothing of what the user named is there, or a file is bad.
    """
    limit = selection.limit if sources.limit is None else sources.limit
    suites: dict[str, PromptSuite] = {}
    missing: dict[str, _Missing] = {}
    notes = []
    for name in selection.suites:
        if name in WITHOUT_PROMPTS:
            continue
        try:
            suites[name], note = _suite(name, sources, limit)
        except _Missing as error:
            missing[name] = error
        else:
            notes += [note] if note else []
    for item, names in selection.named.items():
        if missing.keys() >= set(names):
            which = "" if names == (item,) else f"{names[0]} and the rest: "
            raise UserError(f"--suite {item}: {which}{missing[names[0]]}")
    return list(suites.values()), notes + _left_out(missing)


def take(records: Sequence[R], limit: int | None, seed: int) -> list[R]:
    """At most ``limit`` of the records, in their order: each category has its share of them, rounded up or down.

    The records are ordered by category, within one at random by the seed, and taken at equal distances.
    """
    if limit is None or len(records) <= limit:
        return list(records)
    rng = random.Random(seed)
    keys = [(record.category, rng.random()) for record in records]
    order = sorted(range(len(records)), key=keys.__getitem__)
    chosen = [order[(2 * at + 1) * len(records) // (2 * limit)] for at in range(limit)]
    return [records[at] for at in sorted(chosen)]


def _suite(name: str, sources: Sources, limit: int | None) -> tuple[PromptSuite, str]:
    """(the suite, a note on its file). Raises _Missing without prompts."""

    def few(records: Sequence[ForgetRecord]) -> tuple[ForgetRecord, ...]:
        return tuple(take(records, limit, sources.seed))

    if name in GROUPS["in_distribution"]:
        return PromptSuite(name, few(_own(name, sources))), ""
    if name in PUBLISHED:
        found = _published(name, sources.data_dir)
        return PromptSuite(name, few(found.records), PUBLISHED[name].kind), found.note
    if name == "over_refusal":
        records = _read_prompts(sources.benign_files or _embedded("benign"), "--benign_file")
        return PromptSuite(name, few(records), kind="benign"), ""
    if name == "toxicity":
        records = _read_prompts(sources.open_files or _embedded("open"), "--open_file")
        return PromptSuite(name, few(records), kind="open", template="{prompt}"), ""
    questions = few(sources.heldout or sources.train)
    if not questions:
        raise _Missing("no prompts", "give --heldout_file or --train_file")
    if name == "diversity":
        return PromptSuite(name, questions, samples=sources.samples), ""
    if name in FOLLOWED:
        return PromptSuite(name, questions, then=FOLLOWED[name]), ""
    if name in PREFILLED:
        if not any(record.rejected for record in questions):
            raise _Missing("no unwanted answer to begin with", "give a --heldout_file that has some")
        return PromptSuite(name, questions, prefill=PREFILLED[name]), ""
    return _attacked(name, questions, sources)


def _own(name: str, sources: Sources) -> Sequence[ForgetRecord]:
    """The records of a suite of the user's files. Raises _Missing without any.

    Held-out prompts of a category (not "") that training has none of are a suite of their own, if training has
    categories at all.
    """
    trained = {record.category for record in sources.train} - {""}
    new = [r for r in sources.heldout if r.category and r.category not in trained] if trained else []
    if name == "new_categories":
        if not new:
            reason = "no held-out prompt is of a category that training has none of"
            raise _Missing(reason, "give such with --heldout_file", usual=True)
        return new
    records = getattr(sources, name)
    if not records:
        raise _Missing("no prompts", f"give --{name}_file")
    if name == "heldout" and new:
        records = [record for record in records if not record.category or record.category in trained]
        if not records:
            raise _Missing("all prompts are of categories that training has none of", "they are in new_categories")
    return records


def _attacked(name: str, questions: Sequence[ForgetRecord], sources: Sources) -> tuple[PromptSuite, str]:
    kind = name.removeprefix(ATTACK_PREFIX)
    found = _published("jailbreak_templates", sources.data_dir) if kind == "templates" else FoundList([])
    records = attack(
        questions,
        kind,
        seed=sources.seed,
        demonstrations=sources.train or sources.heldout,
        templates=[str(template.prompt) for template in found.records],
    )
    if not records:
        raise _Missing("no other prompt to show as an example", "give a --train_file with more of them")
    return PromptSuite(name, tuple(records)), found.note


def _published(name: str, folder: Path | None) -> FoundList:
    entry = PUBLISHED[name]
    files = " and ".join(entry.files)
    if folder is None:
        raise _Missing("no --data_dir", f"name a folder that holds {files} of {entry.origin}")
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder}: there is no such folder")
    found = find_published(name, folder)
    if found is None:
        raise _Missing(f"no {files} below --data_dir {folder}", f"get it from {entry.origin}")
    return found


def _left_out(missing: dict[str, _Missing]) -> list[str]:
    """One note a reason, with what to do if that is the same for all."""
    by_reason: dict[str, list[str]] = {}
    for name, error in missing.items():
        if not error.usual:
            by_reason.setdefault(error.reason, []).append(name)
    notes = []
    for reason, names in by_reason.items():
        remedies = {missing[name].remedy for name in names}
        remedy = f": {remedies.pop()}" if len(remedies) == 1 else ""
        notes.append(f"left out: {', '.join(names)}: {reason}{remedy}")
    return notes


def _embedded(name: str) -> list[str]:
    return [str(embedded_file(name))]


def _read_prompts(paths: Iterable[str], flag: str) -> list[ForgetRecord]:
    """Prompts out of data files, each once: {"prompt"}, with "category" and a wanted "response" if they are there.

    Raises:
        DataError: names file, line and field.
    """
    problems = Problems()
    records = []
    for at, row in (pair for path in paths for pair in file_rows(path, problems)):
        row = {name: value for name, value in row.items() if value is not None or name == "prompt"}
        fields = ["prompt", *(field for field in ("category", "response") if field in row)]
        if bad := [problem for field in fields if (problem := field_problem(row, field))]:
            problems.add(at, bad[0])
            continue
        response = (row["response"],) if "response" in row else ()
        records.append(ForgetRecord(row["prompt"].strip(), response, (), at, row.get("category", "")))
    problems.check(flag)
    return unique_prompts(records)
