"""A certificate: cells on up to three models, on as many ranks as a launcher starts, and a page of what they found."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from wpn_ds import __version__
from wpn_ds.data.sources import Problems, data_files
from wpn_ds.errors import UserError
from wpn_ds.evaluate.certificate.cells import AS_IT_IS, INSIDE, Cell, cells
from wpn_ds.evaluate.certificate.command import Options
from wpn_ds.evaluate.certificate.figures import AFTER, Figures, HalfLife, Models, Row
from wpn_ds.evaluate.certificate.inside import InsideRow, Scores, inside_rows
from wpn_ds.evaluate.certificate.material import material_of
from wpn_ds.evaluate.certificate.page import certificate_page, certificate_table
from wpn_ds.evaluate.evaluation import origins_of, started_from
from wpn_ds.evaluate.measurement import Measurement
from wpn_ds.evaluate.model import AskedModel, device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, from_rank_0, join_ranks
from wpn_ds.evaluate.results import Evaluation
from wpn_ds.evaluate.separation import Separation
from wpn_ds.evaluate.training import read_settings
from wpn_ds.jobs.partitioned import gathered, let_go
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
    rank, size = join_ranks(options.share_weights)
    sources = from_rank_0(rank, size, lambda: {label: pinned(source) for label, source in sources.items()})
    with alone_in(options.folder / ".certify.lock", f"--output_dir {options.folder}", rank, size):
        material, judge, notes = material_of(options, recorded, sources["before"])
        made = cells(options, material)
        if options.share_weights:
            rounding = _unmoved(made, sources, shared=True)
        else:
            rounding = from_rank_0(rank, size, lambda: _unmoved(made, sources))
        found, inside = _measured(made, sources, judge, notes, rank, size)
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
            "inside": [_plain(row) for row in inside_rows(inside)],
            "answers": _digests(found, inside),
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
        again = replace(options.over(certificate["settings"]), share_weights=False)
        made_of, files = certificate["models"], sorted(certificate["files"].values())
        answers = certificate["answers"]
        told = {(row["cell"], row["what"]): row["harmful"] for row in certificate["rows"]}
        told |= {(row["cell"], row["what"]): row["tells"] for row in certificate["inside"]}
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
        material, judge, notes = material_of(again, recorded, sources["before"])
        found, inside = _measured(cells(again, material), sources, judge, notes, 0, 1)
    different = 0
    for cell, models in _digests(found, inside).items():
        for label, now in models.items():
            was = answers.get(cell, {}).get(label, [])
            same = sum(a == b for a, b in zip(now, was, strict=False))
            different += max(len(now), len(was)) - same
            what = "scores" if cell in inside else "answers"
            print(f"{cell}, {label}: {same} of {len(was)} {what} are the same")
    figures = {(row.cell, row.what): _written(row.harmful) for row in Figures(found, judge.name).rows()}
    figures |= {(row.cell, row.what): _written(row.tells) for row in inside_rows(inside)}
    others = [row for row, now in figures.items() if told.get(row) != now]
    for row in others:
        print(f"{' '.join(row)}: other figures than the certificate's")
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


def _measured(
    made: Sequence[Cell], sources: Mapping[str, Source], judge: Judge, notes: list[str], rank: int, size: int
) -> tuple[Mapping[str, Models], Mapping[str, Scores]]:
    """(by cell and model what was asked, what is inside); on rank 0, nothing on others. ``notes`` get what a reader
    should know."""
    found: dict[str, dict[str, Evaluation]] = {}
    inside: dict[str, dict[str, dict[str, Separation]]] = {}
    gc.freeze()  # garbage is collected after every model: what is there by now, the libraries, isn't looked through
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
                if cell.group == INSIDE:
                    inside.setdefault(cell.name, {})[label] = part.inside()
                else:
                    found.setdefault(cell.name, {})[label] = part.evaluation([judge])
                notes += [f"{label}: {note}" for note in part.notes]
    judge.check()
    return found, inside


def _unmoved(made: Sequence[Cell], sources: Mapping[str, Source], shared: bool = False) -> dict[str, dict[str, int]]:
    """By format that is asked for, how many weights unlearning moved, and how many of them keep their code; ``shared``:
    all ranks count together, on weights that they share.

    Raises:
        UserError: the two models are of different shapes.
    """
    asked = [name for name in FORMATS if any(cell.name.startswith(f"precision/{name}") for cell in made)]
    if not asked:
        return {}
    place = None if shared else "cpu"
    start, unlearned = (
        AskedModel(sources[label], bf16=False, device=place, shared=shared).load()[0] for label in ("before", AFTER)
    )
    try:
        counts = {name: unmoved(start, unlearned, FORMATS[name], gathered) for name in asked}
    except UserError as error:
        names = f"--baseline {sources['before'].name_or_path} and RUN {sources[AFTER].name_or_path}"
        raise UserError(f"{names}: {error}") from error
    if shared:
        del start, unlearned
        let_go()
    return {name: {"moved": moved, "same_code": kept} for name, (moved, kept) in counts.items()}


def _identified(source: Source) -> dict[str, Any]:
    """A model by the hashes of its files, an adapter's by those of what it makes of its base; one of the hub by its
    commit."""
    found = pinned(whole(source))
    if not (folder := Path(found.name_or_path)).is_dir():
        return {"name": source.name_or_path, "sha256": found.address}
    return {"name": source.name_or_path, "sha256": _sha256({path.name: path for path in own_files(folder)})}


def _sha256(files: Mapping[str, Path]) -> str:
    """Of the contents of files by name."""
    return hashlib.sha256(json.dumps({name: sha256(path) for name, path in files.items()}).encode()).hexdigest()


def _hashes(options: Options, recorded: Mapping[str, Any]) -> dict[str, str]:
    """By name, the hash of each file, or folder of save_to_disk, that prompts or answers are read of."""
    named = [path for origin in origins_of(options, recorded).values() for path in origin.named]
    taught = [path for paths in options.relearned.values() for path in paths]
    paths = [*named, *taught, *options.benign_file, *options.paraphrase_file]
    found = {Path(file) for path in paths for file in data_files(path, Problems())}
    hashes = {str(path): sha256(path) for path in sorted(found) if path.is_file()}
    for folder in (path for path in sorted(found) if path.is_dir()):
        inside = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        hashes[str(folder)] = _sha256(inside)
    return hashes


def _digests(found: Mapping[str, Models], inside: Mapping[str, Scores]) -> dict[str, dict[str, list[str]]]:
    """By cell and model, a hash of each answer, or score, in the order in which they were asked."""
    said = {
        cell: {
            label: [answer.answer for suite in evaluation.suites.values() for answer in suite.answers]
            for label, evaluation in models.items()
        }
        for cell, models in found.items()
    }
    said |= {
        cell: {
            label: [repr(score) for separation in scores.values() for score in separation.scores]
            for label, scores in models.items()
        }
        for cell, models in inside.items()
    }
    return {
        cell: {
            label: [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] for label, texts in models.items()
        }
        for cell, models in said.items()
    }


def _plain(row: Row | HalfLife | InsideRow) -> dict[str, Any]:
    """As JSON."""
    return {entry.name: _written(getattr(row, entry.name)) for entry in fields(row)}


def _written(value: Any) -> Any:
    """As JSON; a rate has its bounds written down."""
    if isinstance(value, Mapping):
        return {name: _written(each) for name, each in value.items()}
    if isinstance(value, Rate | Estimate):
        return {"n": value.n, "value": value.value, "low": value.low, "high": value.high}
    return value
