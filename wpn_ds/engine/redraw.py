"""Answers that the model gives itself while it trains, in place of the records' own.

NEAT (arXiv 2410.12194) lets the model write unwanted ones under a prompt that asks for bad answers, only-prompting
self-rewarding (arXiv 2409.17534) also wanted ones under a prompt that asks for good ones. In SAPO (arXiv 2405.20830) an
exponential moving average of the model writes a segment of a wanted answer, which so becomes an unwanted one, and
trains on what it drew before as well. Of that it is a reconstruction: SAPO's split leaves room for a whole segment, and
its buffer is sampled over prompts, where here every example of a step is given a draw of its own.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wpn_ds.data.examples import ExampleSet, ForgetExample, answer_ids
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
    """What is asked for an answer, as token ids, and the token that ends an answer to it."""

    ids: list[int]
    end: int


@dataclass(frozen=True)
class Redraw:
    """How answers are drawn.

    Attributes:
        generation: who answers: all ranks together.
        prompts: what is asked for the unwanted answer of each example of the training data, and for its wanted one if
            that is drawn, too.
        tokens: most tokens of an answer.
        max_length: most tokens of an example's own prompt with it.
        seed: with the step and the example, it decides a draw.
        ema: whose answers they are, if not those of the weights as they are.
        segments: an unwanted answer is a wanted one in which the model has written a segment.
    """

    generation: Generation
    prompts: Mapping[Role, Sequence[Request]]
    tokens: int
    max_length: int
    seed: int
    ema: Ema | None
    segments: bool = False

    @classmethod
    def of(
        cls,
        config: Config,
        prompts: Mapping[Role, Sequence[Request]],
        layout: Layout,
        generation: Generation,
        ema: Ema | None,
    ) -> Redraw:
        """As the settings ask for it."""
        o, seed = config.unlearning, config.training.seed
        return cls(generation, prompts, o.redraw_tokens, layout.row_length, seed, ema, o.redraw_segments)

    def __call__(self, examples: ExampleSet, chosen: Sequence[int], step: int) -> dict[Role, dict[int, list[int]]]:
        """An answer of each kind for each example of ``chosen``, on every rank: token ids, with the one that ends it
        where it ended by itself."""
        drawn: dict[Role, dict[int, list[int]]] = {}
        with self.ema.in_place() if self.ema else contextlib.nullcontext():
            for role in sorted(self.prompts):  # wanted ones first: segments are of those that are taken
                drawn[role] = self._draw(role, examples.with_drawn(drawn), chosen, step)
        return drawn

    def _draw(self, role: Role, examples: ExampleSet, chosen: Sequence[int], step: int) -> dict[int, list[int]]:
        requests, wanted = self.prompts[role], role is Role.WANTED
        around = [
            self._around(examples.forget[i], i, step) if self.segments and not wanted else ((), ()) for i in chosen
        ]
        said = self.generation(
            "a wanted answer that is drawn anew" if wanted else "an unwanted answer that is drawn anew",
            [[*requests[i].ids, *before] for i, (before, _) in zip(chosen, around, strict=True)],
            self.tokens,
            [seed_of("wanted", self.seed, step, i) if wanted else seed_of(self.seed, step, i) for i in chosen],
        )
        drawn = {}
        for i, (before, after), ids in zip(chosen, around, said, strict=True):
            example = examples.forget[i]
            own = (example.wanted if wanted else example.unwanted)[0].segment
            whole = [*before, *ids, *((requests[i].end,) if len(ids) < self.tokens else after)]
            drawn[i] = whole[: self.max_length - own.answer_start]
        return drawn

    def _around(self, example: ForgetExample, i: int, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stays of a wanted answer before the segment that is drawn, and after it."""
        draw = random.Random(seed_of("segment", self.seed, step, i))
        ids = answer_ids(draw.choice(example.wanted))
        start = draw.randrange(max(1, len(ids) - 1))  # a token and the end, at least, are the model's
        return ids[:start], ids[start + self.tokens :]


