"""A certificate: cells on up to three models, on as many ranks as a launcher starts, and a page of what they found."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.data.records import ForgetRecord, prompt_text
from wpn_ds.data.sources import Problems, data_files
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import can_judge
from wpn_ds.evaluate.certificate.cells import AS_IT_IS, ASKED, Cell, Material, cells
from wpn_ds.evaluate.certificate.command import Options
from wpn_ds.evaluate.certificate.figures import AFTER, Figures, HalfLife, Models, Row
from wpn_ds.evaluate.certificate.page import certificate_page, certificate_table
from wpn_ds.evaluate.evaluation import asking_of, judges_of, origins_of, sources_of, started_from
from wpn_ds.evaluate.measurement import Measurement, Plan
from wpn_ds.evaluate.model import AskedModel, device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, from_rank_0, join_ranks
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.suites import ATTACK_PREFIX, PromptSuite, Sources, build_suites, resolve_suites, take
from wpn_ds.evaluate.training import read_settings
from wpn_ds.judging.base import Judge
from wpn_ds.judging.statistics import Estimate, Rate
from wpn_ds.models.adapters import whole
from wpn_ds.models.folder import check_place, own_files
from wpn_ds.models.load import Source, pinned
from wpn_ds.models.rounding import FORMATS, unmoved
from wpn_ds.system.files import sha256, write_atomically

CERTIFICATE, PAGE = "certificate.json", "certificate.html"


def certify(options: Options) -> int:
    """Measure every cell on every model; writes the certificate and prints its table.

    Raises:
        UserError: a model, a file, an attack or a judge is missing or bad, before anything is generated.
    """
    options, recorded, sources = _resolved(options)
    rank, size = join_ranks()
    sources = from_rank_0(rank, size, lambda: {label: pinned(source) for label, source in sources.items()})
    with alone_in(options.folder / ".certify.lock", f"--output_dir {options.folder}", rank, size):
        made, judge, notes = _cells(options, recorded, sources["before"])
        rounding = from_rank_0(rank, size, lambda: _unmoved(made, sources))
        found = _measured(made, sources, judge, notes, rank, size)
        if rank:
            return 0
        figures = Figures(found, judge.name)
        certificate = {
            "wpn_ds_version": __version__,
            "settings": options.settings(),
            "models": {label: _identified(source) for label, source in sources.items()},
            "files": _hashes(options, recorded),
            "device": device().type,
            "judge": {"name": judge.name, **judge.describe()},
            "notes": list(dict.fromkeys(notes)),
            "rounding": rounding,
            "rows": [_plain(row) for row in figures.rows()],
            "half_lives": [_plain(one) for one in figures.half_lives()],
            "answers": _digests(found),
        }
        text = json.dumps(certificate, indent=1, ensure_ascii=False, default=str) + "\n"
        write_atomically(options.folder / CERTIFICATE, text)
        page = write_atomically(options.folder / PAGE, certificate_page(certificate))
    print(certificate_table(certificate))
    print(f"\n{page}")
    return 0


def check(options: Options) -> int:
    """Measure cells of the certificate ``--check`` again, elsewhere, and compare; 1 if an answer or a figure differs.

    Raises:
        UserError: it is no certificate, or its models or files are not those that it was made of.
    """
    where = f"--check {options.check}"
    try:
        certificate = json.loads(Path(str(options.check)).read_text(encoding="utf-8"))
        again = options.over(certificate["settings"])
        made_of, files = certificate["models"], sorted(certificate["files"].values())
        answers, told = certificate["answers"], {(row["cell"], row["what"]): row for row in certificate["rows"]}
        hashes = {label: one["sha256"] for label, one in made_of.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: can't be read ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a certificate of this version ({__version__})") from error
    again, recorded, sources = _resolved(again)
    if join_ranks()[1] > 1:
        raise UserError("--check: measures a few cells in one process: start it without a launcher")
    for label, source in sources.items():
        if _identified(source)["sha256"] != hashes.get(label):
            raise UserError(f"{where}: {source.name_or_path} is another model than the one certified")
    if sorted(_hashes(again, recorded).values()) != files:
        raise UserError(f"{where}: the data files are not those that it was made of")
    drawn = random.SystemRandom().sample(sorted(answers.keys() - {AS_IT_IS}), min(options.cells, len(answers) - 1))
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        again = replace(again, output_dir=Path(folder), attack=options.attack or drawn)
        made, judge, notes = _cells(again, recorded, sources["before"])
        found = _measured(made, sources, judge, notes, 0, 1)
    different = 0
    for cell, models in _digests(found).items():
        for label, now in models.items():
            was = answers.get(cell, {}).get(label, [])
            same = sum(a == b for a, b in zip(now, was, strict=False))
            different += max(len(now), len(was)) - same
            print(f"{cell}, {label}: {same} of {len(was)} answers are the same")
    rows = [_plain(row) for row in Figures(found, judge.name).rows()]
    others = [row for row in rows if told.get((row["cell"], row["what"]), {}).get("harmful") != row["harmful"]]
    for row in others:
        print(f"{row['cell']} {row['what']}: other figures than the certificate's")
    return int(bool(different or others))


def _resolved(options: Options) -> tuple[Options, dict[str, Any], dict[str, Source]]:
    """(the options with what the run recorded in the place of what wasn't given, all that it recorded, the models by
    what the table calls them).

    Raises:
        UserError: a model isn't there.
    """
    name = str(options.run)
    if not options.run.is_dir() and options.output_dir is None:
        raise UserError(f"RUN {name}: there is no such folder; with a model of the hub give --output_dir")
    recorded, revision = read_settings(options.run), None
    if options.baseline == "auto":
        baseline, revision = started_from(name, recorded)
        options = replace(options, baseline=baseline)
    if options.bf16 is None:
        options = replace(options, bf16=bool(recorded.get("bf16")))
    sources = {"original": Source(options.original, "--original")} if options.original else {}
    sources |= {"before": Source(options.baseline, "--baseline", revision), AFTER: Source(name, "RUN")}
    for source in sources.values():
        check_place(source.flag, source.name_or_path)
    return options, recorded, sources


def _cells(options: Options, recorded: Mapping[str, Any], start: Source) -> tuple[list[Cell], Judge, list[str]]:
    """(what is measured, the judge, notes on what is left out)."""
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
    material = Material(
        start=start,
        empty=Plan(options.folder / "answers", asking, bf16=bool(options.bf16), limit=sources.limit),
        questions=questions,
        attacks=asked,
        taught=_taught(options, sources, questions),
        retain=take(retain, sources.limit, options.seed),
        benign=_benign(options, len(questions)),
    )
    return cells(options, material), judge, notes


def _told_apart(records: Sequence[ForgetRecord]) -> list[ForgetRecord]:
    """With a source of its own each, by which a prompt is known in every cell: a file's line may hold several."""
    many = Counter(record.source for record in records)
    return [
        replace(record, source=f"{record.source}, record {at + 1}") if many[record.source] > 1 else record
        for at, record in enumerate(records)
    ]


