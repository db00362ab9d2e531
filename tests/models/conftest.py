"""The models and the tokenizer that the evaluation's tests make too."""

from tests.evaluate.conftest import model, tokenizer

__all__ = ["model", "tokenizer"]
