from __future__ import annotations

from typing import Any

import pytest

from wpn_ds.models.plant import train_tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens with OPT's rule."""
    return train_tokenizer(["Question: how do I wash a car?\nAnswer: with water and a cloth."] * 20, 300)


@pytest.fixture(params=["small", "opt", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_tokenizer")