def _taught(options: Options, sources: Sources, questions: Sequence[ForgetRecord]) -> list[ForgetRecord]:
    """The records of --relearn_file, read as --train_file is, or without it those that training forgot; only such as
    have unwanted answers.

    Raises:
        UserError: one of --relearn_file is asked, too.
    """
    asked = {prompt_text(record.prompt) for record in questions}
    records: Sequence[ForgetRecord] = sources.train
    if options.relearn_file:
        own = replace(options, train_file=options.relearn_file, heldout_file=[], attack_file=[], retain_file=[])
        records = sources_of(own, origins_of(own, {}))[0].train
        if both := [record for record in records if prompt_text(record.prompt) in asked]:
            named = f"--relearn_file {' '.join(options.relearn_file)}"
            raise UserError(f"{named}: {len(both)} of its prompts are asked, too, {both[0].source} first: leave it out")
    return [record for record in records if record.rejected and prompt_text(record.prompt) not in asked]


def _benign(options: Options, count: int) -> Sequence[ForgetRecord]:
    """At most ``count`` harmless prompts."""
    sources = Sources(benign_files=options.benign_file, seed=options.seed, limit=count)
    (suite,), _ = build_suites(resolve_suites("over_refusal"), sources)
    return suite.records


def _measured(
    made: Sequence[Cell], sources: Mapping[str, Source], judge: Judge, notes: list[str], rank: int, size: int
) -> Mapping[str, Models]:
    """By cell and model, what was measured; on rank 0, nothing on others. ``notes`` get what a reader should know."""
    found: dict[str, dict[str, Evaluation]] = {}
    for at, cell in enumerate(made):
        if rank == 0:
            print(f"{at + 1} of {len(made)} cells: {cell.name}", file=sys.stderr, flush=True)
        for label, source in sources.items():
            if cell.alone and label != AFTER:
                continue
            part = Measurement(f"{cell.name}, {label}", source, cell.plan, cell.treatment)
            part.work(rank, size)
            all_arrived(size)
            if rank == 0:
                found.setdefault(cell.name, {})[label] = part.evaluation([judge])
                notes += [f"{label}: {note}" for note in part.notes]
    judge.check()
    return found


