"""What a start goes on from: the checkpoint that is chosen, and whether it is of the same run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from wpn_ds.data.tokens import today
from wpn_ds.engine.checkpoint import TrainerState, checkpoints, complete, damage, path_of, read_state
from wpn_ds.engine.fingerprint import BY_FILE, in_one_digest
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce, on_main
from wpn_ds.jobs.history import read_starts
from wpn_ds.jobs.output import holds_run
from wpn_ds.models.load import Source
from wpn_ds.objectives.registry import find
from wpn_ds.settings.run import Config, UnlearningConfig


def choose(resume: str | None, output_dir: Path, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and notes on those that were passed over; every rank must call it.

    ``resume`` is a path, or ``auto`` for the newest whole one (None if there is no checkpoint at all).

    Raises:
        UserError: the path isn't a whole checkpoint, or none of them is whole, or there is none of a run that didn't
            begin at step 0.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        if faults := damage(Path(resume), world):
            raise UserError(f"--resume_from_checkpoint {resume}: not a whole checkpoint ({faults[0]})")
        return Path(resume), []
    notes: list[str] = []
    found = on_main(world, lambda: sorted(checkpoints(output_dir), reverse=True))
    for _, path in found:
        faults = damage(path, world)
        if not faults:
            return path, notes
        notes.append(f"{path} is damaged ({faults[0]}): going back to the checkpoint before")
    if found:
        raise UserError(
            f"--resume_from_checkpoint auto: no checkpoint in {output_dir} is whole ({faults[0]}): name one of another "
            "run, or start afresh in another --output_dir"
        )
    if begun := on_main(world, lambda: next((start.step for start in reversed(read_starts(output_dir))), 0)):
        raise UserError(
            f"--resume_from_checkpoint auto: the run in {output_dir} went on from step {begun} and has no checkpoint: "
            "name the one that it began with, or start afresh with --overwrite_output_dir"
        )
    return None, notes


def past_of(
    config: Config, identity: TrainerState, path: Path, total_steps: int, source: Source, world: World
) -> TrainerState:
    """The state in the checkpoint at ``path``, that the run goes on from.

    Raises:
        UserError: the checkpoint is of another run.
    """
    past = on_main(world, lambda: read_state(path))
    assert past is not None  # it was chosen because it is whole
    output_dir, step = Path(config.training.output_dir or ""), past.step
    on_main(world, lambda: refuse_two_runs(path, step, output_dir))
    if identity.model.startswith(BY_FILE) and not past.model.startswith(BY_FILE):
        same = in_one_digest(source.name_or_path, world) == past.model
        past = replace(past, model=identity.model) if same else past
    for note in refuse_other_run(past, identity, path):
        announce(world, note)
    if past.step > total_steps:
        raise UserError(
            f"--resume_from_checkpoint {path}: {past.step} steps are done, more than the {total_steps} that "
            "--max_steps or --num_train_epochs ask for"
        )
    validation = past.parts.get("validation", {})
    forgotten = replace(past, parts=past.parts | {"validation": validation | {"best_step": 0, "best": {}}})
    if config.logging.early_stopping is None:
        return forgotten
    best_step = validation.get("best_step", 0)
    best = path_of(output_dir, best_step)
    if best_step and on_main(world, lambda: read_state(best)) is None:
        announce(world, f"{best}, that of the best evaluation so far, is gone: only later ones count")
        return forgotten
    return past


def refuse_two_runs(path: Path, step: int, output_dir: Path) -> None:
    """Check that going on from the checkpoint at ``path``, of ``step``, leaves one run in the output folder: it is the
    folder's own, or what the run there began with, or there is none yet.

    Raises:
        UserError: the folder holds a run that it would be mixed with.
    """
    if path.parent.resolve() == output_dir.resolve() or not holds_run(output_dir):
        return
    if [start.step for start in read_starts(output_dir)[:1]] == [step]:  # all that was done there came after it
        return
    raise UserError(
        f"--resume_from_checkpoint {path}: --output_dir {output_dir} holds another run: pass --resume_from_checkpoint "
        "auto to go on with that one, or name another folder"
    )


def refuse_other_run(old: TrainerState, new: TrainerState, path: Path) -> list[str]:
    """Check that the checkpoint belongs to this run; returns notes on settings and versions that changed.

    Raises:
        UserError: other data, another starting model, or a setting without which the run is another one.
    """
    otherwise = ""
    if "parse_special_tokens" not in old.settings:
        otherwise = "; an earlier version wrote it, which read some texts as other tokens"
    for what, then, now in (
        (f"the training data (or template, tokenizer, --max_length{otherwise})", old.data, new.data),
        ("the starting model", old.model, new.model),
    ):
        if then != now:
            raise UserError(
                f"--resume_from_checkpoint {path}: {what} changed since; restore it, or start afresh in another "
                "--output_dir"
            )
    if new.settings["redraw_ema"] and new.settings["zero stage"] == 3 and old.world_size != new.world_size:
        raise UserError(
            f"--resume_from_checkpoint {path}: under ZeRO stage 3, --redraw_ema goes on only on as many ranks as wrote "
            f"it, which were {old.world_size}"
        )
    # DeepSpeed restores the optimizer's own settings: another flag would have no effect.
    restored = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optimizer", "zero stage")
    defaults = Config.from_flat({"objective": new.settings["objective"]}).resolved().to_flat()
    kinds: tuple[Any, ...] = (UnlearningConfig, find(new.settings["objective"]))
    objective = {entry.name for kind in kinds for entry in fields(kind)}
    decisive = {"seed", "global_batch_size", "retain_batch_size", "bf16", *restored, *objective} - {"reference"}
    if new.settings["reference"] != "topk":
        decisive -= {"reference_topk"}
    if new.settings["forgotten_below"] is not None:
        decisive |= {"eval_steps"}
    if new.settings["early_stopping"] is not None:  # the best evaluation so far is compared with those to come
        decisive |= {"probe_prompts", "sample_tokens", "retain_bound"}
        decisive |= {name for name in new.settings if name.startswith("validation_")}
        if old.step and old.parts.get("validation", {}).get("start_perplexity") is None:
            raise UserError(
                f"--early_stopping: {path} doesn't say what the retain perplexity was at the start: leave it out, or "
                "start afresh"
            )
    decisive |= {"lora_r", "lora_alpha", "lora_dropout", "lora_target", "load_in_4bit"}
    layout = {"tokens_per_micro_batch", "packing", "share_prefix", "attention", "gradient_checkpointing"}
    quiet = layout | {"output_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir", "logging_steps"}
    notes = []
    for name, now in new.settings.items():
        before = old.settings.get(name, defaults.get(name))  # what it was before there was a flag for it
        same_place = name in new.places and old.places.get(name) == new.places[name]
        if before == now or same_place or name in quiet:
            continue
        approximate = name == "reference" and "topk" in (before, now)  # the other kinds are all exact
        if approximate or name in decisive:
            raise UserError(f"{name} is {now}, but {path} was written with {before}: give the same, or start afresh")
        notes.append(f"{name} is now {now}, was {before}")
    changed = [
        f"{name} is now {new.versions.get(name)}, was {was}"
        for name, was in old.versions.items()
        if new.versions.get(name) != was
    ]
    if changed:
        notes.append(f"{', '.join(changed)}: the weights may no longer be those of an unbroken run, bit for bit")
    return notes


def chat_date(config: Config) -> str:
    """The day that chat templates write as today's: that of the run that is resumed, or today."""
    resume = config.logging.resume_from_checkpoint
    here = complete(Path(config.training.output_dir or "")) if resume == "auto" else []
    paths = [path for _, path in here] if resume == "auto" else [Path(resume or "")]
    states = [state for path in paths if (state := read_state(path))]
    return (states[-1].settings.get("chat_date") if states else None) or today()
