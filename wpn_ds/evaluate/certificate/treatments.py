"""What is done to a model's weights, states or embeddings before it is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_pair, encode_prompt
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.model import AskedModel, Treatment
from wpn_ds.evaluate.relearning import BATCH, examples
from wpn_ds.evaluate.scoring import right_padded, token_losses
from wpn_ds.evaluate.soft_prompt import closing, read_as, with_vectors
from wpn_ds.jobs.partitioned import gathered
from wpn_ds.models.folder import identity
from wpn_ds.models.generate import batches, evaluation_mode, is_partitioned
from wpn_ds.models.load import Source, decoder_layers, max_positions, pad_token_id, pinned
from wpn_ds.models.rounding import FORMATS, round_model
from wpn_ds.models.states import hidden, watched
from wpn_ds.system.progress import progress

SOFT_RATE = 0.1
"""Adam's, of a soft prompt's numbers, in root mean squares of the embeddings that it begins as (ours)."""


def rounding(name: str) -> Treatment:
    """To the number format ``name`` and back."""
    return Treatment(["rounded", name], lambda lm, _: round_model(lm, FORMATS[name], gathered=gathered))


def rounding_away(name: str, start: Source) -> Treatment:
    """The same, with what unlearning moved rounded to the side away from the model ``start`` that it was before."""

    def apply(lm: Any, _: Any) -> None:
        before = AskedModel(start, bf16=lm.dtype == torch.bfloat16, shared=is_partitioned(lm))
        round_model(lm, FORMATS[name], before.load()[0], gathered)

    return Treatment(["rounded away", name, identity(pinned(start).address)], apply)


@dataclass(frozen=True)
class Directed:
    """Takes a direction out of a model's states: the difference of the means over ``harmful`` and over ``harmless``
    prompts, at their last token after the middle layer (arXiv 2406.11717), which in a model that refuses is the
    refusal's. It is taken out of what each decoder layer hands on."""

    harmful: Sequence[ForgetRecord]
    harmless: Sequence[ForgetRecord]
    asking: Asking

    @property
    def treatment(self) -> Treatment:
        told = [[repr(record.prompt) for record in records] for records in (self.harmful, self.harmless)]
        return Treatment(["direction", told, repr(self.asking.style)], self._apply)

    def _apply(self, lm: Any, tokenizer: Any) -> None:
        harmful, harmless = (self._mean(lm, tokenizer, records) for records in (self.harmful, self.harmless))
        direction = torch.nn.functional.normalize((harmful - harmless).float(), dim=0)

        def without(_: Any, __: Any, output: Any) -> Any:
            states = hidden(output)
            along = direction.to(states)
            states = states - (states @ along).unsqueeze(-1) * along
            return (states, *output[1:]) if isinstance(output, tuple) else states

        for layer in decoder_layers(lm):
            layer.register_forward_hook(without)

    def _mean(self, lm: Any, tokenizer: Any, records: Sequence[ForgetRecord]) -> Tensor:
        """[d]: over the prompts, of the state at the last token after the middle layer."""
        room = _room(self.asking, lm)
        ids = [encode_prompt(record.prompt, tokenizer, self.asking.style, room) for record in records]
        every, sums = decoder_layers(lm), []
        states: list[Tensor] = []
        with watched([every[len(every) // 2]], lambda _, output: states.append(output)), evaluation_mode(lm):
            for part in batches(ids, self.asking.batch_size):
                read = [Segment(tuple(ids[at]), 0, len(ids[at])) for at in part]
                padded, mask = right_padded(read, pad_token_id(tokenizer))
                lm(input_ids=padded.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
                last = (mask.sum(1) - 1).to(lm.device)
                sums.append(states.pop()[torch.arange(len(part)), last].float().sum(0))
        return torch.stack(sums).sum(0) / len(ids)


@dataclass(frozen=True)
class SoftPrompt:
    """Vectors after a question, at the end of the user's turn, that bring the unwanted answers of ``taught`` out of a
    frozen model: ``steps`` of Adam on their mean NLL, in batches of 8. Any words at that place are among the vectors,
    so that it bounds what attacks on the prompt find, as far as its steps go (arXiv 2402.09063; one for all questions,
    begun as tokens of the answers, and its rate are ours).

    The questions of a suite have as many such vectors (``PromptSuite.soft``).
    """

    taught: Sequence[ForgetRecord]
    vectors: int
    steps: int
    asking: Asking
    seed: int

    @property
    def treatment(self) -> Treatment:
        told = [[repr(record.prompt), record.rejected] for record in self.taught]
        content = ["soft prompt", told, self.vectors, self.steps, repr(self.asking.style), self.seed]
        return Treatment(content, self._apply)

    def _apply(self, lm: Any, tokenizer: Any) -> None:
        read = [self._read(*one, lm, tokenizer) for one in examples(self.taught, BATCH * self.steps, self.seed)]
        said = [token for one in read for token in one.ids[one.answer_start :]]
        begun = random.Random(self.seed).choices(said, k=self.vectors)
        lm.requires_grad_(False).eval()
        vectors = lm.get_input_embeddings()(torch.tensor(begun, device=lm.device)).float().requires_grad_(True)
        read_as(lm, vectors)
        optimizer = torch.optim.Adam([vectors], lr=SOFT_RATE * float(vectors.detach().square().mean().sqrt()))
        for step in progress(range(self.steps), "soft prompt", unit="steps"):
            losses, _ = token_losses(lm, read[BATCH * step : BATCH * (step + 1)], pad_token_id(tokenizer))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        vectors.requires_grad_(False)

    def _read(self, record: ForgetRecord, answer: str, lm: Any, tokenizer: Any) -> Segment:
        """The record with its answer, and the vectors where the question ends."""
        style, room = self.asking.style, _room(self.asking, lm) - 2 * self.vectors
        pair = encode_pair(record.prompt, answer, tokenizer, style, room)
        place = pair.answer_start - closing(record.prompt, tokenizer, style, room)
        ids = tuple(with_vectors(pair.ids, place, self.vectors))
        return replace(pair, ids=ids, answer_start=pair.answer_start + self.vectors)


def _room(asking: Asking, lm: Any) -> int:
    """Tokens that a prompt with its answer has at most."""
    return min(asking.max_length, max_positions(lm.config) or asking.max_length)
