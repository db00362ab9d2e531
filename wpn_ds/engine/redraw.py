"""Unwanted answers that the model gives itself while it trains, in place of the records' own.

SAPO (arXiv 2405.20830) lets an exponential moving average of the model write them, NEAT (arXiv 2410.12194) the model
under a prompt that asks for bad answers; the papers' further machinery (SAPO's segments and replay buffer) is not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wpn_ds.data.examples import ExampleSet
from wpn_ds.data.layout import Layout
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.seeds import seed_of
from wpn_ds.data.tokens import encoded_prompt, end_of, is_chat, naming
from wpn_ds.engine.reading import Generation
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World, announce
from wpn_ds.models.load import max_positions
from wpn_ds.objectives.registry import find
from wpn_ds.objectives.terms import Role, Terms, flags
from wpn_ds.settings.run import Config, UnlearningConfig
from wpn_ds.settings.style import PromptStyle


class Ema:
    """``m <- decay m + (1 - decay) weights``, in fp32, of the part of the weights that this rank holds."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.mean = [part.detach().to(torch.float32, copy=True) for part in self._parts()]

    @property
    def holder(self) -> int:
        """The rank whose checkpoint file holds this rank's part: its own, or rank 0 where all have the whole mean."""
        return self._engine.global_rank if self._partitioned else 0

    @property
    def _partitioned(self) -> bool:
        return self._engine.zero_optimization_stage() == 3

    def update(self) -> None:
        """Call it after every update of the weights."""
        for mean, part in zip(self.mean, self._parts(), strict=True):
            mean.lerp_(part.float(), 1 - self._decay)

    def restore(self, mean: Sequence[Tensor]) -> None:
        for own, saved in zip(self.mean, mean, strict=True):
            own.copy_(saved)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the mean, and then again with its weights, bit for bit."""
        weights = [part.detach().clone() for part in self._parts()]
        self._fill(self.mean)
        try:
            yield
        finally:
            self._fill(weights)

    def _fill(self, values: Sequence[Tensor]) -> None:
        if self._partitioned:
            # What the last forward gathered is kept as long as there is room: the next would still compute with it.
            self._engine.optimizer.parameter_offload.partition_all_parameters()
        with torch.no_grad():
            for part, value in zip(self._parts(), values, strict=True):
                part.copy_(value)

    def _parts(self) -> list[Tensor]:
        """Under ZeRO-3 this rank's shards; else the whole parameters, the same on every rank."""
        return [getattr(p, "ds_tensor", p.data) for p in self._engine.module.parameters() if p.requires_grad]


class Request(NamedTuple):
    """What is asked for an unwanted answer, as token ids, and the token that ends an answer to it."""

    ids: list[int]
    end: int


@dataclass(frozen=True)
class Redraw:
    """How unwanted answers are drawn.

    Attributes:
        generation: who answers: all ranks together.
        prompts: what is asked for each example of the training data.
        tokens: most tokens of an answer.
        max_length: most tokens of an example's own prompt with it.
        seed: with the step and the example, it decides a draw.
        ema: whose answers they are, if not those of the weights as they are.
    """

    generation: Generation
    prompts: Sequence[Request]
    tokens: int
    max_length: int
    seed: int
    ema: Ema | None

    @classmethod
    def of(
        cls, config: Config, prompts: Sequence[Request], layout: Layout, generation: Generation, ema: Ema | None
    ) -> Redraw:
        """As the settings ask for it."""
        tokens, seed = config.unlearning.redraw_tokens, config.training.seed
        return cls(generation, prompts, tokens, layout.row_length, seed, ema)

    def __call__(self, examples: ExampleSet, chosen: Sequence[int], step: int) -> dict[int, list[int]]:
        """An answer for each example of ``chosen``, on every rank: token ids, with the one that ends it where it ended
        by itself."""
        with self.ema.in_place() if self.ema else contextlib.nullcontext():
            prompts, seeds = [self.prompts[i].ids for i in chosen], [seed_of(self.seed, step, i) for i in chosen]
            said = self.generation("an unwanted answer that is drawn anew", prompts, self.tokens, seeds)
        drawn = {}
        for i, ids in zip(chosen, said, strict=True):
            whole = [*ids, self.prompts[i].end] if len(ids) < self.tokens else ids
            drawn[i] = whole[: self.max_length - examples.forget[i].unwanted[0].segment.answer_start]
        return drawn


def check_redraw(name: str, ema: float, ds_json: Mapping[str, Any], terms: Terms) -> None:
    """Raises UserError where answers that are drawn anew have nothing to be compared to under --objective ``name``, or
    there is no place for weights averaged with the decay ``ema``."""
    if terms.keeps_answers:
        able = {"wpn_targets", "wpn_scoring"} <= {entry.name for entry in flags(find(name))}
        raise UserError(
            f"--redraw_steps: --objective {name} compares to what is kept of the records' own answers, and there is "
            "nothing of new ones: take another objective, such as neat or simnpo"
            + f" ({name} can have --wpn_targets live, or --wpn_scoring likelihood)"
            * able
        )
    if Role.UNWANTED not in terms.read:
        raise UserError("--redraw_steps: no term of the objective reads unwanted answers: leave it out")
    zero = ds_json.get("zero_optimization", {})
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    if ema and (on_disk or zero.get("zero_hpz_partition_size", 1) > 1):
        raise UserError("--redraw_ema works neither with parameters on NVMe nor with zero_hpz_partition_size")


def redraw_requests(
    o: UnlearningConfig,
    forget: Sequence[ForgetRecord],
    style: PromptStyle,
    tokenizer: Any,
    lm_config: Any,
    row_length: int,
    world: World,
) -> list[Request]:
    """What is asked for an unwanted answer of each example; nothing if none are drawn. Under ``auto`` the text of
    --redraw_template is what the user says; in a plain template it stands in place of that.

    Raises:
        UserError: a prompt is a chat, which no template can change, or leaves no room for an answer; or there is none.
    """
    if not o.redraw_steps:
        return []
    requests, cut = [], 0
    for record in forget:
        asked, written = record.prompt, style
        if not asked:
            raise UserError(f"--redraw_steps: {record.source} is plain text, without a prompt that could be answered")
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
        announce(
            world,
            f"--redraw_template: {cut} of {len(requests)} prompts lose their start, the template's own first words "
            f"among it: they keep half of --max_length {row_length}",
        )
    longest, positions = max(len(request.ids) for request in requests), max_positions(lm_config)
    if positions is not None and longest + o.redraw_tokens > positions:
        raise UserError(
            f"--redraw_tokens {o.redraw_tokens}: the longest prompt has {longest} tokens and the model only "
            f"{positions} positions: give at most {positions - longest}"
        )
    return requests
