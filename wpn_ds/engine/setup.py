"""From settings to a job: everything that is decided, read and checked before a model is loaded."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from deepspeed.monitor.utils import check_comet_availability, check_tb_availability, check_wandb_availability
from deepspeed.runtime.config import DeepSpeedConfig
from tqdm import tqdm

from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.examples import ExampleSet, build_examples
from wpn_ds.data.inspect import contradiction_note
from wpn_ds.data.plan import ORDER_FORMAT, Layout, Role
from wpn_ds.data.records import (
    ForgetRecord,
    RetainRecord,
    read_answers,
    read_dataset,
    read_forget,
    read_retain,
    with_random_wanted,
)
from wpn_ds.data.tokens import encoded_prompt, end_of, is_chat, naming, render_prompt, today, writes_date
from wpn_ds.engine import checkpoint
from wpn_ds.engine.fingerprint import fingerprint_of_model
from wpn_ds.engine.probe import Probe
from wpn_ds.engine.redraw import Request
from wpn_ds.engine.reference import frozen_json
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, agree, init, on_main
from wpn_ds.jobs.heartbeat import after_the_watchdog
from wpn_ds.jobs.history import FAILED, REQUEUE, STARTS, STATUS
from wpn_ds.jobs.preflight import check as check_nodes
from wpn_ds.models.attention import supported
from wpn_ds.models.folder import check_place
from wpn_ds.models.load import (
    Source,
    check_ids,
    length_notes,
    load_config,
    load_tokenizer,
    max_positions,
    pad_token_id,
    pinned,
    quantisation,
    tokenizer_doubt,
)
from wpn_ds.models.planted import PLANTED, ensure_planted
from wpn_ds.objectives.family import build_objective
from wpn_ds.objectives.objective import Objective
from wpn_ds.settings.deepspeed import ResolvedDeepSpeed, resolve_deepspeed
from wpn_ds.settings.run import DONE, Config, ObjectiveConfig
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import PARTIAL, cache_folder, remove_abandoned, unusable
from wpn_ds.system.lock import Lock

TRAIN_LOCK = ".train.lock"

#: (key of the DeepSpeed JSON, package, DeepSpeed's own question for it) of what writes a run's numbers down.
_MONITORS = (
    ("tensorboard", "tensorboard", check_tb_availability),
    ("wandb", "wandb", check_wandb_availability),
    ("comet", "comet_ml", check_comet_availability),
)

#: Retain examples on which their NLL is measured at an evaluation.
RETAIN_EXAMPLES_MEASURED = 256


@dataclass(frozen=True)
class Job:
    """A training run on one rank, as it is before its model is loaded.

    Attributes:
        config: the settings without "auto".
        ds_json: the DeepSpeed configuration without "auto".
        source, lm_config: the starting model.
        total_steps: optimizer steps of the whole run.
        objective: what is minimised.
        layout: how segments become rows.
        examples: what is trained on.
        held_out: what the losses are measured on.
        probe: what is asked at an evaluation.
        redraw_prompts: what is asked for an unwanted answer of each example, if they are drawn anew.
        first_prompt: the first record's, as the model reads it.
        start: the state of a run that has done nothing yet.
        resume_from: the checkpoint to go on from, if any.
    """

    config: Config
    ds_json: dict[str, Any]
    world: World
    source: Source
    lm_config: Any
    tokenizer: Any
    total_steps: int
    objective: Objective
    layout: Layout
    examples: ExampleSet
    held_out: ExampleSet
    probe: Probe
    redraw_prompts: list[Request]
    first_prompt: str
    start: checkpoint.TrainerState
    resume_from: Path | None

    @property
    def output_dir(self) -> Path:
        return _output_dir(self.config)

    @property
    def pad_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @property
    def retain_size(self) -> int:
        """Retain examples of a step: none where their term is off."""
        return (self.config.training.retain_batch_size or 0) if self.objective.retain_weight > 0 else 0

    @property
    def zero_stage(self) -> int:
        return _stage(self.ds_json)


def prepare(config: Config) -> Job:
    """Read the data, join the other ranks, resolve what is open and claim the output folder.

    Raises:
        UserError: the settings, the data or the output folder don't allow the run; nothing of a run has been changed.
    """
    forget, retain, validation, asked = _read_records(config)  # bad input shows before anything is started
    model_path = config.model.model_name_or_path or str(ensure_planted())
    check_place("--model_name_or_path", model_path)
    t = config.training
    world = init(max(t.comm_timeout_minutes, after_the_watchdog(t.hang_timeout) / 60))
    check_nodes(world, Path(config.training.output_dir or "."), _room(model_path), lambda line: say(world, line))
    named = Source(
        model_path,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        allow_key_mismatch=config.model.allow_key_mismatch,
    )
    source = on_main(world, lambda: pinned(named))  # one commit for all, should it change in between
    lm_config = load_config(source)
    if (how := quantisation(lm_config)) is not None:
        raise UserError(
            f"{source.flag} {model_path}: {how} weights are quantised and can't be trained: give whole ones"
        )
    resolved, total_steps = _resolve(config, lm_config, world, len(forget))
    config = resolved.config
    read = _check_with_deepspeed(resolved.json, config)
    on_main(world, lambda: _check_monitors(read, config))  # DeepSpeed makes them there alone
    objective = build_objective(config.objective, retain=bool(config.training.retain_batch_size))
    if objective.keeps_distribution and config.objective.reference not in ("states", "topk"):
        frozen_json(resolved.json, config.objective.reference)  # what it refuses is said before work is lost
    if config.objective.harmonise:
        _check_harmony(resolved.json, objective)
    if config.objective.redraw_steps:
        _check_redraw(config, resolved.json, objective)
    if config.objective.reads_wanted and (note := contradiction_note(forget)):
        say(world, note)
    _check_parts(lm_config, config)
    for note in resolved.notes:
        say(world, note)
    reference = config.objective.reference
    if reference != ObjectiveConfig.reference and not objective.keeps_distribution:
        say(world, f"--reference {reference} does nothing: no term asks for the starting model's distribution")
    if objective.retain_weight == 0:
        reason = "the retain term is off" if retain else "no retain data: the retain term is off"
        say(world, f"{reason}, and nothing holds the model to what it knows")

    tokenizer = load_tokenizer(config.model.tokenizer_name or model_path, source, config=lm_config)
    if doubt := tokenizer_doubt(tokenizer, source, lm_config):
        say(world, doubt)
    if writes_date(tokenizer) and config.data.chat_date is None:
        config = config.replace(chat_date=on_main(world, lambda: _chat_date(config)))
    style = PromptStyle.of(config.to_flat())
    # GPT-Neo's stock attention can't take a row that is longer than the model has positions.
    row_length = min(config.data.max_length, max_positions(lm_config) or config.data.max_length)
    for note in length_notes(lm_config, config.data.max_length, model_path):
        say(world, note)

    def tokenise(forget: Sequence[ForgetRecord], retain: Sequence[RetainRecord]) -> ExampleSet:
        return build_examples(forget, retain, tokenizer, style, row_length, lambda i, what: progress(world, i, what))

    examples, held_out = tokenise(forget, retain), tokenise(validation, retain[:RETAIN_EXAMPLES_MEASURED])
    if note := _joined(examples, tokenizer):
        say(world, note)
    probe = _probe(config, asked, style, tokenizer, lm_config, row_length, world)
    redraw_prompts = _redraw_prompts(
        config, forget, style, tokenizer, lm_config, row_length, lambda line: say(world, line)
    )
    segments = (segment.ids for split in (examples, held_out) for segment in split.segments)
    drawn_for = (request.ids for request in redraw_prompts)
    occurring = chain([tokenizer.eos_token_id], *segments, *probe.prompts, *drawn_for)
    check_ids(occurring, tokenizer, lm_config.get_text_config().vocab_size, source)
    start = checkpoint.TrainerState(
        step=0,
        world_size=world.size,
        data=examples.fingerprint(),
        model=fingerprint_of_model(model_path, source.revision, world, cache_folder()),
        settings=config.to_flat()
        | {"zero stage": _stage(resolved.json), "optimizer": resolved.json["optimizer"]["type"]},
        order_format=ORDER_FORMAT,
        places={"model_name_or_path": os.path.abspath(model_path)} | config.places(),
    )
    agree(start.data, "the training data")
    _lock_output(config, world)
    on_main(world, lambda: _claim_output(config))
    resume_from, notes = checkpoint.choose(config.logging.resume_from_checkpoint, _output_dir(config), world)
    for note in notes:
        say(world, note)
    return Job(
        config=config,
        ds_json=resolved.json,
        world=world,
        source=source,
        lm_config=lm_config,
        tokenizer=tokenizer,
        total_steps=total_steps,
        objective=objective,
        layout=_layout(config, lm_config, row_length, world),
        examples=examples,
        held_out=held_out,
        probe=probe,
        redraw_prompts=redraw_prompts,
        first_prompt=render_prompt(forget[0].prompt, tokenizer, style),
        start=start,
        resume_from=resume_from,
    )


def _check_parts(lm_config: Any, config: Config) -> None:
    """Raises UserError where weight decay would change what no text trains."""
    if lm_config.get_text_config() is not lm_config and config.training.weight_decay:
        raise UserError(
            f"--weight_decay {config.training.weight_decay}: {lm_config.model_type} models have parts that texts don't "
            "train, such as a vision tower, and it would shrink them: pass --weight_decay 0"
        )


def _check_harmony(ds_json: Mapping[str, Any], objective: Objective) -> None:
    """Raises UserError where one of the two gradients is not there, or they are not both in one place."""
    if objective.retain_weight == 0:
        raise UserError("--harmonise goes by the gradient of the retain term, which is off: add --retain_file")
    if not any(weight for name, weight in objective.weights.items() if name != "retain"):
        raise UserError(
            "--harmonise: nothing forgets, since all weights but --retain_weight are 0: leave it out, or give one"
        )
    stage, bf16 = _stage(ds_json), ds_json.get("bf16", {}).get("enabled", False)
    offload = ds_json.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if stage not in (0, 3) or offload or (stage == 0 and bf16):
        raise UserError(
            "--harmonise works under ZeRO stage 3 without offload_optimizer, or stage 0 in fp32: pass such a JSON "
            "with --deepspeed, for example ds_configs/zero3.json"
        )


def _check_redraw(config: Config, ds_json: Mapping[str, Any], objective: Objective) -> None:
    """Raises UserError where new answers have nothing to be compared to, or there is no place for averaged weights."""
    name = config.objective.objective
    if objective.frozen or objective.needs_starting_scores or objective.needs_starting_logprobs:
        own = "--wpn_targets live, or " if objective.frozen else "--wpn_scoring likelihood, or "
        raise UserError(
            f"--redraw_steps: --objective {name} compares to what is kept of the records' own answers, and there is "
            f"nothing of new ones: take {own if name == 'wpn' else ''}another objective, such as neat or simnpo"
        )
    if Role.UNWANTED not in objective.read:
        raise UserError("--redraw_steps: no term of the objective reads unwanted answers: leave it out")
    zero = ds_json.get("zero_optimization", {})
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    if config.objective.redraw_ema and (on_disk or zero.get("zero_hpz_partition_size", 1) > 1):
        raise UserError("--redraw_ema works neither with parameters on NVMe nor with zero_hpz_partition_size")


def _redraw_prompts(
    config: Config,
    forget: Sequence[ForgetRecord],
    style: PromptStyle,
    tokenizer: Any,
    lm_config: Any,
    row_length: int,
    tell: Callable[[str], None],
) -> list[Request]:
    """What is asked for an unwanted answer of each example; nothing if none are drawn. Under ``auto`` the text of
    --redraw_template is what the user says; in a plain template it stands in place of that.

    Raises:
        UserError: a prompt is a chat, which no template can change, or leaves no room for an answer.
    """
    o = config.objective
    if not o.redraw_steps:
        return []
    requests, cut = [], 0
    for record in forget:
        asked, written = record.prompt, style
        if o.redraw_template is not None:
            if not is_chat(asked, tokenizer, style):
                written = replace(style, template=o.redraw_template)
            elif isinstance(asked, str):
                asked = o.redraw_template.replace("{prompt}", asked)
            else:
                raise UserError("--redraw_template: a chat has the tokenizer's own template: leave it out")
        with naming(record.source):
            prompt = encoded_prompt(asked, tokenizer, written, row_length)
        requests.append(Request(prompt.ids, end_of(asked, tokenizer, written)))
        cut += prompt.truncated
    if cut and o.redraw_template is not None:
        tell(
            f"--redraw_template: {cut} of {len(requests)} prompts lose their start, the template's own first words "
            f"among it: they keep half of --max_length {row_length}"
        )
    longest, positions = max(len(request.ids) for request in requests), max_positions(lm_config)
    if positions is not None and longest + o.redraw_tokens > positions:
        raise UserError(
            f"--redraw_tokens {o.redraw_tokens}: the longest prompt has {longest} tokens and the model only "
            f"{positions} positions: give at most {positions - longest}"
        )
    return requests


def _chat_date(config: Config) -> str:
    """The day that chat templates write as today's: that of the run that is resumed, or today."""
    resume = config.logging.resume_from_checkpoint
    paths = [path for _, path in checkpoint.complete(_output_dir(config))] if resume == "auto" else [Path(resume or "")]
    states = [state for path in paths if (state := checkpoint.read_state(path))]
    return (states[-1].settings.get("chat_date") if states else None) or today()


