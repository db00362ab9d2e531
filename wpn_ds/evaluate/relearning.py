"""How fast does the harm come back? A few fine-tuning steps on unwanted answers, and the prompts asked after each few.

A model that only hides what it knew gives it back after fewer steps than one that never knew it: compare with the
baseline's curve, and with a low rate at step 0.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair, encode_prompt, render_prompt
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking, Generation, judge_answers
from wpn_ds.evaluate.results import Suite
from wpn_ds.evaluate.scoring import token_losses
from wpn_ds.evaluate.suites import RELEARNING_PREFIX, PromptSuite
from wpn_ds.evaluate.work import Unit
from wpn_ds.judging.base import Judge
from wpn_ds.models.adapters import attach
from wpn_ds.models.generate import generate, is_partitioned
from wpn_ds.models.load import pad_token_id
from wpn_ds.settings.lora import LoraConfig

BATCH = 8


@dataclass(frozen=True)
class Lessons:
    """What is taught, and what is asked then.

    Attributes:
        taught: records whose unwanted answers the model is fine-tuned on, in an order that the seed decides.
        asked: prompts that are answered after each number of steps; better not the taught ones.
        steps: numbers of optimizer steps (AdamW, batches of 8, constant ``learning_rate``), rising, from 0.
        lora_r: rank of the adapters that are trained in place of the weights; 0: the weights are.
    """

    taught: Sequence[ForgetRecord]
    asked: PromptSuite
    steps: Sequence[int]
    learning_rate: float
    seed: int = 0
    lora_r: int = 0


class Relearning:
    """The curve on one model: one unit of work, then a suite ``relearning/STEPS`` after each number of steps."""

    def __init__(self, lessons: Lessons, asking: Asking, tokenizer: Any) -> None:
        self._asked, self._steps = lessons.asked, list(lessons.steps)
        steps, asked = self._steps, self._asked
        pairs = [
            encode_pair(record.prompt, answer, tokenizer, asking.style, asking.max_length)
            for record, answer in examples(lessons.taught, BATCH * max(steps), lessons.seed)
        ]
        prompts = [encode_prompt(r.prompt, tokenizer, asking.style, asking.max_length) for r in asked.records]
        self._read = [render_prompt(r.prompt, tokenizer, asking.style) for r in asked.records]

        def run(model: Any, tokenizer: Any) -> list[list[str]]:
            said, done = [], 0
            with _learner(model, tokenizer, lessons, asking.max_length) as learner:
                for step in steps:
                    for at in range(done, step):
                        learner.teach(pairs[BATCH * at : BATCH * (at + 1)])
                    done = step
                    said.append(learner.answers(prompts, asking.max_new_tokens, asking.batch_size))
            return said

        content = [[pair.ids for pair in pairs], prompts, steps, lessons.learning_rate, asking.max_new_tokens]
        content += [lessons.lora_r] if lessons.lora_r else []
        self.unit = Unit("relearning", content, len(prompts) * len(steps), run)

    def judged(self, result: list[list[str]], judges: Sequence[Judge]) -> dict[str, Suite]:
        """The suites by name from the finished unit's ``result``."""
        suites = {}
        for step, texts in zip(self._steps, result, strict=True):
            named = replace(self._asked, name=f"{RELEARNING_PREFIX}{step}")
            said = [Generation(read, at, text) for at, (read, text) in enumerate(zip(self._read, texts, strict=True))]
            suites[named.name] = judge_answers(named, said, judges)
        return suites


def examples(taught: Sequence[ForgetRecord], count: int, seed: int) -> list[tuple[ForgetRecord, str]]:
    """So many records with one of their unwanted answers, drawn by the seed."""
    order = random.Random(seed)
    pool = [record for record in taught if record.rejected]
    chosen = [order.choice(pool) for _ in range(count)]
    return [(record, order.choice(record.rejected)) for record in chosen]


class Learner(Protocol):
    """A copy of the model that learns."""

    def teach(self, segments: Sequence[Segment]) -> None:
        """One update on the mean NLL of the answers' tokens: AdamW without decay, the gradient clipped at a norm of
        1."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, batch_size: int) -> list[str]:
        """Greedy ones, of so many tokens at most."""


@contextlib.contextmanager
def _learner(model: Any, tokenizer: Any, lessons: Lessons, max_length: int) -> Iterator[Learner]:
    rate, rank, seed = lessons.learning_rate, lessons.lora_r, lessons.seed
    if is_partitioned(model):
        from wpn_ds.engine.relearning import Learner as SharedLearner  # loads deepspeed, which takes seconds

        try:
            learner = SharedLearner(model, tokenizer, rate, rank, seed, max_length)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "relearning: no memory for the ranks' parts of what learns: start more ranks, give --relearn_lora_r or "
                "leave it out"
            ) from error
        with contextlib.closing(learner):
            yield learner
    else:
        yield OwnLearner(with_adapters(model, rank, seed) if rank else _copy(model), tokenizer, rate)


class OwnLearner:
    """A copy on this rank's device alone, whatever other ranks do."""

    def __init__(self, lm: Any, tokenizer: Any, learning_rate: float) -> None:
        self.lm, self.tokenizer = lm, tokenizer
        self.trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0)

    def teach(self, segments: Sequence[Segment]) -> None:
        self.optimizer.zero_grad()
        losses, _ = token_losses(self.lm, segments, pad_token_id(self.tokenizer))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, batch_size: int) -> list[str]:
        return generate(self.lm, self.tokenizer, prompts, max_new_tokens=tokens, batch_size=batch_size)


def _copy(model: Any) -> Any:
    """A copy in fp32, where small steps are not rounded away: with gradient and AdamW's state, 16 bytes a parameter."""
    try:
        return copy.deepcopy(model).float().eval().requires_grad_(True)  # eval: no dropout, so every rank says the same
    except torch.OutOfMemoryError as error:
        raise UserError(
            "relearning: no memory for a second model in fp32; give --relearn_lora_r, or leave it out"
        ) from error


def with_adapters(model: Any, rank: int, seed: int) -> Any:
    """A model of the same weights, which stay, with adapters in fp32: with their gradient and AdamW's state little more
    than the model alone, whatever its number format."""
    frozen = {id(weight): torch.nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    learner = copy.deepcopy(model, frozen)
    attach(learner, LoraConfig(lora_r=rank), seed)
    for weight in learner.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return learner.eval()  # no dropout, so every rank says the same