def _unmoved(made: Sequence[Cell], sources: Mapping[str, Source]) -> dict[str, dict[str, int]]:
    """By format that is asked for, how many weights unlearning moved, and how many of them keep their code.

    Raises:
        UserError: the two models are of different shapes.
    """
    asked = [name for name in FORMATS if any(cell.name.startswith(f"precision/{name}") for cell in made)]
    if not asked:
        return {}
    start, unlearned = (AskedModel(sources[label], bf16=False, device="cpu").load()[0] for label in ("before", AFTER))
    try:
        counts = {name: unmoved(start, unlearned, FORMATS[name]) for name in asked}
    except UserError as error:
        names = f"--baseline {sources['before'].name_or_path} and RUN {sources[AFTER].name_or_path}"
        raise UserError(f"{names}: {error}") from error
    return {name: {"moved": moved, "same_code": kept} for name, (moved, kept) in counts.items()}


def _identified(source: Source) -> dict[str, Any]:
    """A model by the hashes of its files, an adapter's by those of what it makes of its base; one of the hub by its
    commit."""
    found = pinned(whole(source))
    if not (folder := Path(found.name_or_path)).is_dir():
        return {"name": source.name_or_path, "sha256": found.address}
    files = {path.name: sha256(path) for path in own_files(folder)}
    return {"name": source.name_or_path, "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _hashes(options: Options, recorded: Mapping[str, Any]) -> dict[str, str]:
    """By name, the hash of each file that prompts or answers are read of."""
    named = [path for origin in origins_of(options, recorded).values() for path in origin.named]
    paths = [*named, *options.relearn_file, *options.benign_file]
    found = {Path(file) for path in paths for file in data_files(path, Problems())}
    return {str(path): sha256(path) for path in sorted(found) if path.is_file()}


def _digests(found: Mapping[str, Models]) -> dict[str, dict[str, list[str]]]:
    """By cell and model, a hash of each answer, in the order in which they were asked."""
    return {
        cell: {
            label: [
                hashlib.sha256(answer.answer.encode()).hexdigest()[:16]
                for suite in evaluation.suites.values()
                for answer in suite.answers
            ]
            for label, evaluation in models.items()
        }
        for cell, models in found.items()
    }


def _plain(row: Row | HalfLife) -> dict[str, Any]:
    """As JSON; a rate has its bounds written down."""

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: written(each) for name, each in value.items()}
        if isinstance(value, Rate | Estimate):
            return {"n": value.n, "value": value.value, "low": value.low, "high": value.high}
        return value

    return {entry.name: written(getattr(row, entry.name)) for entry in fields(row)}
