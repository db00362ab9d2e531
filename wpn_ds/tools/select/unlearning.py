"""A model unlearns weighted records in a few steps, says what each costs it then, and is put back for the next time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.errors import UserError
from wpn_ds.evaluate.relearning import with_adapters
from wpn_ds.evaluate.scoring import scored_answers, token_losses
from wpn_ds.models.generate import batches
from wpn_ds.system.progress import progress
from wpn_ds.tools.select.command import Worst
from wpn_ds.tools.select.reading import Reader


@contextlib.contextmanager
def unlearning(
    reader: Reader, forget: Sequence[Sequence[Segment]], retain: Sequence[Segment], options: Worst
) -> Iterator[Unlearning]:
    """The model of ``reader`` to unlearn from, as long as the context lasts; see :class:`Unlearning`.

    Raises:
        UserError: memory doesn't suffice.
    """
    with reader.loaded() as (model, pad), torch.enable_grad():
        try:
            with _learner(reader, model, pad, options) as learner:
                yield Unlearning(learner, forget, retain, options, quiet=reader.settings.world[0] > 0)
        except torch.OutOfMemoryError as error:
            if options.share_weights:
                advice = "select worst: no memory for the ranks' parts of what unlearns: start more ranks"
            else:
                advice = "--batch_size: no memory to unlearn so many at once: lower it"
            raise UserError(f"{advice}, or give --lora_r") from error


class Learner(Protocol):
    """A model that steps along the sign of a gradient, its parameters that require one. ``done`` is told how many texts
    more have been read."""

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """What steps change while it lasts is undone."""

    def step(self, texts: Sequence[Segment], scales: Sequence[float], done: Callable[[int], object]) -> None:
        """One step down the sum of each text's nats times its scale."""

    def nats(self, texts: Sequence[Segment], done: Callable[[int], object]) -> Tensor:
        """``[texts]`` fp64 on the CPU: each answer's negative log-likelihood, summed over its tokens."""


@contextlib.contextmanager
def _learner(reader: Reader, model: Any, pad: int, options: Worst) -> Iterator[Learner]:
    rate, rank, seed = options.learning_rate, options.lora_r, options.seed
    if options.share_weights:
        from wpn_ds.engine.unlearning import Unlearner  # loads deepspeed, which takes seconds

        with contextlib.closing(Unlearner(model, reader.tokenizer, rate, rank, seed, reader.max_length)) as learner:
            yield learner
    else:
        yield OwnLearner(with_adapters(model, rank, seed) if rank else model, pad, rate, options.batch_size)


class OwnLearner:
    """The model on this process's device alone, in evaluation mode; ``pad`` is the id that pads."""

    def __init__(self, model: Any, pad: int, learning_rate: float, batch_size: int) -> None:
        self._model, self._pad, self._rate, self._batch_size = model, pad, learning_rate, batch_size
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._start = [parameter.detach().clone() for parameter in self._trained]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        yield
        for parameter, start in zip(self._trained, self._start, strict=True):
            parameter.data.copy_(start)

    def step(self, texts: Sequence[Segment], scales: Sequence[float], done: Callable[[int], object]) -> None:
        for chosen in self._batches(texts, done):
            losses, _ = token_losses(self._model, [texts[at] for at in chosen], self._pad)
            each = [scales[at] for at in chosen for _ in range(texts[at].answer_length)]
            (losses @ losses.new_tensor(each)).backward()
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.data.sub_(self._rate * parameter.grad.sign())
                parameter.grad = None

    def nats(self, texts: Sequence[Segment], done: Callable[[int], object]) -> Tensor:
        sums = torch.zeros(len(texts), dtype=torch.float64)
        for at, nats, _ in scored_answers(self._model, texts, self._pad, self._batches(texts, done)):
            sums[at] = nats.sum()
        return sums

    def _batches(self, texts: Sequence[Segment], done: Callable[[int], object]) -> Iterator[list[int]]:
        for chosen in batches([text.ids for text in texts], self._batch_size):
            yield chosen
            done(len(chosen))


class Unlearning:
    """Gradient difference (arXiv 2203.12817) by the gradient's sign: theta <- theta - learning_rate sign(g), where g is
    the gradient of (mean nats a token of retain texts) - sum_i w_i l_i / sum_i w_i, and l_i the mean nats a token of
    all unwanted answers of record i.

    A step is over all records of weight above 0, and as many retain texts as there are unwanted answers (all, if they
    are fewer), drawn by the seed alike for any weights. So the batch size matters by rounding alone; but where a
    gradient is all but 0, rounding decides its sign.

    Args:
        learner: the model, at its start.
        forget: each record's prompts with its unwanted answers.
        retain: texts to keep likely; may be empty.
        quiet: this rank shows no progress.
    """

    def __init__(
        self,
        learner: Learner,
        forget: Sequence[Sequence[Segment]],
        retain: Sequence[Segment],
        options: Worst,
        *,
        quiet: bool = False,
    ) -> None:
        self._learner, self._options, self._quiet = learner, options, quiet
        self._forget, self._retain = [answer for answers in forget for answer in answers], retain
        self._parts = torch.tensor([len(answers) for answers in forget])
        self._tokens = torch.tensor([sum(one.answer_length for one in answers) for answers in forget]).double()

    def __call__(self, weights: Tensor) -> Tensor:
        """``[records]`` fp64: every record's mean nats a token after the starting model unlearned them by ``weights``.

        Raises:
            UserError: one isn't finite.
        """
        draw, forget = random.Random(self._options.seed), self._forget
        shares = -(weights / weights.sum() / self._tokens).repeat_interleave(self._parts)
        kept = min(len(self._retain), len(forget))
        total = self._options.steps * (len(forget) + kept) + len(forget)
        with progress(what="unlearning", total=total, unit="texts", quiet=self._quiet) as bar, self._learner.kept():
            for _ in range(self._options.steps):
                retain = draw.sample(self._retain, kept)
                length = sum(text.answer_length for text in retain)
                self._step([*forget, *retain], [*shares.tolist(), *[1 / length for _ in retain]], bar)
            sums = self._learner.nats(forget, bar.update)
        if not sums.isfinite().all():
            raise UserError("--learning_rate: a round's unlearning made losses that are not finite: lower it")
        return torch.stack([part.sum() for part in sums.split(self._parts.tolist())]) / self._tokens

    def _step(self, texts: Sequence[Segment], scales: Sequence[float], bar: Any) -> None:
        """One step; a text of scale 0 isn't read."""
        read = [(text, scale) for text, scale in zip(texts, scales, strict=True) if scale]
        bar.update(len(texts) - len(read))
        texts, scales = zip(*read, strict=True)
        self._learner.step(texts, scales, bar.update)
