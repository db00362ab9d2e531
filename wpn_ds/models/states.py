"""The hidden states that a model's layers hand on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


def hidden(output: Any) -> Tensor:
    """The states in what a layer gives, which some families have in a tuple: [batch, tokens, width]."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def watched(layers: Sequence[Any], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """As long as the context lasts, ``see`` gets the index of each of ``layers`` and the states that it has just
    given."""
    handles = [
        layer.register_forward_hook(lambda _, __, output, at=at: see(at, hidden(output)))
        for at, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
