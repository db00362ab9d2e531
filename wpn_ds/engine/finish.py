"""The end of a run: which weights are exported, the model in Hugging Face format with its card, and the file DONE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wpn_ds.data.tokens import render_prompt
from wpn_ds.engine import checkpoint, hub
from wpn_ds.engine.export import export, export_adapters
from wpn_ds.engine.feed import Feed
from wpn_ds.engine.model_card import write_model_card
from wpn_ds.engine.policy import Policy
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.probe import summary
from wpn_ds.engine.progress import Progress
from wpn_ds.engine.telemetry import Telemetry
from wpn_ds.engine.validation import Validation
from wpn_ds.errors import UserError
from wpn_ds.jobs import history
from wpn_ds.jobs.distributed import announce, on_main, patiently
from wpn_ds.models.load import dropout_fields
from wpn_ds.settings.run import DONE
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import write_atomically


def choose_weights(
    job: Job, engine: Any, saver: checkpoint.Saver, validation: Validation, feed: Feed, step: int
) -> tuple[int, str]:
    """What is exported after ``step``, by its step, and a sentence that says why. Under --early_stopping these are the
    weights of the best evaluation, which the engine gets. Every rank must call it."""
    logging, best_step = job.config.logging, validation.best_step
    early = ""
    if step < job.total_steps:
        why = "all is forgotten (--forgotten_below)" if feed.empty else logging.early_stopping
        early = f"stopped early, {why}"
    if logging.early_stopping is None:
        return step, early
    lead = f"{early}: " if early else ""
    on_main(job.world, lambda: saver.rotate(step, best_step))  # the best may have changed since the last save
    best = f"step {best_step}, {summary(validation.best, validation.start_perplexity)}"
    if not best_step:
        bound = f"the retain perplexity within {logging.retain_bound:g} times that at the start (--retain_bound)"
        return step, f"{lead}the weights are the last step's: no evaluation had {bound}"
    if best_step == step:
        return step, f"{early or 'the last is the best'}: {best}"
    path = checkpoint.path_of(job.output_dir, best_step)
    if faults := checkpoint.damage(path, job.world):
        damaged = f"{path.name}, the best, is damaged ({faults[0]})"
        return step, f"{lead}the weights are the last step's: {damaged}"
    past = on_main(job.world, lambda: checkpoint.read_state(path))
    assert past is not None  # it is whole
    checkpoint.load(engine, path, past, job.world)
    return best_step, f"{lead}the weights are those of the best evaluation: {best}"


def write_model(
    job: Job,
    policy: Policy,
    telemetry: Telemetry,
    exported: int,
    outcome: str,
    values: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Export the engine's weights with their card; every rank must call it.

    Args:
        exported: the step that they are of, and ``outcome`` why.
        values: the last metrics of a step.
        after: the evaluation of these weights.
    """
    lm, dropout, lora = policy.model.lm, dropout_fields(job.lm_config), job.config.lora
    if lora:
        merge = lora.lora_merge
        export_adapters(lm, job.tokenizer, job.output_dir, job.world, job.source, dropout, merge=merge)
    else:
        export(lm, job.tokenizer, job.output_dir, job.world, dropout)
    if not job.world.is_main:
        return
    settings = job.config.to_flat()
    telemetry.hparams(exported, settings, {**after, **{k: v for k, v in values.items() if k.startswith("loss/")}})
    write_model_card(
        job.output_dir,
        job.config,
        job.terms,
        job.source.name_or_path,
        exported,
        values,
        after,
        outcome,
        render_prompt("{prompt}", job.tokenizer, PromptStyle.of(settings)),
    )
    if outcome:
        telemetry.say(outcome)
        run_yaml = job.output_dir / "run.yaml"
        told = run_yaml.read_text(encoding="utf-8")
        write_atomically(run_yaml, f"# {'outcome':>10}: {outcome}\n{told}")


def push(job: Job) -> None:
    """Upload the model if --push_to_hub asks for it; what hinders that is said, and the run has ended well. Every rank
    must call it."""
    repo = job.config.logging.push_to_hub
    if repo is None:
        return

    def upload() -> str:
        try:
            return f"pushed to {hub.push(job.output_dir, repo)}" if job.world.is_main else ""
        except UserError as error:
            return f"not pushed: {error}; later: wpn-ds push {job.output_dir} --push_to_hub {repo}"

    announce(job.world, patiently(upload)[0])


def leave_done(
    job: Job, telemetry: Telemetry, starts: Sequence[history.Start], progress: Progress, joules: float
) -> None:
    """Leave the file that says that all went well; scripts trust it, not a return code."""
    if job.world.is_main:
        telemetry.say(history.summary(starts, progress.tokens, progress.train_seconds, progress.device_seconds, joules))
        write_atomically(job.output_dir / DONE, "")
    announce(job.world, f"the unlearned model is in {job.output_dir}")
