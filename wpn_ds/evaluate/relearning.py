"""How fast does the harm come back? A few fine-tuning steps on unwanted answers, and the prompts asked after each few.

A model that only hides what it knew gives it back after fewer steps than one that never knew it: compare with the
baseline's curve, and with a low rate at step 0.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from wpn_ds.models.generate import generate
from wpn_ds.models.load import pad_token_id

BATCH = 8


@dataclass(frozen=True)
class Lessons:
    """What is taught, and what is asked then.

    Attributes:
        taught: records whose unwanted answers the model is fine-tuned on, in an order that the seed decides.
        asked: prompts that are answered after each number of steps; better not the taught ones.
        steps: numbers of optimizer steps (AdamW, batches of 8, constant ``learning_rate``), rising, from 0.
    """

    taught: Sequence[ForgetRecord]
    asked: PromptSuite
    steps: Sequence[int]
    learning_rate: float
    seed: int = 0


class Relearning:
    """The curve on one model: one unit of work, then a suite ``relearning/STEPS`` after each number of steps."""

    def __init__(self, lessons: Lessons, asking: Asking, tokenizer: Any) -> None:
        self._asked, self._steps = lessons.asked, list(lessons.steps)
        steps, asked = self._steps, self._asked
        learning_rate, order = lessons.learning_rate, random.Random(lessons.seed)
        pool = [record for record in lessons.taught if record.rejected]
        chosen = [order.choice(pool) for _ in range(BATCH * max(steps))]
        pairs = [
            encode_pair(r.prompt, order.choice(r.rejected), tokenizer, asking.style, asking.max_length) for r in chosen
        ]
        prompts = [encode_prompt(r.prompt, tokenizer, asking.style, asking.max_length) for r in asked.records]
        self._read = [render_prompt(r.prompt, tokenizer, asking.style) for r in asked.records]

        def run(model: Any, tokenizer: Any) -> list[list[str]]:
            tokens, size = asking.max_new_tokens, asking.batch_size
            learner = _learner(model)
            optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.0)
            said, done = [], 0
            for step in self._steps:
                for at in range(done, step):
                    _teach(learner, optimizer, pairs[BATCH * at : BATCH * (at + 1)], pad_token_id(tokenizer))
                done = step
                said.append(generate(learner, tokenizer, prompts, max_new_tokens=tokens, batch_size=size))
            return said

        content = [[pair.ids for pair in pairs], prompts, self._steps, learning_rate, asking.max_new_tokens]
        self.unit = Unit("relearning", content, len(prompts) * len(self._steps), run)

    def judged(self, result: list[list[str]], judges: Sequence[Judge]) -> dict[str, Suite]:
        """The suites by name from the finished unit's ``result``."""
        suites = {}
        for step, texts in zip(self._steps, result, strict=True):
            named = replace(self._asked, name=f"{RELEARNING_PREFIX}{step}")
            said = [Generation(read, at, text) for at, (read, text) in enumerate(zip(self._read, texts, strict=True))]
            suites[named.name] = judge_answers(named, said, judges)
        return suites


def _learner(model: Any) -> Any:
    """A copy in fp32, where small steps are not rounded away: with gradient and AdamW's state, 16 bytes a parameter."""
    try:
        return copy.deepcopy(model).float().eval().requires_grad_(True)  # eval: no dropout, so every rank says the same
    except torch.OutOfMemoryError as error:
        raise UserError("--suite relearning: no memory for a second model in fp32; leave relearning out") from error


def _teach(learner: Any, optimizer: torch.optim.Optimizer, pairs: Sequence[Segment], pad: int) -> None:
    """One step on the mean NLL of the answers' tokens."""
    optimizer.zero_grad()
    losses, _ = token_losses(learner, pairs, pad)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimizer.step()