def _joined(examples: ExampleSet, tokenizer: Any) -> str:
    """A line on answers that are not read after the tokens of their prompt alone, with the first; empty without any."""
    found = [segment for segment in examples.segments if segment.joined]
    if not found:
        return ""
    at = found[0].answer_start
    before, after = tokenizer.decode(found[0].ids[max(0, at - 6) : at]), tokenizer.decode(found[0].ids[at : at + 6])
    return (
        f"{len(found)} of {len(examples.segments)} answers are not read after the tokens of their prompt alone, which "
        f"are what is asked: the tokenizer or its chat template writes both otherwise where the answer begins; the "
        f"first: {before!r} before {after!r}"
    )


def _layout(config: Config, lm_config: Any, row_length: int, world: World) -> Layout:
    """Flat if the attention is ours, which takes texts one by one.

    Raises:
        UserError: the model's family can't have the attention that was asked for.
    """
    ours, able = config.model.attention not in ("sdpa", "eager"), supported(lm_config)
    if ours and config.model.attention != "auto" and not (able and config.data.packing):
        reason = f"{lm_config.model_type} models have only their own" if not able else "it is for packed rows"
        raise UserError(f"--attention {config.model.attention}: {reason}; pass --attention auto, sdpa or eager")
    if config.model.attention in ("varlen", "flex") and config.model.dropout:
        raise UserError(f"--attention {config.model.attention} has no dropout: pass --attention packed or --dropout 0")
    flat = ours and able and config.data.packing
    return Layout(
        row_length,
        config.training.tokens_per_micro_batch,
        config.data.packing,
        world.size,
        flat=flat,
        share_prefix=flat and config.data.share_prefix,
    )


