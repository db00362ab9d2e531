"""An evaluation: one model, or a model against its baseline, on as many ranks as a launcher starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.origins import Origin, Part, origin_of
from wpn_ds.data.records import ForgetRecord, RetainRecord, merged_by_prompt, read_forget, read_retain
from wpn_ds.data.shapes import columns_of
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, can_judge
from wpn_ds.evaluate.command import JUDGES, AskedFlags, Options
from wpn_ds.evaluate.judges import make_judges
from wpn_ds.evaluate.measurement import Measurement, Plan
from wpn_ds.evaluate.model import device
from wpn_ds.evaluate.ranks import all_arrived, alone_in, from_rank_0, join_ranks
from wpn_ds.evaluate.recall.task import recall_task
from wpn_ds.evaluate.relearning import Lessons
from wpn_ds.evaluate.report.files import write_report
from wpn_ds.evaluate.report.table import format_table
from wpn_ds.evaluate.suites import PromptSuite, Selection, Sources, build_suites, resolve_suites, take
from wpn_ds.evaluate.tofu.data import write_log
from wpn_ds.evaluate.tofu.task import tofu_task
from wpn_ds.evaluate.training import read_settings
from wpn_ds.evaluate.utility import available_utility
from wpn_ds.judging.base import Judge
from wpn_ds.models.folder import check_place
from wpn_ds.models.load import Source, pinned
from wpn_ds.models.planted import PLANTED, is_planted
from wpn_ds.system.files import unusable

RECORDS = ("train", "heldout", "attack", "retain")
SETTINGS = (
    "model",
    "baseline",
    "suite",
    "batch_size",
    "samples",
    "temperature",
    "top_p",
    "seed",
    "utility",
    "relearn_steps",
    "relearn_learning_rate",
    "relearn_lora_r",
)


def evaluate(options: Options) -> int:
    """Evaluates, prints the before/after table and names the report.

    Raises:
        UserError: a model, a file, a suite or a judge is missing or bad, before anything is generated.
    """
    recorded, revision = read_settings(Path(options.model)), None
    if options.baseline == "auto":
        baseline, revision = started_from(options.model, recorded)
        options = replace(options, baseline=baseline)
    sources = {"after": Source(options.model, "--model")}
    if options.baseline:
        sources = {"before": Source(options.baseline, "--baseline", revision), **sources}
    for source in sources.values():
        check_place(source.flag, source.name_or_path)
    rank, size = join_ranks(options.share_weights)
    if size > 1:  # one commit for all ranks, should it change in between
        sources = from_rank_0(rank, size, lambda: {label: pinned(source) for label, source in sources.items()})
    with alone_in(options.output_dir / ".evaluate.lock", f"--output_dir {options.output_dir}", rank, size):
        return _evaluate(options, recorded, sources, rank, size)


def _evaluate(options: Options, recorded: dict[str, Any], sources: Mapping[str, Source], rank: int, size: int) -> int:
    try:
        plan, notes, settings, judges = _prepare(options, recorded, rank, size)
        parts = {label: Measurement(label, source, plan) for label, source in sources.items()}
        for name, suites in resolve_suites(options.suite).named.items():
            if parts["after"].unasked >= set(suites):
                raise UserError(f"--suite {name}: no unwanted answer has more tokens than are begun with")
        if (read := parts["after"].first_prompt) is not None:
            settings["first_prompt"] = read
            if rank == 0:
                print(f"the first prompt as {options.model} reads it: {read!r}", file=sys.stderr, flush=True)
        for part in parts.values():
            part.work(rank, size)
            all_arrived(size)
        if rank:
            return 0
        for label, source in sources.items():
            if (address := parts[label].address) != source.name_or_path:
                settings[source.flag.removeprefix("--")] = address
        notes += [f"{label}: {note}" for label, part in parts.items() for note in part.notes]
        evaluations = {label: part.evaluation(judges) for label, part in parts.items()}
        for judge in judges:
            judge.check()
        for label, part in parts.items():
            if plan.tofu and (log := part.tofu_log()):
                log = plan.tofu.judged(log)
                evaluations[label] = replace(evaluations[label], tofu=plan.tofu.figures(log))
                if label == "after":
                    write_log(options.output_dir, log)
                settings["tofu"] = plan.tofu.settings()
            if plan.recall:
                if label == "after" and (scores := part.membership()):
                    scores.write(options.output_dir)
                settings["recall"] = plan.recall.settings()
        described = [{"name": judge.name, **judge.describe()} for judge in judges]
        page = write_report(
            options.output_dir,
            evaluations.get("before"),
            evaluations["after"],
            settings=settings,
            judges=described,
            notes=notes,
            metrics_jsonl=Path(options.model) / "metrics.jsonl",
        )
    except OSError as error:  # a full disk, a folder that can't be written
        if error.filename is None and error.errno is None:
            raise
        where = error.filename or options.output_dir
        raise unusable(f"what is done so far is kept, but {where}", error) from error
    print(format_table(evaluations.get("before"), evaluations["after"], described))
    print(f"\n{page}")
    return 0


def _prepare(
    options: Options, recorded: dict[str, Any], rank: int, size: int
) -> tuple[Plan, list[str], dict[str, Any], list[Judge]]:
    """(what is measured, notes on what was left out, the settings for the report, the judges, none of which has
    loaded a model yet)."""
    selection = resolve_suites(options.suite)
    origins = origins_of(options, recorded)
    sources, retain = sources_of(options, origins)
    suites, notes = build_suites(selection, sources)
    asked, limit = selection.suites, sources.limit or selection.limit
    benchmarks: dict[str, str] = {}
    if "utility" in asked or options.utility:
        benchmarks, left_out = available_utility(options.utility, options.data_dir)
        notes += left_out
    taught = [record for record in sources.train or sources.heldout if record.rejected]
    held = take(sources.heldout or sources.train, limit, options.seed)
    tofu = tofu_task(options, options.max_new_tokens, limit, device())
    recall = recall_task(options, limit)
    empty = {
        "depth": not any(record.rejected for record in held) and "no unwanted answers: give --heldout_file",
        "retain": not retain and "no retain records: give --retain_file",
        "relearning": not taught and "no unwanted answers to teach: give --train_file",
        "utility": not benchmarks and "none of its tasks can be measured here: give --data_dir",
        "muse": not options.muse_dir and "no --muse_dir: name the folder of one corpus of MUSE",
        "rwku": not options.rwku_dir and "no --rwku_dir: name a folder with RWKU's published files",
        "tofu": not tofu and "no --tofu_dir: name a folder with TOFU's published files",
    }
    for name, reason in empty.items():
        if name in asked and reason:
            if name in selection.named:
                raise UserError(f"--suite {name}: {reason}")
            notes.append(f"left out: {name}: {reason}")
    judges = judges_of(options.judge or JUDGES, sources)
    suites, unjudged = _judged(suites, judges, selection)
    notes += unjudged
    relearned = PromptSuite("relearning", tuple(held))
    steps = [0, *sorted(set(options.relearn_steps))]
    rate, rank = options.relearn_learning_rate, options.relearn_lora_r
    lessons = Lessons(taught, relearned, steps, rate, options.seed, rank)
    plan = Plan(
        answers=options.output_dir / "answers",
        asking=asking_of(options, recorded),
        suites=suites,
        retain=take(retain, limit, options.seed) if "retain" in asked else (),
        depth=held if "depth" in asked else (),
        lessons=lessons if "relearning" in asked and not empty["relearning"] else None,
        # whether the hub can be reached may differ from node to node
        benchmarks=from_rank_0(rank, size, lambda: benchmarks),
        data_dir=options.data_dir,
        limit=limit,
        tofu=tofu,
        recall=recall,
        bf16=bool(recorded.get("bf16")) if options.bf16 is None else options.bf16,
        shared=options.share_weights,
    )
    return plan, notes, _settings(options, origins, plan, size), judges


def _settings(options: Options, origins: Mapping[str, Origin], plan: Plan, size: int) -> dict[str, Any]:
    """What the figures depend on, for the report."""
    files = {name: origin.named for name, origin in origins.items()} or dict.fromkeys(RECORDS)
    files |= {"benign": options.benign_file, "open": options.open_file}
    return {
        **{name: getattr(options, name) for name in SETTINGS},
        "max_new_tokens": plan.asking.max_new_tokens,
        "prompt_template": plan.asking.style.template,
        "system_prompt": plan.asking.style.system_prompt,
        "prompts_a_suite": plan.limit or "all",
        "dtype": "bfloat16" if plan.bf16 else "float32",
        "device": device().type,
        "ranks": size,
        "files": {name: given or "embedded" for name, given in files.items()},
        "data_dir": str(options.data_dir) if options.data_dir else None,
    }


def _judged(
    suites: Sequence[PromptSuite], judges: Sequence[Judge], selection: Selection
) -> tuple[list[PromptSuite], list[str]]:
    """(the suites that a judge can say something of, notes on the others).

    Raises:
        UserError: that is none of what the user named.
    """
    kept = [suite for suite in suites if any(can_judge(judge, suite) for judge in judges)]
    lost = [suite.name for suite in suites if suite not in kept]
    names = " ".join(judge.name for judge in judges)
    reason = f"no judge of {names} can say anything of its answers: add --judge local:DIR, hf:NAME or resemblance"
    for name in selection.named:
        if name in lost:
            raise UserError(f"--suite {name}: {reason}")
    return kept, [f"left out: {', '.join(lost)}: {reason}"] if lost else []


def started_from(model: str, recorded: Mapping[str, Any]) -> tuple[str, str | None]:
    """(the model that the training of ``model`` started from, its revision), by what training has recorded.

    Raises:
        UserError: nothing was recorded.
    """
    if "model_name_or_path" not in recorded:
        raise UserError(
            f"--baseline auto: {Path(model) / 'run.yaml'}, which training leaves beside its model, "
            f"{'has no model_name_or_path' if recorded else 'is not there'}: name the model that it started from"
        )
    name = recorded["model_name_or_path"]
    if name is None:  # the demo's own, which lies where the demo was started
        roots = (Path(), *Path(model).absolute().parents)
        return str(next((root / PLANTED for root in roots if is_planted(root / PLANTED)), PLANTED)), None
    return str(name), recorded.get("model_revision")


def origins_of(options: AskedFlags, recorded: Mapping[str, Any]) -> dict[str, Origin]:
    """Where the records of train, heldout, attack and retain are: what the flags name, else the data of the run that
    made the model. None at all stands for the embedded ones."""
    columns = {"retain": columns_of(options.retain_columns, "--retain_columns")}
    others = columns_of(options.columns, "--columns")
    found = {
        name: Origin(
            getattr(options, f"{name}_file"),
            columns=columns.get(name, others),
            prefix="retain_" if name == "retain" else "",
        )
        for name in RECORDS
    }
    if not any(origin.named for origin in found.values()):
        parts: dict[str, Part] = {"train": "train", "heldout": "validation", "retain": "retain"}
        found = {name: origin_of(recorded, part) for name, part in parts.items()}
    return {name: origin for name, origin in found.items() if origin.named}


def judges_of(specs: Sequence[str], sources: Sources) -> list[Judge]:
    """The judges that ``--judge`` names; resemblance is to the answers of all of the user's records."""
    records = [*sources.train, *sources.heldout, *sources.attack]
    return make_judges(
        specs,
        wanted=[text for record in records for text in record.chosen],
        unwanted=[text for record in records for text in record.rejected],
        seed=sources.seed,
        device=device(),
    )


