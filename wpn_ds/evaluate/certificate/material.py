"""What the cells of a certificate are made of, out of the user's files."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from wpn_ds.data.records import ForgetRecord, prompt_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import can_judge
from wpn_ds.evaluate.certificate.cells import ASKED, Material
from wpn_ds.evaluate.certificate.command import UNWANTED, Options
from wpn_ds.evaluate.evaluation import asking_of, judges_of, origins_of, sources_of
from wpn_ds.evaluate.measurement import Plan
from wpn_ds.evaluate.paraphrases import paraphrased
from wpn_ds.evaluate.suites import ATTACK_PREFIX, PromptSuite, Sources, build_suites, resolve_suites, take
from wpn_ds.judging.base import Judge
from wpn_ds.models.load import Source


def material_of(options: Options, recorded: Mapping[str, Any], start: Source) -> tuple[Material, Judge, list[str]]:
    """(the material, the judge, notes on what is left out).

    Raises:
        UserError: there is nothing to ask, or a file or the judge won't do.
    """
    sources, retain = sources_of(options, origins_of(options, recorded))
    sources = replace(sources, train=_told_apart(sources.train), heldout=_told_apart(sources.heldout))
    questions = take(sources.heldout or sources.train, sources.limit, options.seed)
    if not questions:
        raise UserError("there are no prompts to ask: give --heldout_file")
    (judge,) = judges_of([options.judge], sources)
    if not can_judge(judge, PromptSuite(ASKED, tuple(questions))):
        raise UserError(f"--judge {judge.name}: can't say anything of the answers to these prompts: take another")
    attacks, notes = build_suites(resolve_suites("attacks"), sources)
    asked = [suite for suite in attacks if suite.name.startswith(ATTACK_PREFIX) and can_judge(judge, suite)]
    notes += [f"left out: {suite.name}: it asks other prompts" for suite in attacks if suite not in asked]
    asking = asking_of(options, recorded)
    probed = [record for record in questions if record.rejected and record.chosen]
    if probed and importlib.util.find_spec("sklearn") is None:
        probed, notes = [], [*notes, "left out: inside/probe: it needs scikit-learn: pip install 'wpn_ds[eval]'"]
    members, others = _members(sources, questions)
    material = Material(
        start=start,
        empty=Plan(
            options.folder / "answers",
            asking,
            limit=sources.limit,
            bf16=bool(options.bf16),
            shared=options.share_weights,
        ),
        questions=questions,
        attacks=asked,
        paraphrases=paraphrased(options.paraphrase_file, questions),
        taught=_taught(options, sources, questions),
        retain=take(retain, sources.limit, options.seed),
        benign=_benign(options, len(questions)),
        probed=probed,
        members=members,
        others=others,
    )
    return material, judge, notes


def _told_apart(records: Sequence[ForgetRecord]) -> list[ForgetRecord]:
    """With a source of its own each, by which a prompt is known in every cell: a file's line may hold several."""
    many = Counter(record.source for record in records)
    return [
        replace(record, source=f"{record.source}, record {at + 1}") if many[record.source] > 1 else record
        for at, record in enumerate(records)
    ]


def _taught(options: Options, sources: Sources, questions: Sequence[ForgetRecord]) -> dict[str, list[ForgetRecord]]:
    """By name the records of --relearn_file, read as --train_file is, or without it those that training forgot; only
    such as have unwanted answers.

    Raises:
        UserError: one of --relearn_file is asked, too.
    """
    asked = {prompt_text(record.prompt) for record in questions}
    found: dict[str, Sequence[ForgetRecord]] = {} if options.relearn_file else {UNWANTED: sources.train}
    for name, files in options.relearned.items():
        own = replace(options, train_file=files, heldout_file=[], attack_file=[], retain_file=[])
        found[name] = sources_of(own, origins_of(own, {}))[0].train
        if both := [record for record in found[name] if prompt_text(record.prompt) in asked]:
            named = f"--relearn_file {' '.join(files)}"
            raise UserError(f"{named}: {len(both)} of its prompts are asked, too, {both[0].source} first: leave it out")
    return {
        name: [record for record in records if record.rejected and prompt_text(record.prompt) not in asked]
        for name, records in found.items()
    }


def _members(sources: Sources, questions: Sequence[ForgetRecord]) -> tuple[list[ForgetRecord], list[ForgetRecord]]:
    """(records whose unwanted answers training forgot, those asked whose unwanted answers it never had)."""
    trained = {text for record in sources.train for text in record.rejected}
    others = [record for record in questions if record.rejected and record.rejected[0] not in trained]
    asked = {record.source for record in others}
    members = [record for record in sources.train if record.rejected and record.source not in asked]
    return take(members, sources.limit, sources.seed), others


def _benign(options: Options, count: int) -> Sequence[ForgetRecord]:
    """At most ``count`` harmless prompts."""
    sources = Sources(benign_files=options.benign_file, seed=options.seed, limit=count)
    (suite,), _ = build_suites(resolve_suites("over_refusal"), sources)
    return suite.records
