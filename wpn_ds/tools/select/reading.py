"""A model reads texts: its states, pooled, and the likelihood of answers, whatever the batch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.tokens import encode_answer, encode_pair, encoded_prompt, naming
from wpn_ds.errors import UserError
from wpn_ds.evaluate.model import AskedModel
from wpn_ds.evaluate.ranks import from_every_rank, from_rank_0
from wpn_ds.evaluate.scoring import right_padded, scored_answers
from wpn_ds.jobs.partitioned import let_go
from wpn_ds.losses.answers import Pooling, pool, pooling_matrix
from wpn_ds.models.generate import batches, evaluation_mode, side_by_side
from wpn_ds.models.load import Source, pad_token_id, pinned
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.progress import progress


class Text(NamedTuple):
    """What the model reads, and the record that it is from ("file:line")."""

    segment: Segment
    source: str


@dataclass(frozen=True)
class Settings:
    """How texts are read.

    Attributes:
        style: how prompts are written.
        max_length: tokens of a text at most; gives way to a model with fewer positions.
        batch_size: texts at a time; it doesn't change what is read.
        bf16: load models in bfloat16, not fp32.
        world: (rank, number of ranks), which read texts side by side.
        shared: each rank holds a part of a model's weights only.
    """

    style: PromptStyle
    max_length: int
    batch_size: int
    bf16: bool = False
    world: tuple[int, int] = (0, 1)
    shared: bool = False


class Reader:
    """A model by its flag and name, which is loaded for as long as it reads. Every rank must make the same calls.

    Attributes:
        max_length: tokens of a text at most.

    Raises:
        UserError: there is no such model, or no tokenizer beside it.
    """

    def __init__(self, flag: str, name: str, settings: Settings) -> None:
        # One commit for all ranks, should it change in between.
        source = from_rank_0(*settings.world, lambda: pinned(Source(name, flag)))
        self._model, self.settings = AskedModel(source, bf16=settings.bf16, shared=settings.shared), settings
        self.tokenizer = self._model.tokenizer
        self.max_length = min(settings.max_length, self._model.positions or settings.max_length)

    def prompt(self, record: ForgetRecord) -> Text:
        """The prompt alone."""
        with naming(record.source):
            ids, bos, *_ = encoded_prompt(record.prompt, self.tokenizer, self.settings.style, self.max_length)
        return Text(Segment(tuple(ids), prompt_start=bos, answer_start=len(ids)), record.source)

    def unwanted(self, record: ForgetRecord) -> list[Text]:
        """The prompt with each of its unwanted answers."""
        style, length = self.settings.style, self.max_length
        with naming(record.source):
            pairs = [encode_pair(record.prompt, text, self.tokenizer, style, length) for text in record.rejected]
        return [Text(pair, record.source) for pair in pairs]

    def retain(self, record: RetainRecord) -> Text:
        """The prompt with the answer, or plain text.

        Raises:
            UserError: the text has a single token, which training refuses as well.
        """
        style, length = self.settings.style, self.max_length
        with naming(record.source):
            segment = encode_answer(record.prompt, record.response, self.tokenizer, style, length)
        if segment.answer_length < 1:
            raise UserError(f'{record.source}: field "text" has a single token, nothing to compare: remove the line')
        return Text(segment, record.source)

    def states(self, texts: Sequence[Text], pooling: Pooling, *, penultimate: bool = False) -> Tensor:
        """``[texts, d]`` fp32 on the CPU: of each text the last layer's states (``penultimate``: those that the layer
        before it gives), pooled over all tokens but BOS.

        Raises:
            UserError: a state isn't finite.
        """

        def read(model: Any, segments: Sequence[Segment], pad: int) -> Tensor:
            ids, mask = right_padded(segments, pad)
            said = model.base_model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                output_hidden_states=penultimate,
            )
            states = said.hidden_states[-2] if penultimate else said.last_hidden_state
            start, stop = (
                torch.tensor(ends, device=model.device)
                for ends in ([one.prompt_start for one in segments], [len(one) for one in segments])
            )
            weights = pooling_matrix(start, stop, ids.shape[1], pooling)
            return torch.cat([pool(row, weight[None]).cpu() for row, weight in zip(states, weights, strict=True)])

        return self._of_each(texts, read)

    def nats(self, texts: Sequence[Text]) -> Tensor:
        """``[texts]`` fp64 on the CPU: each answer's negative log-likelihood, EOS included, summed over its tokens.

        Raises:
            UserError: one isn't finite.
        """

        def read(model: Any, segments: Sequence[Segment], pad: int) -> Tensor:
            whole = [[*range(len(segments))]]
            return torch.stack([nats.sum() for _, nats, _ in scored_answers(model, segments, pad, whole)])

        return self._of_each(texts, read)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[tuple[Any, int]]:
        """(the model in evaluation mode, the id that pads), as long as the context lasts."""
        model, _ = self._model.load()
        with evaluation_mode(model):
            yield model, pad_token_id(self.tokenizer)
        del model  # before another one is loaded
        let_go() if self.settings.shared else gc.collect()

    def _of_each(self, texts: Sequence[Text], read: Callable[[Any, Sequence[Segment], int], Tensor]) -> Tensor:
        """``[texts, ...]``: what ``read`` makes of (the model, a batch's segments, the id that pads), ``[batch, ...]``
        on the CPU, on every rank. The batches are made of all texts, whoever reads them.

        Raises:
            UserError: of all ranks at once, a value isn't finite.
        """
        rank, size = self.settings.world
        what = self._model.source.flag.removeprefix("--")
        parts = batches([text.segment.ids for text in texts], self.settings.batch_size)
        found: dict[int, Tensor] = {}
        with self.loaded() as (model, pad), progress(what=what, total=len(texts), unit="texts", quiet=rank > 0) as bar:
            for own in side_by_side(parts, rank, size):
                values = read(model, [texts[at].segment for at in own], pad)
                before = len(found)
                for part, theirs in from_every_rank((own, values), size):
                    found |= {at: self._finite(value, texts[at]) for at, value in zip(part, theirs, strict=True)}
                bar.update(len(found) - before)
            del model  # which nobody holds then when it is let go of
        return torch.stack([found[at] for at in range(len(texts))])

    def _finite(self, values: Tensor, text: Text) -> Tensor:
        if not values.isfinite().all():
            raise UserError(
                f"{self._model.source.flag} {self._model.name}: what it makes of {text.source} is not finite: its "
                "weights are damaged" + " or too large for --bf16" * self.settings.bf16
            )
        return values
