"""A certificate: cells on up to three models, on as many ranks as a launcher starts, and a page of what they found."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.data.embedded import embedded_file
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, can_judge
from wpn_ds.evaluate.certificate.cells import AS_IT_IS, Cell, Material, cells
from wpn_ds.evaluate.certificate.command import Options
from wpn_ds.evaluate.certificate.figures import AFTER, Models, half_lives, rows
from wpn_ds.evaluate.certificate.page import certificate_page, certificate_table
from wpn_ds.evaluate.command import JUDGES
from wpn_ds.evaluate.evaluation import origins_of, sources_of, started_from
from wpn_ds.evaluate.judges import make_judges
from wpn_ds.evaluate.measurement import Measurement, Plan
from wpn_ds.evaluate.model import device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, from_rank_0, join_ranks
from wpn_ds.evaluate.suites import Sources, build_suites, resolve_suites, take
from wpn_ds.evaluate.training import read_settings
from wpn_ds.judging.base import Judge
from wpn_ds.models.folder import check_place, own_files
from wpn_ds.models.load import Source, pinned
from wpn_ds.models.rounding import FORMATS, unmoved
from wpn_ds.system.files import sha256, write_atomically

CERTIFICATE, PAGE = "certificate.json", "certificate.html"
_ATTACKS = "attacks"


def certify(options: Options) -> int:
    """Measure every cell on every model; writes the certificate and prints its table.

    Raises:
        UserError: a model, a file, an attack or a judge is missing or bad, before anything is generated.
    """
    recorded, sources = _models(options)
    rank, size = join_ranks()
    if size > 1:
        sources = from_rank_0(rank, size, lambda: {label: pinned(source) for label, source in sources.items()})
    with alone_in(options.folder / ".certify.lock", f"--output_dir {options.folder}", rank, size):
        made, judges, notes = _cells(options, recorded, sources["before"])
        found = _measured(made, sources, judges, rank, size)
        if rank:
            return 0
        certificate = {
            "wpn_ds_version": __version__,
            "settings": options.settings(),
            "models": {label: _identified(source) for label, source in sources.items()},
            "files": _hashes(options, recorded),
            "device": device().type,
            "judges": [{"name": judge.name, **judge.describe()} for judge in judges],
            "notes": notes,
            "rounding": _unmoved(made, sources),
            "rows": [_plain(row) for row in rows(found)],
            "half_lives": [_plain(one) for one in half_lives(found)],
            "answers": {cell: {label: _digests(one) for label, one in of.items()} for cell, of in found.items()},
        }
        text = json.dumps(certificate, indent=1, ensure_ascii=False, default=str) + "\n"
        write_atomically(options.folder / CERTIFICATE, text)
        page = write_atomically(options.folder / PAGE, certificate_page(certificate))
    print(certificate_table(certificate))
    print(f"\n{page}")
    return 0


def check(options: Options) -> int:
    """Measure ``--cells`` cells of the certificate ``--check`` again, elsewhere, and compare answer by answer; 1 if any
    answer differs.

    Raises:
        UserError: it is no certificate, or its models or files are not those that it was made of.
    """
    assert options.check is not None
    certificate = _read(options.check)
    try:
        stored = {name: _as_path(name, value) for name, value in certificate["settings"].items()}
        again = Options(**stored)
        made_of, answers, named = certificate["models"], certificate["answers"], certificate["files"]
    except (KeyError, TypeError) as error:
        raise UserError(f"--check {options.check}: not a certificate of this version ({__version__})") from error
    recorded, sources = _models(again)
    for label, source in sources.items():
        if _identified(source)["sha256"] != made_of[label]["sha256"]:
            raise UserError(f"--check {options.check}: {source.name_or_path} is another model than the one certified")
    if (now := _hashes(again, recorded)) != named:
        differ = sorted(name for name in now.keys() | named.keys() if now.get(name) != named.get(name))
        raise UserError(f"--check {options.check}: {', '.join(differ)} changed since it was made")
    places = [name for name in answers if name != AS_IT_IS]
    step = max(1, len(places) // options.cells)
    chosen = places[::step][: options.cells]
    different = 0
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        made, judges, _ = _cells(replace(again, output_dir=Path(folder), attack=chosen), recorded, sources["before"])
        found = _measured([cell for cell in made if cell.name in chosen], sources, judges, 0, 1)
    for cell, models in found.items():
        for label, evaluation in models.items():
            pairs = list(zip(_digests(evaluation), answers[cell][label], strict=False))
            same = sum(a == b for a, b in pairs)
            different += len(answers[cell][label]) - same
            print(f"{cell}, {label}: {same} of {len(answers[cell][label])} answers are the same")
    return int(different > 0)


def _models(options: Options) -> tuple[dict[str, Any], dict[str, Source]]:
    """(the settings that training left, the models by what the table calls them)."""
    name = str(options.run)
    recorded = read_settings(options.run)
    sources = {"original": Source(options.original, "--original")} if options.original else {}
    baseline, revision = options.baseline, None
    if baseline == "auto":
        baseline, revision = started_from(name, recorded)
    sources |= {"before": Source(baseline, "--baseline", revision), AFTER: Source(name, "RUN")}
    for source in sources.values():
        check_place(source.flag, source.name_or_path)
    return recorded, sources


def _cells(options: Options, recorded: Mapping[str, Any], start: Source) -> tuple[list[Cell], list[Judge], list[str]]:
    """(what is measured, the judges, notes on what is left out)."""
    sources, retain = sources_of(options, origins_of(options, recorded))
    suites, notes = build_suites(resolve_suites(options.suite), sources)
    attacks, left_out = build_suites(resolve_suites(_ATTACKS), sources)
    notes += left_out
    questions = take(sources.heldout or sources.train, sources.limit, options.seed)
    taught = [record for record in _taught(options, sources) if record.rejected]
    if overlap := {str(r.prompt) for r in taught} & {str(r.prompt) for r in questions}:
        named = f"--relearn_file {' '.join(options.relearn_file)}" if options.relearn_file else "--train_file"
        raise UserError(
            f"{named}: {len(overlap)} of its prompts are asked, too, {min(overlap)[:60]!r} first: leave out"
        )
    records = [*sources.train, *sources.heldout, *sources.attack]
    judges = make_judges(
        options.judge or JUDGES,
        wanted=[text for record in records for text in record.chosen],
        unwanted=[text for record in records for text in record.rejected],
        seed=options.seed,
        device=device(),
    )
    asking = Asking(
        options.style(recorded),
        max_new_tokens=options.max_new_tokens or Asking.max_new_tokens,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    bf16 = bool(recorded.get("bf16")) if options.bf16 is None else options.bf16
    material = Material(
        start=start,
        empty=Plan(options.folder / "answers", asking, bf16=bf16, limit=sources.limit),
        suites=[suite for suite in suites if any(can_judge(judge, suite) for judge in judges)],
        attacks=[suite for suite in attacks if any(can_judge(judge, suite) for judge in judges)],
        questions=questions,
        taught=taught,
        retain=take(retain, sources.limit, options.seed),
        benign=_benign(options, len(questions)),
    )
    if not material.suites:
        raise UserError(f"--suite {options.suite}: no judge can say anything of its answers: add another --judge")
    return cells(options, material), judges, notes


def _taught(options: Options, sources: Sources) -> Sequence[Any]:
    """The records of --relearn_file, read as --train_file is, or without it those that training forgot."""
    if not options.relearn_file:
        asked = {str(record.prompt) for record in sources.heldout or sources.train}
        return [record for record in sources.train if str(record.prompt) not in asked]
    own = replace(options, train_file=options.relearn_file, heldout_file=[], attack_file=[], retain_file=[])
    return sources_of(own, origins_of(own, {}))[0].train


def _benign(options: Options, count: int) -> Sequence[Any]:
    """As many harmless prompts as there are questions."""
    files = options.benign_file or [str(embedded_file("benign"))]
    (suite,), _ = build_suites(resolve_suites("over_refusal"), Sources(benign_files=files, seed=options.seed))
    return take(suite.records, count, options.seed)


def _measured(
    made: Sequence[Cell], sources: Mapping[str, Source], judges: Sequence[Judge], rank: int, size: int
) -> Mapping[str, Models]:
    """By cell and model, what was measured; on rank 0, nothing on others."""
    found: dict[str, dict[str, Any]] = {}
    for at, cell in enumerate(made):
        if rank == 0:
            print(f"{at + 1} of {len(made)} cells: {cell.name}", file=sys.stderr, flush=True)
        for label, source in sources.items():
            part = Measurement(f"{cell.name}, {label}", source, cell.plan, cell.treatment)
            part.work(rank, size)
            all_arrived(size)
            if rank == 0:
                found.setdefault(cell.name, {})[label] = part.evaluation(judges)
    for judge in judges:
        judge.check()
    return found


def _unmoved(made: Sequence[Cell], sources: Mapping[str, Source]) -> dict[str, dict[str, int]]:
    """By format that is asked for, of the weights that unlearning moved, how many keep their code."""
    asked = [name for name in FORMATS if any(cell.name == f"precision/{name}" for cell in made)]
    if not asked:
        return {}
    from wpn_ds.evaluate.model import AskedModel

    start, unlearned = (AskedModel(sources[label], bf16=False, device="cpu").load()[0] for label in ("before", AFTER))
    counts = {name: unmoved(start, unlearned, FORMATS[name]) for name in asked}
    return {name: {"moved": moved, "same_code": kept} for name, (moved, kept) in counts.items()}


def _identified(source: Source) -> dict[str, Any]:
    """A model by the hashes of its own files, or by its commit on the hub."""
    folder = Path(source.name_or_path)
    if not folder.is_dir():
        return {"name": source.name_or_path, "sha256": pinned(source).address}
    files = {path.name: sha256(path) for path in own_files(folder)}
    return {"name": source.name_or_path, "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def _hashes(options: Options, recorded: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each file that prompts or answers are read of, by its name."""
    named = {path for origin in origins_of(options, recorded).values() for path in origin.named or []}
    paths = [Path(path) for path in sorted({*map(str, named), *options.relearn_file, *options.benign_file})]
    return {str(path): sha256(path) for path in paths if path.is_file()}


def _digests(evaluation: Any) -> list[str]:
    """A hash of each answer, in the order in which they were asked."""
    answers = (answer for suite in evaluation.suites.values() for answer in suite.answers)
    return [hashlib.sha256(answer.answer.encode()).hexdigest()[:16] for answer in answers]


def _plain(row: Any) -> dict[str, Any]:
    """A row as JSON; a rate has its bounds written down."""

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: written(each) for name, each in value.items()}
        if hasattr(value, "low"):
            return {"n": value.n, "value": value.value, "low": value.low, "high": value.high}
        return value

    return {name: written(getattr(row, name)) for name in asdict(row)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--check {path}: can't be read ({error})") from error
    return found


def _as_path(name: str, value: Any) -> Any:
    return Path(value) if name in ("run", "data_dir") and value is not None else value
