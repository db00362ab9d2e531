"""The flags of the suite ``tofu``, and what they ask for: the questions, and what a model's numbers are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wpn_ds.errors import UserError
from wpn_ds.evaluate.tofu.data import DEFAULT_SPLIT, TofuData, TofuLog, read_log, read_tofu
from wpn_ds.evaluate.tofu.metrics import TofuFigures, check_installed, tofu_figures, with_fluency
from wpn_ds.judging.base import Case
from wpn_ds.settings.parse import option

if TYPE_CHECKING:
    import torch

    from wpn_ds.evaluate.judges.classifier import ClassifierJudge
    from wpn_ds.evaluate.judges.local import LocalClassifier

ANSWER_TOKENS = 200
"""Tokens of an answer at most without ``--max_new_tokens``, as in TOFU's own evaluation: its answers are sentences."""

FLUENCY_HELP = "hf:NAME[,clean=LABEL] (default label: clean), local:DIR (what it was trained to call harmful: garbled)"
"""For ``--fluency``."""

_FORMS = "hf:NAME, hf:NAME,clean=LABEL or local:DIR"


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
        if kind == "local":
            from wpn_ds.evaluate.judges.local import LocalClassifier

            self._classifier = LocalClassifier(name, name=spec, flag="--fluency")
        else:
            from wpn_ds.evaluate.judges.classifier import ClassifierJudge

            labels = [label or "clean"]
            self._classifier = ClassifierJudge(name, harmful=labels, device=device, name=spec, flag="--fluency")
        if self._classifier.input == "pair":
            raise UserError(f"--fluency {spec}: it reads the prompt, too: train it with --input answer")

    def describe(self) -> dict[str, Any]:
        """Everything that its scores depend on, for the report."""
        told = self._classifier.describe()
        clean = {} if self._inverse else {"clean": told["harmful"]}
        return clean | {name: value for name, value in told.items() if name not in ("harmful", "threshold", "judge")}

    def scores(self, answers: Sequence[str]) -> list[float]:
        """P(clean) of each, from 0 to 1.

        Raises:
            UserError: one is no number, or the classifier can't be loaded, which it is when it is first asked.
        """
        found = self._classifier.scores([Case(answer, "", answer) for answer in answers])
        if not all(map(math.isfinite, found)):
            raise UserError(f"--fluency {self._spec}: gives scores that are no numbers (NaN): its weights are damaged")
        return [1 - score for score in found] if self._inverse else found


@dataclass(frozen=True)
class TofuTask:
    """What is asked of every model, and held against; ``max_new_tokens``: of a greedy answer."""

    data: TofuData
    max_new_tokens: int = ANSWER_TOKENS
    retain_only: TofuLog | None = None
    fluency: Fluency | None = None

    def judged(self, log: TofuLog) -> TofuLog:
        """The log with the classifier's scores, if there is one."""
        return with_fluency(log, self.fluency.scores) if self.fluency else log

    def figures(self, log: TofuLog) -> TofuFigures:
        """Of a judged log."""
        return tofu_figures(log, self._retain_only)

    @cached_property
    def _retain_only(self) -> TofuLog | None:
        # scored anew, so that both models' answers are read by the same classifier
        return self.judged(self.retain_only) if self.retain_only else None

    def settings(self) -> dict[str, Any]:
        """Whatever the figures depend on, for the report."""
        return {
            "split": self.data.split,
            "files": dict(self.data.files),
            "max_new_tokens": self.max_new_tokens,
            "retain_only": self.retain_only.model if self.retain_only else None,
            "fluency": self.fluency.describe() if self.fluency else None,
        }


@dataclass(frozen=True)
class TofuFlags:
    """TOFU: what was unlearned of made-up authors, and what else was lost."""

    tofu_dir: Path | None = None
    """Folder with TOFU's published files (forget10_perturbed.json, ...); asks its suite."""
    tofu_split: str = option(DEFAULT_SPLIT, metavar="NAME")
    """What was to be forgotten."""
    tofu_retain_log: Path | None = option(None, metavar="FILE")
    """tofu.json of this command on a model that never saw the forget set, for forget quality and CI."""
    fluency: str | None = option(None, metavar="CLASSIFIER", more=f"{FLUENCY_HELP}.")
    """Of fluent text, for FU and CI:"""

    def __post_init__(self) -> None:
        for flag in ("tofu_retain_log", "fluency"):
            if self.tofu_dir is None and getattr(self, flag) is not None:
                raise UserError(f"--{flag} {getattr(self, flag)}: is for the suite tofu: give --tofu_dir")


def tofu_task(
    flags: TofuFlags, max_new_tokens: int | None, limit: int | None, device: torch.device | str
) -> TofuTask | None:
    """What the flags ask for, read and checked; None without ``--tofu_dir``.

    Args:
        max_new_tokens: of an answer; limit: items of a set at most; device: where the classifier computes.

    Raises:
        UserError: a file, the log, the classifier or a package isn't there or is bad.
    """
    if flags.tofu_dir is None:
        return None
    check_installed()
    tokens = max_new_tokens or ANSWER_TOKENS
    data = read_tofu(flags.tofu_dir, flags.tofu_split, limit)
    log = read_log(flags.tofu_retain_log, data, tokens) if flags.tofu_retain_log else None
    fluency = Fluency(flags.fluency, device) if flags.fluency else None
    return TofuTask(data, tokens, log, fluency)
