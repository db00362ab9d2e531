"""WPN: prompts near their wanted answers and far from unwanted ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from wpn_ds.errors import UserError, require
from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import NPair, OnAnswers, OnTokens


@objective
class WPN(Companions):
    """WPN, the weighted positional N-pair (arXiv 2408.09459): prompts near their wanted answers, far from unwanted
    ones. The equations that the paper leaves open are a reconstruction; each choice is a flag."""

    equation = "log(1 + sum_n exp((s(x, y_n) - s(x, y+)) / temperature)) + L_nll"
    paper = "2408.09459"

    wpn_weight: float = 1.0
    """Weight of the N-pair term; 0 leaves it out."""
    wpn_pooling: Literal["weighted", "mean", "last", "sum"] = "weighted"
    """How a span's tokens become one: weights that grow with the position, equal ones, the last token, or a sum."""
    wpn_position_power: float = 1.0
    """Power p of the weights of --wpn_pooling weighted, t^p at a span's token t: 0 equal ones, 1 an even rise, more a
    steeper one, less than 0 a fall."""
    wpn_scoring: Literal["cosine", "dot", "likelihood", "likelihood_ratio"] = "cosine"
    """Score of a prompt and an answer: similarity of pooled vectors, the answer's weighted log-likelihood, or that
    minus its value at the start."""
    wpn_temperature: float | None = None
    """Temperature of the scores; without it, 0.05 for cosine and 1.0 for the others."""
    wpn_targets: Literal["auto", "reference", "detached", "live"] = "auto"
    """Answer vectors: of the frozen start, the current model without or with gradient; auto: reference, or live for
    likelihoods."""
    wpn_negatives: Literal["auto", "step", "own", "bank"] = "auto"
    """Unwanted answers in the contrast: the step's, the prompt's own, or for vectors the data set's; auto: step, or own
    for likelihoods."""
    nll_weight: float = 1.0
    retain_loss: Literal["kl", "nll"] = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wpn_temperature is not None:
            require(self, "wpn_temperature", self.wpn_temperature > 0, "greater than 0")
        if self.wpn_position_power != 1 and self.wpn_pooling != "weighted":
            raise UserError(
                f"--wpn_position_power {self.wpn_position_power:g} is for --wpn_pooling weighted, not "
                f"{self.wpn_pooling}: leave one of them out"
            )
        if self._by_likelihood:
            if self.wpn_targets not in ("auto", "live"):
                raise UserError(
                    f"--wpn_scoring {self.wpn_scoring} works with --wpn_targets live, not with {self.wpn_targets}: "
                    "leave --wpn_targets out"
                )
            if self.wpn_negatives == "bank":
                raise UserError(
                    f"--wpn_negatives bank is for vectors: with --wpn_scoring {self.wpn_scoring} each step would read "
                    "the whole data set with the current model; give own or step"
                )
        elif self.wpn_pooling == "sum":
            raise UserError("--wpn_pooling sum is for likelihoods: vectors of long texts would only be longer")
        if self.wpn_negatives == "bank" and self.wpn_targets not in ("auto", "reference"):
            raise UserError(
                f"--wpn_negatives bank needs --wpn_targets reference, not {self.wpn_targets}: "
                "the vectors of the whole data set are computed once, by the starting model"
            )

    @property
    def _by_likelihood(self) -> bool:
        return self.wpn_scoring.startswith("likelihood")

    def resolved(self) -> WPN:
        targets, negatives, temperature = self.wpn_targets, self.wpn_negatives, self.wpn_temperature
        if targets == "auto":
            targets = "live" if self._by_likelihood else "reference"
        if negatives == "auto":
            negatives = "own" if self._by_likelihood else "step"
        if temperature is None:
            temperature = 0.05 if self.wpn_scoring == "cosine" else 1.0
        return dataclasses.replace(self, wpn_targets=targets, wpn_negatives=negatives, wpn_temperature=temperature)

    def terms(self) -> Iterator[OnAnswers | OnTokens]:
        targets, negatives = self.wpn_targets, self.wpn_negatives
        power = self.wpn_position_power
        pooling = self.wpn_pooling if power == 1 else "mean" if power == 0 else power
        assert targets != "auto" and negatives != "auto" and self.wpn_temperature is not None, "terms are of resolved"
        loss = NPair(self.wpn_temperature)
        if self.wpn_scoring == "cosine" or self.wpn_scoring == "dot":
            yield OnAnswers(
                "npair",
                self.wpn_weight,
                loss,
                negatives,
                vectors=pooling,
                similarity=self.wpn_scoring,
                answers="frozen" if targets == "reference" else targets,
            )
        else:
            relative = self.wpn_scoring == "likelihood_ratio"
            yield OnAnswers("npair", self.wpn_weight, loss, negatives, score=pooling, relative=relative)
        yield from self.companions()
