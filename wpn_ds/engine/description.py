"""Every quantity of a run that was derived, said before its first step and kept in its folder."""

from __future__ import annotations

import importlib.metadata
import json

from wpn_ds.data.plan import StepPlan
from wpn_ds.engine.policy import Policy
from wpn_ds.engine.prepare import Job
from wpn_ds.engine.telemetry import Telemetry
from wpn_ds.system.files import write_atomically


def describe(job: Job, policy: Policy, first: StepPlan, peak_flops: float, telemetry: Telemetry) -> None:
    """Say it, and leave ``run.yaml`` (which ``--config`` takes again) and ``ds_config.json``.

    Args:
        first: the plan of the step that comes next.
        peak_flops: of one device.
    """
    lm, layout, cut = policy.model.lm, policy.layout, job.examples.truncation
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in lm.parameters())
    facts = {
        "model": f"{job.source.name_or_path}, {parameters:,} parameters, {lm.dtype}",
        "ranks": f"{job.world.size} on {job.world.device.type}, ZeRO stage {job.zero_stage}, "
        f"peak {peak_flops / 1e12:.3g} TFLOP/s each",
        "attention": policy.attention.removeprefix("wpn_") + ", prompts shared" * layout.share_prefix,
        "prompts": f"the first as the model reads it: {_shortened(repr(job.first_prompt))}",
        "data": f"{len(job.examples.forget)} forget, {len(job.examples.retain)} retain; "
        f"cut: {cut.prompts} prompts, {cut.answers} answers",
        "steps": f"{job.total_steps} of {job.config.training.global_batch_size} forget + "
        f"{job.retain_size} retain examples",
        "first step": f"{first.tokens} tokens in {len(first.micro_batches[0])} micro-batches a rank, "
        f"fill {first.tokens / first.padded_tokens:.0%}",
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")
        ),
    }
    for name, fact in facts.items():
        telemetry.say(f"{name:>10}: {fact}")
    if job.world.is_main:
        comments = "".join(f"# {name}: {fact}\n" for name, fact in facts.items())
        write_atomically(job.output_dir / "run.yaml", comments + job.config.run_yaml())
        write_atomically(job.output_dir / "ds_config.json", json.dumps(job.ds_json, indent=2) + "\n")


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