def _probe(
    config: Config,
    records: Sequence[ForgetRecord],
    style: PromptStyle,
    tokenizer: Any,
    lm_config: Any,
    row_length: int,
    world: World,
) -> Probe:
    """The probe on ``records``.

    Raises:
        UserError: --early_stopping goes by its judge, who has nothing to compare answers with.
    """
    logging = config.logging
    probe = Probe.of(
        records,
        tokenizer,
        style,
        size=logging.probe_prompts,
        max_length=row_length,
        tokens=logging.sample_tokens,
        positions=max_positions(lm_config) or 1 << 30,
    )
    if probe.prompts and probe.judge is None:
        reason = "no harmless rate: the wanted or the unwanted answers have no Latin letter or digit to compare"
        if not any(record.chosen for record in records):
            reason = "no harmless rate: no wanted answers to compare with: give --validation_file with such"
        if logging.early_stopping is not None:
            raise UserError(f"{reason}; leave --early_stopping out")
        say(world, f"{reason} (--probe_prompts)")
    return probe


def _stage(ds_json: Mapping[str, Any]) -> int:
    return ds_json.get("zero_optimization", {}).get("stage", 0)


def say(world: World, line: str) -> None:
    """A line for the user, once for the job."""
    if world.is_main:
        print(line, file=sys.stderr, flush=True)