class Replay:
    """The last ``size`` draws. Each example is given one of its own, which one that was given n times is with a weight
    of 1 / (n + 1), as in SAPO's buffer."""

    def __init__(self, size: int, seed: int, past: Sequence[Sequence[Any]] = ()) -> None:
        """``past``: what :meth:`state` was."""
        self.size, self.seed = size, seed
        # (example, its unwanted answer, its wanted one if that is drawn, how often it was given)
        self.draws = [list(draw) for draw in past]

    def state(self) -> list[list[Any]]:
        return [list(draw) for draw in self.draws]  # as they are now: a checkpoint may be written later

    def exchange(self, drawn: Mapping[Role, Mapping[int, list[int]]], step: int) -> dict[Role, dict[int, list[int]]]:
        """Keep what is ``drawn`` before ``step``, and give each of its examples one of its draws."""
        wanted, given = drawn.get(Role.WANTED, {}), {role: dict(own) for role, own in drawn.items()}
        self.draws += [[i, ids, wanted.get(i), 0] for i, ids in drawn[Role.UNWANTED].items()]
        del self.draws[: -self.size]
        for i in drawn[Role.UNWANTED]:
            own = [draw for draw in self.draws if draw[0] == i]
            if not own:  # more were drawn than are kept
                continue
            weights = [1 / (times + 1) for *_, times in own]
            (taken,) = random.Random(seed_of("replay", self.seed, step, i)).choices(own, weights)
            taken[3] += 1
            given[Role.UNWANTED][i] = taken[1]
            if wanted:
                given[Role.WANTED][i] = taken[2]
        return given


def check_redraw(o: UnlearningConfig, ds_json: Mapping[str, Any], terms: Terms) -> None:
    """Raises UserError where answers that are drawn anew have nothing to be compared to, or there is no place for
    averaged weights."""
    name = o.objective
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
    for flag, given in (("redraw_wanted_template", o.redraw_wanted_template), ("redraw_segments", o.redraw_segments)):
        if given and not terms.compares_wanted:
            raise UserError(f"--{flag}: no term of --objective {name} reads wanted answers: leave it out")
    zero = ds_json.get("zero_optimization", {})
    on_disk = zero.get("offload_param", {}).get("device") == "nvme"
    if o.redraw_ema and (on_disk or zero.get("zero_hpz_partition_size", 1) > 1):
        raise UserError("--redraw_ema works neither with parameters on NVMe nor with zero_hpz_partition_size")


def redraw_requests(
    o: UnlearningConfig,
    forget: Sequence[ForgetRecord],
    style: PromptStyle,
    tokenizer: Any,
    lm_config: Any,
    examples: ExampleSet,
    row_length: int,
    world: World,
) -> dict[Role, list[Request]]:
    """What is asked for an unwanted answer of each example, and for a wanted one if that is drawn, too; nothing if none
    are. Under ``auto`` the text of a template is what the user says; in a plain template it stands in place of that.

    Raises:
        UserError: a prompt is a chat, which no template can change, or leaves no room for an answer; or there is none.
    """
    if not o.redraw_steps:
        return {}
    asked = partial(_requests, forget=forget, style=style, tokenizer=tokenizer, row_length=row_length, world=world)
    requests = {Role.UNWANTED: asked("redraw_template", o.redraw_template)}
    if o.redraw_wanted_template is not None:
        requests[Role.WANTED] = asked("redraw_wanted_template", o.redraw_wanted_template)
    longest, positions = max(len(request.ids) for own in requests.values() for request in own), max_positions(lm_config)
    if o.redraw_segments:  # of which the model reads what comes before
        longest += max(answer.segment.answer_length for example in examples.forget for answer in example.wanted)
    if positions is not None and longest + o.redraw_tokens > positions:
        raise UserError(
            f"--redraw_tokens {o.redraw_tokens}: the longest prompt has {longest} tokens and the model only "
            f"{positions} positions: give at most {positions - longest}"
        )
    return requests


def _requests(
    flag: str,
    template: str | None,
    forget: Sequence[ForgetRecord],
    style: PromptStyle,
    tokenizer: Any,
    row_length: int,
    world: World,
) -> list[Request]:
    requests, cut = [], 0
    for record in forget:
        asked, written = record.prompt, style
        if not asked:
            raise UserError(f"--redraw_steps: {record.source} is plain text, without a prompt that could be answered")
        if template is not None:
            if not is_chat(asked, tokenizer, style):
                written = replace(style, template=template)
            elif isinstance(asked, str):
                asked = template.replace("{prompt}", asked)
            else:
                raise UserError(f"--{flag}: a chat has the tokenizer's own template: leave it out")
        with naming(record.source):
            prompt = encoded_prompt(asked, tokenizer, written, row_length)
        requests.append(Request(prompt.ids, end_of(asked, tokenizer, written)))
        cut += prompt.truncated
    if cut and template is not None:
        announce(
            world,
            f"--{flag}: {cut} of {len(requests)} prompts lose their start, the template's own first words "
            f"among it: they keep half of --max_length {row_length}",
        )
    return requests
