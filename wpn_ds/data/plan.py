"""What a step reads, as every rank sees it: segments, in the rows and micro-batches in which the ranks compute them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wpn_ds.objectives.terms import Role


@dataclass(frozen=True)
class Segment:
    """One sequence as the model reads it alone: a prompt with one answer, or plain text.

    ``ids[:answer_start]`` is the prompt (with its BOS), ``ids[answer_start:]`` the answer with the token that ends its
    turn. ``prompt_start`` is the first prompt token after the BOS tokens: pooling leaves BOS out.
    For plain text both are the first position that has something before it, so that every token but the first is
    predicted. ``joined``: the conversation doesn't begin with the tokens of its prompt alone, which is what is asked.
    """

    ids: tuple[int, ...]
    prompt_start: int
    answer_start: int
    prompt_truncated: bool = False
    answer_truncated: bool = False
    joined: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def answer_length(self) -> int:
        """Number of tokens that are predicted: the answer's, EOS included."""
        return len(self.ids) - self.answer_start


@dataclass(frozen=True)
class Item:
    """One segment in a plan.

    Attributes:
        index: its place among the plan's items of the same role; of a retain segment, its number in the data.
        shared: how many of its first tokens, its prompt or the beginning of it, are not computed again: they are those
            of the last item before it in the row that shares nothing.
    """

    segment: Segment
    role: Role
    index: int
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed for it."""
        return len(self.segment) - self.shared


Row = tuple[Item, ...]
MicroBatch = tuple[Row, ...]


def row_tokens(row: Row) -> int:
    return sum(item.tokens for item in row)


def with_padding(micro_batch: MicroBatch) -> int:
    """Tokens of its rows, all as long as the longest."""
    return len(micro_batch) * max(row_tokens(row) for row in micro_batch)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, as every rank sees it.

    Attributes:
        wanted_ids, unwanted_ids: ``answer_id`` of every wanted and unwanted answer, [n_wanted] and [n_unwanted]: rows
            of the bank.
        negative_mask: [n_wanted, n_unwanted] True where the unwanted answer is a negative of the pair under
            ``--wpn_negatives step``: its text is not one of the example's wanted texts.
        own_mask: the same for ``own``: the unwanted answer is also the example's own.
        wanted_texts: per pair, the ``text_id`` of all of its example's wanted answers (masks the bank's negatives).
        label_tokens: by role, the global number of tokens that its answers have, which a mean over them is divided by.
        tokens: real tokens of all ranks' rows; a shared prompt counts once.
        padded_tokens: the same with padding and dead rows.
        micro_batches: [rank][k].
        support: how many of each rank's micro-batches, its first ones, are of the support half of the examples; 0: the
            step is not in halves.
    """

    wanted_ids: np.ndarray
    unwanted_ids: np.ndarray
    negative_mask: np.ndarray
    own_mask: np.ndarray
    wanted_texts: tuple[frozenset[int], ...]
    label_tokens: dict[Role, int]
    tokens: int
    padded_tokens: int
    micro_batches: list[list[MicroBatch]]
    support: int = 0

    def load(self, rank: int) -> int:
        """The part of ``padded_tokens`` that one rank computes."""
        return sum(with_padding(micro_batch) for micro_batch in self.micro_batches[rank])

    def roles(self, k: int) -> frozenset[Role]:
        """The roles in any rank's micro-batch ``k``."""
        return frozenset(item.role for rank in self.micro_batches for row in rank[k] for item in row)

    def items(self, which: Iterable[int], role: Role) -> np.ndarray:
        """[n] the indices of the items of ``role`` in any rank's micro-batches of these numbers, in rising order."""
        rows = (row for k in which for rank in self.micro_batches for row in rank[k])
        return np.array(sorted(item.index for row in rows for item in row if item.role is role), dtype=np.int64)

    def mask(self, pairs: str) -> np.ndarray:
        """[n_wanted, n_unwanted] True where the two are compared, by :attr:`OnAnswers.pairs`."""
        return self.own_mask if pairs == "own" else self.negative_mask

    def is_local(self, mask: np.ndarray) -> bool:
        """Whether every pair (True in ``mask`` [n_wanted, n_unwanted]) has both answers in one micro-batch."""
        places = {Role.WANTED: np.zeros(mask.shape[0], int), Role.UNWANTED: np.zeros(mask.shape[1], int)}
        every = (micro_batch for rank in self.micro_batches for micro_batch in rank)
        for number, micro_batch in enumerate(every):
            for item in (item for row in micro_batch for item in row if item.role in places):
                places[item.role][item.index] = number
        return not (mask & (places[Role.WANTED][:, None] != places[Role.UNWANTED][None, :])).any()
