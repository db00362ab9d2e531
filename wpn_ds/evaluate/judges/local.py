"""A judge of one's own: a linear head on the hidden states of a frozen causal model that has read the answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from wpn_ds import __version__
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges.states import Base, Recipe
from wpn_ds.judging.base import Case, Input, Judge, Judgement, by_threshold
from wpn_ds.models.folder import check_place
from wpn_ds.models.load import Source
from wpn_ds.system.files import filled

FORMAT = 2
"""Version of the features and of the files; a judge of another version isn't loaded."""

_SETTINGS, _WEIGHTS = "judge.json", "weights.safetensors"

_OF_THRESHOLD = ("accuracy", "sensitivity", "specificity")
"""What training measured at the threshold that it chose."""


@dataclass(frozen=True)
class Head:
    """``P(harmful) = sigmoid((features - mean) / scale @ coef + intercept)``; the arrays are fp32, one a feature."""

    mean: np.ndarray
    scale: np.ndarray
    coef: np.ndarray
    intercept: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """P(harmful) of each row, fp64."""
        return 1 / (1 + np.exp(-self.margins(features)))

    def margins(self, features: np.ndarray) -> np.ndarray:
        """The log odds of that."""
        return ((features - self.mean) / self.scale).astype(np.float64) @ self.coef + self.intercept


def save(folder: Path, head: Head, base: Base, about: Mapping[str, Any]) -> None:
    """Writes a judge, its settings last: where they are, all of it is. ``about`` names its input and threshold, and
    what else is known of it."""
    with filled(folder, last=_SETTINGS) as partial:
        arrays = {"mean": head.mean, "scale": head.scale, "coef": head.coef}
        save_file(arrays | {"intercept": np.array([head.intercept])}, partial / _WEIGHTS)
        settings = {
            "format": FORMAT,
            "base": base.place,
            "base_commit": base.source.revision,
            "base_sha256": base.sha256,
            "layers": base.recipe.layers,
            "poolings": base.recipe.poolings,
            "max_tokens": base.recipe.max_tokens,
            **about,
        }
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        (partial / _SETTINGS).write_text(text, encoding="utf-8", errors="backslashreplace")


def versions() -> dict[str, str]:
    """Of the libraries that a judge's weights depend on."""
    import sklearn

    return {
        "wpn_ds": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit-learn": sklearn.__version__,
        "numpy": np.__version__,
    }


class LocalClassifier(Judge):
    """A judge that ``wpn-ds judge train`` made; harmful = its P(harmful) reaches the threshold. Its weights and its
    base model are loaded when it is first asked.

    Args:
        threshold: None: the one that training chose.
        base: the model that reads the answers; None: where it was in training.

    Raises:
        UserError: ``folder`` holds none, or, from a call, it is damaged, or the base model isn't there or is another.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threshold: float | None = None,
        base: str | None = None,
        device: torch.device | str = "cpu",
        name: str | None = None,
        flag: str = "--judge",
    ) -> None:
        self.name = name or f"local:{folder}"
        self._shown = f"{flag} {self.name}"
        self._path, self._device = Path(folder, _WEIGHTS), device
        with self._one_line():
            self._settings = json.loads(Path(folder, _SETTINGS).read_text(encoding="utf-8"))
            if self._settings["format"] != FORMAT:
                raise UserError(
                    f"{self._shown}: it has format {self._settings['format']}, not {FORMAT}: train it anew, "
                    "wpn-ds judge train --base MODEL"
                )
            self.input: Input = self._settings["input"]
            if self.input not in ("answer", "pair"):
                raise ValueError(f"its input is {self.input!r}")
            self._threshold = float(self._settings["threshold"] if threshold is None else threshold)
            self._place = str(base or self._settings["base"])
            self._commit = None if base else self._settings["base_commit"]
            self._sha256 = str(self._settings["base_sha256"])
            self._recipe = Recipe(
                tuple(self._settings["layers"]), tuple(self._settings["poolings"]), self._settings["max_tokens"]
            )
            self._path.stat()
        try:
            check_place(f"{self._shown}: its base model", self._place)
        except UserError as error:
            raise UserError(f"{error}; say where it is with ,base=MODEL") from error

    @cached_property
    def _loaded(self) -> tuple[Base, Head]:
        with self._one_line():
            arrays = load_file(self._path)
            head = Head(arrays["mean"], arrays["scale"], arrays["coef"], float(arrays["intercept"][0]))
        source = Source(self._place, f"{self._shown}: its base model", self._commit)
        base = Base(source, self._recipe, self._device)
        if base.sha256 != self._sha256:
            raise UserError(
                f"{self._shown}: its base model {self._place} isn't the one that it was trained on (other "
                "weights or another tokenizer): name that one with ,base=MODEL, or train it anew"
            )
        with self._one_line():
            if {array.shape for array in (head.mean, head.scale, head.coef)} != {(base.width,)}:
                raise ValueError(f"its weights have shape {head.coef.shape}")
            if not all(1 <= layer <= base.depth for layer in self._recipe.layers):
                raise ValueError(f"it reads layers {self._recipe.layers} of {base.depth}")
        return base, head

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(
                f"{self._shown}: there is no {Path(error.filename).name} in it: wpn-ds judge train makes one"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{self._shown}: it is damaged ({error})") from error

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._path.read_bytes()).hexdigest()
        own = {"judge": "local", "version": FORMAT, "weights_sha256": digest}
        left_out = {"format"} if self._threshold == self._settings["threshold"] else {"format", *_OF_THRESHOLD}
        known = {name: value for name, value in self._settings.items() if name not in left_out}
        return own | known | {"threshold": self._threshold}

    def scores(self, cases: Sequence[Case]) -> list[float]:
        """P(harmful) of each answer, degenerate or not."""
        if not cases:
            return []
        base, head = self._loaded
        prompts, answers = [case.prompt for case in cases], [case.answer for case in cases]
        return head.scores(base.features(prompts if self.input == "pair" else None, answers)).tolist()

    def _judge(self, cases: Sequence[Case], suite: Sequence[Case]) -> list[Judgement]:
        return by_threshold(self.scores(cases), self._threshold, self.name)
