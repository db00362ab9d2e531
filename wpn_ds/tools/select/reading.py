"""A model reads texts: its states, pooled, and the likelihood of answers, whatever the batch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord
from wpn_ds.data.tokens import encode_answer, encode_pair, encoded_prompt, naming
from wpn_ds.errors import UserError
from wpn_ds.evaluate.model import AskedModel
from wpn_ds.evaluate.scoring import right_padded, scored_answers
from wpn_ds.losses.answers import Pooling, pool, pooling_matrix
from wpn_ds.models.generate import batches, evaluation_mode
from wpn_ds.models.load import Source, pad_token_id
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
    """

    style: PromptStyle
    max_length: int
    batch_size: int
    bf16: bool = False


class Reader:
    """A model by its flag and name, which is loaded for as long as it reads.

    Raises:
        UserError: there is no such model, or no tokenizer beside it.
    """

    def __init__(self, flag: str, name: str, settings: Settings) -> None:
        self._model, self._settings = AskedModel(Source(name, flag), bf16=settings.bf16), settings
        self._tokenizer = self._model.tokenizer
        self._max_length = min(settings.max_length, self._model.positions or settings.max_length)

    def prompt(self, record: ForgetRecord) -> Text:
        """The prompt alone."""
        with naming(record.source):
            ids, bos, *_ = encoded_prompt(record.prompt, self._tokenizer, self._settings.style, self._max_length)
        return Text(Segment(tuple(ids), prompt_start=bos, answer_start=len(ids)), record.source)

    def unwanted(self, record: ForgetRecord) -> list[Text]:
        """The prompt with each of its unwanted answers."""
        style, length = self._settings.style, self._max_length
        with naming(record.source):
            pairs = [encode_pair(record.prompt, text, self._tokenizer, style, length) for text in record.rejected]
        return [Text(pair, record.source) for pair in pairs]

    def retain(self, record: RetainRecord) -> Text:
        """The prompt with the answer, or plain text.

        Raises:
            UserError: the text has a single token, which training refuses as well.
        """
        style, length = self._settings.style, self._max_length
        with naming(record.source):
            segment = encode_answer(record.prompt, record.response, self._tokenizer, style, length)
        if segment.answer_length < 1:
            raise UserError(f'{record.source}: field "text" has a single token, nothing to compare: remove the line')
        return Text(segment, record.source)

    def states(self, texts: Sequence[Text], pooling: Pooling, *, penultimate: bool = False) -> Tensor:
        """``[texts, d]`` fp32 on the CPU: of each text the last layer's states (``penultimate``: those that the layer
        before it gives), pooled over all tokens but BOS.

        Raises:
            UserError: a state isn't finite.
        """
        pooled: list[Tensor] = [torch.empty(0)] * len(texts)
        with self._loaded() as model:
            for chosen in self._batches(texts):
                segments = [texts[at].segment for at in chosen]
                ids, mask = right_padded(segments, pad_token_id(self._tokenizer))
                read = model.base_model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    use_cache=False,
                    output_hidden_states=penultimate,
                )
                states = read.hidden_states[-2] if penultimate else read.last_hidden_state
                start, stop = (
                    torch.tensor(ends, device=model.device)
                    for ends in ([one.prompt_start for one in segments], [len(one) for one in segments])
                )
                weights = pooling_matrix(start, stop, ids.shape[1], pooling)
                for at, row, weight in zip(chosen, states, weights, strict=True):
                    pooled[at] = self._finite(pool(row, weight[None])[0].cpu(), texts[at])
        return torch.stack(pooled)

    def nats(self, texts: Sequence[Text]) -> Tensor:
        """``[texts]`` fp64 on the CPU: each answer's negative log-likelihood, EOS included, summed over its tokens.

        Raises:
            UserError: one isn't finite.
        """
        sums = torch.zeros(len(texts), dtype=torch.float64)
        with self._loaded() as model:
            pad, segments = pad_token_id(self._tokenizer), [text.segment for text in texts]
            for at, nats, _ in scored_answers(model, segments, pad, self._batches(texts)):
                sums[at] = self._finite(nats.sum(), texts[at])
        return sums

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[Any]:
        model, _ = self._model.load()
        with evaluation_mode(model):
            yield model
        del model  # before another one is loaded
        gc.collect()

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        what = self._model.source.flag.removeprefix("--")
        with progress(what=what, total=len(texts), unit="texts") as bar:
            for chosen in batches([text.segment.ids for text in texts], self._settings.batch_size):
                yield chosen
                bar.update(len(chosen))

    def _finite(self, values: Tensor, text: Text) -> Tensor:
        if not values.isfinite().all():
            raise UserError(
                f"{self._model.source.flag} {self._model.name}: what it makes of {text.source} is not finite: its "
                "weights are damaged" + " or too large for --bf16" * self._settings.bf16
            )
        return values
