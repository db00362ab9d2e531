"""``--fluency``: a classifier's probability that an answer is fluent text; the judges' models, asked the other way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from wpn_ds.errors import UserError
from wpn_ds.judging.base import Case

if TYPE_CHECKING:
    import torch

    from wpn_ds.evaluate.judges.classifier import ClassifierJudge
    from wpn_ds.evaluate.judges.local import LocalClassifier

FLUENCY_HELP = "hf:NAME[,clean=LABEL] (default label: clean), local:DIR (what it was trained to call harmful: garbled)"
"""For ``--fluency``."""

_FORMS = "hf:NAME, hf:NAME,clean=LABEL or local:DIR"


@contextlib.contextmanager
def _own_flag() -> Iterator[None]:
    """Errors of a classifier name the judges' flag."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--judge", "--fluency", 1)) from error


class Fluency:
    """P(clean) of an answer alone, whatever the question.

    Args:
        spec: ``hf:NAME[,clean=LABEL]``: the probability of that label of a Hugging Face classifier; ``local:DIR``: one
            less the P(harmful) of a ``wpn-ds judge train`` whose harmful answers were garbled ones.

    Raises:
        UserError: it is none of these, or isn't there.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu") -> None:
        self._spec = spec
        kind, _, rest = spec.partition(":")
        name, given, label = rest.partition(",clean=")
        if kind not in ("hf", "local") or not name or "," in name or bool(given) != bool(label):
            raise UserError(f"--fluency {spec}: give {_FORMS}")
        if kind == "local" and label:
            raise UserError(f"--fluency {spec}: a local classifier has no labels to choose: give local:DIR")
        self._inverse = kind == "local"
        self._classifier: ClassifierJudge | LocalClassifier
        with _own_flag():
            if kind == "local":
                from wpn_ds.evaluate.judges.local import LocalClassifier

                self._classifier = LocalClassifier(name, name=spec)
            else:
                from wpn_ds.evaluate.judges.classifier import ClassifierJudge

                self._classifier = ClassifierJudge(name, harmful=[label or "clean"], device=device, name=spec)
        if self._classifier.input == "pair":
            raise UserError(f"--fluency {spec}: it reads the prompt, too: train it with --input answer")

    def describe(self) -> dict[str, Any]:
        """Everything that its scores depend on, for the report."""
        with _own_flag():
            told = self._classifier.describe()
        clean = {} if self._inverse else {"clean": told["harmful"]}
        return clean | {name: value for name, value in told.items() if name not in ("harmful", "threshold", "judge")}

    def scores(self, answers: Sequence[str]) -> list[float]:
        """P(clean) of each, from 0 to 1.

        Raises:
            UserError: one is no number, or the classifier can't be loaded, which it is when it is first asked.
        """
        with _own_flag():
            found = self._classifier.scores([Case(answer, "", answer) for answer in answers])
        if not all(map(math.isfinite, found)):
            raise UserError(f"--fluency {self._spec}: gives scores that are no numbers (NaN): its weights are damaged")
        return [1 - score for score in found] if self._inverse else found
