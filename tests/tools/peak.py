"""The most bytes that tensors hold at a time, on a machine whose allocator doesn't count them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wpn_ds.engine.step import Step
from wpn_ds.engine.train import train
from wpn_ds.settings.run import parse_args


class Peak(TorchDispatchMode):
    """Follows the bytes of all storages that are made under it. ``known``: tensors that were there before."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def of_steps(*argv: str) -> int:
    """That of a training job's steps on a rank of the pool: what loads and saves a model holds more on a machine whose
    device is the host."""
    highest, call = 0, Step.__call__
    with Peak() as peak:

        def measured(step: Step, *given: Any) -> Any:
            nonlocal highest
            peak.peak = peak.now
            result = call(step, *given)
            highest = max(highest, peak.peak)
            return result

        with mock.patch.object(Step, "__call__", measured):
            train(parse_args(argv))
    return highest