def progress(world: World, items: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on rank 0's terminal; nothing elsewhere."""
    return tqdm(items, desc=what, disable=None if world.is_main else True, leave=False, dynamic_ncols=True)


def _room(model_path: str) -> int:
    """Bytes that the output folder needs at least: a checkpoint (weights and AdamW's two moments), and the export."""
    folder = Path(model_path)
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return 4 * sum(file.stat().st_size for file in files)


def _read_records(
    config: Config,
) -> tuple[list[ForgetRecord], list[RetainRecord], list[ForgetRecord], list[ForgetRecord]]:
    """(forget, retain, validation) records, and those that the probe asks; where no file is named, the embedded ones.

    Wanted answers that are drawn are trained on; what is harmless, a record's own ones say better, if it has them.
    """
    data = config.data
    wanted = config.objective.reads_wanted
    drawn = wanted and (bool(data.wanted_file) or config.objective.objective in ("idkdpo", "llmu"))
    alone = drawn or not wanted
    train_file, retain_file, validation_file = data.train_file, data.retain_file, data.validation_file
    if data.embedded:
        train_file = [str(embedded_file("forget"))]
        retain_file = retain_file or [str(embedded_file("retain"))]
        validation_file = validation_file or [str(embedded_file("heldout"))]
    if data.dataset_name is not None:
        forget = read_dataset(data.dataset_name, data.dataset_split, "forget", alone=alone)
    else:
        forget = read_forget(train_file, alone=alone)
    validation = read_forget(validation_file, alone=alone)
    retain = read_retain(retain_file)
    asked = validation or forget
    if drawn:
        answers, seed = _wanted_answers(config, retain), config.training.seed
        forget = with_random_wanted(forget, answers, seed)
        if not any(record.chosen for record in validation):
            validation = with_random_wanted(validation, answers, seed)
        if not any(record.chosen for record in asked):
            asked = validation or forget
    return forget, retain, validation, asked


def _wanted_answers(config: Config, retain: Sequence[RetainRecord]) -> list[str]:
    """What prompts get their wanted answers from.

    Raises:
        UserError: LLMU's, which are random answers of the retain data, need such data.
    """
    if config.data.wanted_file:
        return read_answers(config.data.wanted_file)
    if config.objective.objective == "idkdpo":
        return read_answers([embedded_file("dont_know", "txt")])
    if not retain:
        raise UserError(
            "--objective llmu draws its wanted answers from retain data: add --retain_file or --wanted_file"
        )
    return [record.response for record in retain if record.prompt is not None] or [r.response for r in retain]


def _resolve(config: Config, lm_config: Any, world: World, examples: int) -> tuple[ResolvedDeepSpeed, int]:
    """The DeepSpeed JSON and the settings without "auto", and the number of optimizer steps."""
    path = config.training.deepspeed
    assert path is not None

    def resolve(steps: int | None) -> ResolvedDeepSpeed:
        return resolve_deepspeed(
            path,
            config,
            world_size=world.size,
            hidden_size=lm_config.get_text_config().hidden_size,
            device=world.device.type,
            total_steps=steps,
        )

    t = resolve(None).config.training  # the JSON may bring the batch size, from which the steps follow
    steps = t.max_steps or max(1, math.ceil(t.num_train_epochs * examples / t.global_batch_size))
    resolved = resolve(steps)
    return ResolvedDeepSpeed(resolved.json, resolved.config.resolved(), resolved.notes), steps


def _check_with_deepspeed(ds_json: Mapping[str, Any], config: Config) -> DeepSpeedConfig:
    """DeepSpeed's own reading of the configuration, before anything is loaded with it.

    Raises:
        UserError: it is refused; names the file.
    """
    try:
        return DeepSpeedConfig(copy.deepcopy(dict(ds_json)))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--deepspeed {config.training.deepspeed}: DeepSpeed refuses it: {reason}") from error


def _check_monitors(read: DeepSpeedConfig, config: Config) -> None:
    """Raises UserError where DeepSpeed couldn't write down what the file asks for, which it tries only once a model is
    loaded: a package is missing, or a folder can't be written to; names the file and the key."""
    flag, monitors, profiler = (
        f"--deepspeed {config.training.deepspeed}",
        read.monitor_config,
        read.flops_profiler_config,
    )
    for key, package, available in _MONITORS:
        if getattr(monitors, key).enabled:
            try:
                with contextlib.redirect_stdout(None):
                    available()
            except ImportError as error:
                raise UserError(f"{flag}: {key}: {error}: pip install {package}, or remove the key") from None
    folders = {
        f"{key}.output_path": Path(section.output_path, section.job_name)
        for key, section in (("tensorboard", monitors.tensorboard), ("csv_monitor", monitors.csv_monitor))
        if section.enabled
    }
    if profiler.enabled and profiler.output_file:
        if not isinstance(profiler.output_file, str):
            raise UserError(f"{flag}: flops_profiler.output_file: must be the name of a file")
        folders["flops_profiler.output_file"] = Path(profiler.output_file).parent
    for key, folder in folders.items():
        with _usable(f"{flag}: {key}: name another folder: {folder}"):
            there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
            with tempfile.TemporaryDirectory(dir=there):  # rights alone don't tell (/proc, a full disk)
                pass


def _output_dir(config: Config) -> Path:
    return Path(config.training.output_dir or "")


def _lock_output(config: Config, world: World) -> None:
    """No other run writes to the output folder until this process ends; rank 0 holds it for the job, and the others
    ask every second.

    Raises:
        UserError: the folder can't be one of a run.
        InUse: another run writes there.
    """
    output_dir = _output_dir(config)
    lock = Lock(output_dir / TRAIN_LOCK, f"--output_dir {output_dir}")

    def prepare() -> None:
        with _usable(f"--output_dir {output_dir}"):
            _check_place(config)
            output_dir.mkdir(parents=True, exist_ok=True)

    def attempt() -> bool:
        with _usable(f"--output_dir {output_dir}"):
            return lock.attempt()

    on_main(world, prepare)
    while not on_main(world, attempt):
        time.sleep(1)


@contextlib.contextmanager
def _usable(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unusable(place, error) from error


def _check_place(config: Config) -> None:
    output_dir = _output_dir(config)
    if link := next((p for p in (output_dir, *output_dir.parents) if p.is_symlink() and not p.exists()), None):
        raise UserError(
            f"--output_dir {output_dir}: the link {link} points to {os.readlink(link)}, which is not there: mend it or "
            "name another folder"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    model = Path(config.model.model_name_or_path or PLANTED)
    if model.is_dir() and output_dir.is_dir() and output_dir.samefile(model):
        raise UserError(f"--output_dir {output_dir} is the starting model's own folder: name another one")


def _claim_output(config: Config) -> None:
    """Make the output folder ready.

    Raises:
        UserError: the folder holds a run and no flag says what to do with it.
    """
    with _usable(f"--output_dir {_output_dir(config)}"):
        _claim(config)
        remove_abandoned(_output_dir(config))


def _claim(config: Config) -> None:
    output_dir = _output_dir(config)
    if config.logging.resume_from_checkpoint is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        return
    ended = (DONE, REQUEUE, FAILED, STARTS, STATUS)
    known = (
        *ended,
        "metrics.jsonl",
        "run.yaml",
        "ds_config.json",
        "runs",
        "logs",
        "config.json",
        "README.md",
        PARTIAL,
    )
    left = [p for name in known if os.path.lexists(p := output_dir / name)]
    left += [*output_dir.glob("checkpoint-*"), *output_dir.glob("model*.safetensors*")]
    if left and not config.logging.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds a run: pass --resume_from_checkpoint auto to go on, "
            "--overwrite_output_dir to start afresh, or name another folder"
        )
    if left and not any(
        p.name in (DONE, STARTS, "run.yaml", "metrics.jsonl") or p.name.startswith("checkpoint-") for p in left
    ):
        names = ", ".join(p.name for p in left)
        raise UserError(f"--output_dir {output_dir} is no run's folder, and has {names} of its own: name another one")
    if left and output_dir.is_symlink():
        raise UserError(
            f"--output_dir {output_dir} is a link: name {output_dir.resolve()} itself if --overwrite_output_dir shall "
            "delete the run there"
        )
    own = Path(config.model.model_name_or_path or PLANTED).resolve()
    if inside := next((p for p in left if not p.is_symlink() and p.resolve() in (own, *own.parents)), None):
        raise UserError(f"--overwrite_output_dir would delete {inside}, and the starting model with it: move it first")
    for path in left:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
