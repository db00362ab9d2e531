"""From settings to a job: everything that is decided, read and checked before a model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.layout import Layout
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import writes_date
from wpn_ds.engine.checkpoint import TrainerState
from wpn_ds.engine.checks import check, note_on_joined, notes_on
from wpn_ds.engine.corpus import Corpus, CorpusBuilder, Encoding, read_records
from wpn_ds.engine.fingerprint import fingerprint_of_model
from wpn_ds.engine.probe import Probe
from wpn_ds.engine.redraw import Request, redraw_requests
from wpn_ds.engine.resume import chat_date, choose, past_of
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, agree, announce, busy, init, on_main
from wpn_ds.jobs.heartbeat import after_the_watchdog
from wpn_ds.jobs.output import claim_output, lock_output
from wpn_ds.jobs.preflight import check as check_nodes
from wpn_ds.jobs.preflight import versions
from wpn_ds.jobs.stopwatch import Stopwatch
from wpn_ds.models.adapters import whole
from wpn_ds.models.check import supported
from wpn_ds.models.folder import check_place, is_adapter
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
from wpn_ds.models.planted import ensure_planted
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.settings.deepspeed import ResolvedDeepSpeed, resolve_deepspeed, stage_of
from wpn_ds.settings.run import Config
from wpn_ds.system.files import cache_folder


@dataclass(frozen=True)
class Job:
    """A training run on one rank, as it is before its model is loaded.

    Attributes:
        watch: what the start's seconds went into so far.
        config: the settings without "auto".
        ds_json: the DeepSpeed configuration without "auto".
        source, lm_config: the starting model.
        total_steps: optimizer steps of the whole run.
        terms: what is minimised.
        layout: how segments become rows.
        examples: what is trained on.
        held_out: what the losses are measured on.
        probe: what is asked at an evaluation.
        redraw_prompts: what is asked for an answer of each example, by its side, if they are drawn anew.
        first_prompt: the first record's, as the model reads it; of plain text all of it.
        identity: what makes two starts the same run, as the state of one that has done nothing yet.
        past: the state that the run goes on from.
        resume_from: the checkpoint that holds it, if any.
    """

    watch: Stopwatch
    config: Config
    ds_json: dict[str, Any]
    world: World
    source: Source
    lm_config: Any
    tokenizer: Any
    total_steps: int
    terms: Terms
    layout: Layout
    examples: ExampleSet
    held_out: ExampleSet
    probe: Probe
    redraw_prompts: dict[Role, list[Request]]
    first_prompt: str
    identity: TrainerState
    past: TrainerState
    resume_from: Path | None

    @property
    def output_dir(self) -> Path:
        return Path(self.config.training.output_dir or "")

    @property
    def pad_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @property
    def retain_size(self) -> int:
        """Retain examples of a step: none where their term is off."""
        return (self.config.training.retain_batch_size or 0) if self.terms.retain_weight > 0 else 0

    @property
    def zero_stage(self) -> int:
        return stage_of(self.ds_json)

    def state(self, step: int, parts: dict[str, dict[str, Any]]) -> TrainerState:
        """That of this run after ``step``, whose parts have these states."""
        return replace(self.identity, step=step, parts=parts)


def prepare(given: Config) -> Job:
    """Read the data, join the other ranks, resolve what is open and claim the output folder.

    Raises:
        UserError: the settings, the data or the output folder don't allow the run; nothing of a run has been changed.
    """
    watch = Stopwatch()
    model_path = given.model.model_name_or_path or str(ensure_planted())
    check_place("--model_name_or_path", model_path)
    world = _join(given, model_path)
    watch.lap("meeting the other ranks")
    source, lm_config = _starting_model(given, model_path, world)
    tokenizer = _tokenizer(given, source, lm_config, world)
    given = _dated(given, tokenizer, world)
    encoding = Encoding.of(given, tokenizer, lm_config)
    watch.lap("tokenizer")
    builder = CorpusBuilder(given, encoding, world)  # what is wrong with the data shows before they are tokenised
    watch.lap("data")
    resolved, total_steps = _resolve(given, lm_config, world, builder.about.forget)
    config, ds_json, terms = resolved.config, resolved.json, resolved.config.terms
    check(config, ds_json, terms, lm_config, world)
    notes = notes_on(config, terms, retain=builder.about.retain > 0)
    _say(world, *resolved.notes, builder.about.note, *notes)
    _say(world, *length_notes(lm_config, config.data.max_length, model_path))
    watch.lap("settings")
    texts = _texts(config, builder.corpus(), encoding, lm_config, world)
    watch.lap("tokens")
    check_ids(texts.occurring(tokenizer), tokenizer, lm_config.get_text_config().vocab_size, source)
    identity = _identity(config, ds_json, source, texts.examples, world)
    watch.lap("checksums")
    resume_from = _claim(config, model_path, world)
    watch.lap("output folder")
    return Job(
        watch=watch,
        config=config,
        ds_json=ds_json,
        world=world,
        source=source,
        lm_config=lm_config,
        tokenizer=tokenizer,
        total_steps=total_steps,
        terms=terms,
        layout=_layout(config, lm_config, terms, encoding.row_length, world),
        examples=texts.examples,
        held_out=texts.held_out,
        probe=texts.probe,
        redraw_prompts=texts.redraw_prompts,
        first_prompt=builder.about.first_prompt,
        identity=identity,
        past=identity if resume_from is None else past_of(config, identity, resume_from, total_steps, source, world),
        resume_from=resume_from,
    )


@dataclass(frozen=True)
class Texts:
    """All that a run reads and asks, as tokens; the attributes are those of :class:`Job`."""

    examples: ExampleSet
    held_out: ExampleSet
    probe: Probe
    redraw_prompts: dict[Role, list[Request]]

    def occurring(self, tokenizer: Any) -> Iterator[int]:
        """Every token id; of the examples the largest."""
        largest = (self.examples.largest_id(), self.held_out.largest_id())
        asked = (request.ids for requests in self.redraw_prompts.values() for request in requests)
        return chain([tokenizer.eos_token_id], largest, *self.probe.prompts, *asked)


def _say(world: World, *lines: str) -> None:
    for line in filter(None, lines):
        announce(world, line)


def _join(config: Config, model_path: str) -> World:
    """This process among the job's, on nodes that were found fit."""
    t = config.training
    world = init(max(t.comm_timeout_minutes, after_the_watchdog(t.hang_timeout) / 60))
    check_nodes(world, Path(t.output_dir or "."), _room(model_path), partial(announce, world))
    return world


