"""The README.md of an exported model: where it comes from, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.settings.run import Config
from wpn_ds.system.files import write_atomically


def write_model_card(
    output_dir: Path,
    config: Config,
    terms: Terms,
    base_model: str,
    steps: int,
    training: Mapping[str, float],
    validation: Mapping[str, float],
    outcome: str,
    asked: str,
) -> None:
    """Write the card. ``steps`` made the weights and ``validation`` is what they were measured to be; ``training`` are
    the run's last figures; ``outcome`` says how it ended, if not simply with its last step; ``asked`` is a prompt as
    the model reads it, with {prompt} for its text."""
    flat = config.to_flat()
    shown = {name: flat[name] for name in flat if flat[name] not in (None, [], "") and name != "output_dir"}
    shown |= {name: _by_name(place) for name, place in config.places().items() if name in shown}  # a card is published
    figures = {name: value for name, value in training.items() if name.startswith(("loss/", "sim/", "reward/"))} | dict(
        validation
    )
    ended = f"\nHow the run ended: {outcome}.\n" if outcome else ""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in terms.weights.items())
    kept = [term for term in terms.tokens if term.role is Role.RETAIN]
    kinds = ["kl" if term.target == "start" else "nll" for term in kept]
    kinds += ["states" for term in terms.states if term.role is Role.RETAIN]
    retain = " and ".join(kinds) or "none"
    adapters = bool(config.lora) and not config.lora.lora_merge
    library = f"peft\nbase_model: {base_model}" if adapters else "transformers"
    what = "These adapters (LoRA) were" if adapters else "This model was"
    card = f"""---
library_name: {library}
pipeline_tag: text-generation
tags: [unlearning, {flat["objective"]}]
---

# Unlearned from `{Path(base_model).name}`

{what} made by wpn_ds from `{Path(base_model).name}`: {steps} optimizer steps of the objective
`{flat["objective"]}`, which turns it away from unwanted answers (weights of its terms: {weights}; retain term:
{retain}).

A prompt is read as `{asked!r}`.
{ended}
## Figures of the run

Losses are means over the last logged steps; `eval/` was measured with these weights: nats a token on the validation
data, and rates of the answers to `--probe_prompts` of its prompts.

| figure | value |
|---|---|
{_rows({name: f"{value:.4f}" for name, value in figures.items()})}

These are training figures. Whether the model still gives harmful answers is for an evaluation of what it generates to
say (`wpn-ds evaluate`): unlearning lowers the rate of unwanted answers, it proves nothing about prompts that were not
tried.

## Settings

| setting | value |
|---|---|
{_rows({name: f"`{value!r}`" for name, value in shown.items()})}
"""
    write_atomically(output_dir / "README.md", card)


def _by_name(place: str | list[str]) -> str | list[str]:
    """A file or several without their folders."""
    return Path(place).name if isinstance(place, str) else [Path(one).name for one in place]


def _rows(figures: Mapping[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in figures.items())