def asking_of(options: AskedFlags, recorded: Mapping[str, Any]) -> Asking:
    """How prompts are asked: as the flags say, or as the training that ``recorded`` is of asked them."""
    return Asking(
        options.style(recorded),
        max_new_tokens=options.max_new_tokens or Asking.max_new_tokens,
        batch_size=options.batch_size,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )


def _asked(origin: Origin) -> list[ForgetRecord]:
    """What has a prompt, each once: for plain text nothing can be asked."""
    return merged_by_prompt(record for record in read_forget(origin, alone=True, plain=True) if record.prompt)


def sources_of(options: AskedFlags, origins: Mapping[str, Origin]) -> tuple[Sources, list[RetainRecord]]:
    """The records that are asked or that suites are made of, and those to retain."""
    if not origins:
        demo = {"train": "forget", "heldout": "heldout", "attack": "attack", "retain": "retain"}
        origins = {name: Origin([embedded_file(file)]) for name, file in demo.items()}
    forget = {name: _asked(origins.get(name, Origin())) for name in ("train", "heldout", "attack")}
    sources = Sources(
        **forget,
        benign_files=options.benign_file,
        open_files=options.open_file,
        data_dir=options.data_dir,
        seed=options.seed,
        limit=options.limit,
        samples=options.samples,
    )
    return sources, read_retain(origins["retain"]) if "retain" in origins else []