def _tokenizer(config: Config, source: Source, lm_config: Any, world: World) -> Any:
    tokenizer = load_tokenizer(config.model.tokenizer_name or source.name_or_path, source, config=lm_config)
    _say(world, tokenizer_doubt(tokenizer, source, lm_config))
    return tokenizer


def _dated(config: Config, tokenizer: Any, world: World) -> Config:
    """The settings with the day that chat templates write, if the tokenizer's does and none was given."""
    if not writes_date(tokenizer) or config.data.chat_date is not None:
        return config
    return config.replace(chat_date=on_main(world, lambda: chat_date(config.resolved())))


def _texts(config: Config, corpus: Corpus, encoding: Encoding, lm_config: Any, world: World) -> Texts:
    _say(world, note_on_joined(corpus.examples, encoding.tokenizer))
    probe = _probe(config, corpus.about.asked, encoding, lm_config, world)
    o, redraw_prompts = config.unlearning, {}
    if o.redraw_steps:  # every prompt is asked, by all ranks
        redraw_prompts = redraw_requests(
            o,
            read_records(config).forget,
            encoding.style,
            encoding.tokenizer,
            lm_config,
            corpus.examples,
            encoding.row_length,
            world,
        )
    return Texts(corpus.examples, corpus.held_out, probe, redraw_prompts)


