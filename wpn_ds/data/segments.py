"""Segments in flat arrays: a few numbers beside each one's tokens, in memory or mapped from files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import numpy as np

from wpn_ds.data.plan import Segment

T = TypeVar("T")

Columns = dict[str, np.ndarray]
#: What a column's numbers are, and its shape; -1: as many rows as there are.
Shapes = dict[str, tuple[type, tuple[int, ...]]]


class Made(Sequence[T]):
    """A sequence whose items are made when they are asked for: of equal items, not always the same one. It is equal to
    any sequence with equal items; a slice is a list."""

    def made(self, i: int) -> T:
        """Item ``i``, from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        if isinstance(i, slice):
            return [self.made(k) for k in range(*i.indices(len(self)))]
        return self.made(range(len(self))[i])

    def __iter__(self) -> Iterator[T]:
        return map(self.made, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Segments(Made[Segment]):
    """Segments, each made of what the arrays have at its place.

    Attributes:
        ids: [T] int32, the tokens.
        start, stop: [n] int64: segment i has ``ids[start[i]:stop[i]]``.
        marks: [n, 5] int32, the other fields of :class:`Segment`, in their order.
    """

    SHAPES: ClassVar[Shapes] = {"ids": (np.int32, (-1,)), "ends": (np.int64, (-1,)), "marks": (np.int32, (-1, 5))}

    ids: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    marks: np.ndarray

    @classmethod
    def of(cls, columns: Columns) -> Segments:
        """Those of the columns of :attr:`SHAPES`; ``ends``: [n + 1] a 0, and where each one's tokens end."""
        ends = columns["ends"]
        return cls(columns["ids"], ends[:-1], ends[1:], columns["marks"])

    def made(self, i: int) -> Segment:
        prompt_start, answer_start, *flags = self.marks[i].tolist()
        ids = tuple(self.ids[self.start[i] : self.stop[i]].tolist())
        return Segment(ids, prompt_start, answer_start, *map(bool, flags))

    def __len__(self) -> int:
        return len(self.stop)

    def take(self, which: slice | np.ndarray) -> Segments:
        """Those of these numbers, in their order; the tokens are not copied."""
        return Segments(self.ids, self.start[which], self.stop[which], self.marks[which])

    @cached_property
    def answers_start(self) -> np.ndarray:
        """[n] where in ``ids`` each one's answer begins."""
        return self.start + self.marks[:, 1]

    @property
    def answer_lengths(self) -> np.ndarray:
        """[n] how many tokens of each are predicted."""
        return self.stop - self.answers_start

    @property
    def truncated(self) -> np.ndarray:
        """[n, 2] whether each one's prompt, and its answer, was cut: 0 or 1."""
        return self.marks[:, 2:4]

    @property
    def joined(self) -> np.ndarray:
        """[n] whether each one's prompt has other tokens with its answer than alone: 0 or 1."""
        return self.marks[:, 4]

    def with_answer(self, ids: Sequence[int]) -> np.ndarray:
        """The numbers of those whose answers have exactly these tokens."""
        found = np.flatnonzero(self.answer_lengths == len(ids))
        for t, token in enumerate(ids):
            found = found[self.ids[self.answers_start[found] + t] == token]
        return found


class Writer:
    """Columns in the making, which grow row by row."""

    def __init__(self, shapes: Shapes, folder: Path | None = None) -> None:
        """In files of ``folder``, or in memory."""
        self._shapes, self._folder, self._tokens = shapes, folder, 0
        self._streams: dict[str, Any] = {
            name: io.BytesIO() if folder is None else _file(folder, name).open("xb") for name in shapes
        }
        self.add("ends", [0])

    def add(self, name: str, rows: Any) -> None:
        """More rows of a column."""
        self._streams[name].write(np.asarray(rows, self._shapes[name][0]).tobytes())

    def add_segments(self, segments: Sequence[Segment]) -> None:
        """More rows of the columns of :class:`Segments`."""
        ends = self._tokens + np.cumsum([len(segment) for segment in segments], dtype=np.int64)
        self._tokens += sum(map(len, segments))
        self.add("ids", [token for segment in segments for token in segment.ids])
        self.add("ends", ends)
        self.add("marks", [_marks(segment) for segment in segments])

    def columns(self) -> Columns:
        """All columns; no more rows can be added."""
        if self._folder is not None:
            for stream in self._streams.values():
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            return mapped(self._folder, self._shapes)
        return {
            name: np.frombuffer(self._streams[name].getbuffer(), dtype).reshape(shape)
            for name, (dtype, shape) in self._shapes.items()
        }


def mapped(folder: Path, shapes: Shapes) -> Columns:
    """The columns that a :class:`Writer` has left in ``folder``, read when they are looked at.

    Raises:
        OSError, ValueError: there is none, or a part of a row.
    """
    return {name: _mapped(_file(folder, name), dtype).reshape(shape) for name, (dtype, shape) in shapes.items()}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if not path.stat().st_size:  # which can't be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # whose slices cost less


def _marks(segment: Segment) -> tuple[int, ...]:
    cut = segment.prompt_truncated, segment.answer_truncated
    return segment.prompt_start, segment.answer_start, *cut, segment.joined