def _identity(
    config: Config, ds_json: dict[str, Any], source: Source, examples: ExampleSet, world: World
) -> TrainerState:
    """What makes two starts the same run, which the ranks agree about."""
    model_path = source.name_or_path
    with busy(world, f"reading the files of {model_path} for their checksums"):
        model = fingerprint_of_model(model_path, source.revision, world, cache_folder())
    identity = TrainerState(
        step=0,
        world_size=world.size,
        data=examples.fingerprint(),
        model=model,
        settings=config.to_flat() | {"zero stage": stage_of(ds_json), "optimizer": ds_json["optimizer"]["type"]},
        places={"model_name_or_path": os.path.abspath(model_path)} | config.places(),
        versions=versions(),
    )
    agree(identity.data, "the training data")
    return identity


def _claim(config: Config, model_path: str, world: World) -> Path | None:
    """Take the output folder for this run; returns the checkpoint that it goes on from, if any."""
    model, output_dir = Path(model_path), Path(config.training.output_dir or "")  # the demo's is known by now
    resume, overwrite = config.logging.resume_from_checkpoint, config.logging.overwrite_output_dir
    lock_output(output_dir, model, world)
    on_main(world, lambda: claim_output(output_dir, model, resume=resume is not None, overwrite=overwrite))
    resume_from, notes = choose(resume, output_dir, world)
    _say(world, *notes)
    return resume_from


def _starting_model(config: Config, model_path: str, world: World) -> tuple[Source, Any]:
    """Where the starting model comes from, and its configuration.

    Raises:
        UserError: its weights are quantised.
    """
    named = Source(
        model_path,
        revision=config.model.model_revision,
        trust_remote_code=config.model.trust_remote_code,
        allow_key_mismatch=config.model.allow_key_mismatch,
    )
    if config.lora and is_adapter(model_path) and not config.lora.lora_merge:
        raise UserError(
            f"--lora_r with {named.flag} {model_path}, an adapter: what is trained would belong to the two together: "
            "pass --lora_merge true"
        )
    source = on_main(world, lambda: pinned(whole(named)))  # one commit for all, should it change in between
    lm_config = load_config(source)
    if (how := quantisation(lm_config)) is not None:
        raise UserError(
            f"{source.flag} {model_path}: {how} weights are quantised and can't be trained: give whole ones, "
            "which --load_in_4bit quantises for --lora_r"
        )
    return source, lm_config


def _layout(config: Config, lm_config: Any, terms: Terms, row_length: int, world: World) -> Layout:
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
        share_header=flat and config.data.share_prefix and not terms.pools,
    )


def _probe(config: Config, records: Sequence[ForgetRecord], encoding: Encoding, lm_config: Any, world: World) -> Probe:
    """The probe on ``records``.

    Raises:
        UserError: --early_stopping goes by its judge, who has nothing to compare answers with.
    """
    logging = config.logging
    probe = Probe.of(
        records,
        encoding.tokenizer,
        encoding.style,
        size=logging.probe_prompts,
        max_length=encoding.row_length,
        tokens=logging.sample_tokens,
        positions=max_positions(lm_config) or 1 << 30,
    )
    if logging.probe_prompts and probe.judge is None:
        reason = "no harmless rate: the wanted or the unwanted answers have no Latin letter or digit to compare"
        if not any(record.chosen for record in records):
            reason = "no harmless rate: no wanted answers to compare with: give --validation_file with such"
        if not probe.prompts:
            reason = "no harmless rate: plain text has no prompts to ask: give --validation_file with such"
        if logging.early_stopping is not None:
            raise UserError(f"{reason}; leave --early_stopping out")
        announce(world, f"{reason} (--probe_prompts)")
    return probe


def _room(model_path: str) -> int:
    """Bytes that the output folder needs at least: a checkpoint (weights and AdamW's two moments), and the export."""
    folder = Path(model_path)
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return 4 * sum(file.stat().st_size for file in files)


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
