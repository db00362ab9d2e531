"""What an objective is made of: terms, each a mean over the whole optimizer step, and what follows from them.

An objective says which terms it has, and nothing of batches, ranks or micro-batches. There are three kinds:

* :class:`OnTokens`: the mean of the losses of single tokens;
* :class:`OnAnswers`: the mean of losses that compare whole answers;
* :class:`OnStates`: the mean of losses of tokens' states inside the model.

No torch here, nor at the top of an objective's file: ``--help`` has none to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from wpn_ds.errors import UserError, require

if TYPE_CHECKING:
    from torch import Tensor

    from wpn_ds.losses.answers import Pooling
    from wpn_ds.losses.likelihood import LabelTarget


class Role(IntEnum):
    """What a segment of a batch is for."""

    WANTED = 0
    UNWANTED = 1
    RETAIN = 2
    DEAD = 3
    """Fills a rank's row where it has nothing to do; counts for nothing."""


@dataclass(frozen=True)
class Multiplier:
    """Makes a term's weight the Lagrange multiplier of a constraint, that the term's mean be at most ``limit``.

    Attributes:
        rate: step size of the dual variable.
        warmup: updates of the weights before it first moves.
    """

    limit: float
    rate: float
    warmup: int = 0

    def moved(self, weight: Tensor, mean: Tensor, updates: int) -> Tensor:
        """The weight after ``updates`` updates, the last of which saw the term's ``mean``: ``max(0, weight + rate (mean
        - limit))``, all scalars."""
        return weight if updates <= self.warmup else (weight + self.rate * (mean - self.limit)).clamp(min=0)


@dataclass(frozen=True)
class OnTokens:
    """The mean, over the tokens of a role, of a loss of each.

    Attributes:
        name: ``loss/<name>`` in the metrics.
        weight: its factor in what is minimised; a term of weight 0 is left out.
        role: whose tokens.
        target: what the model's prediction of a token is compared to. ``token``: itself, ``-log p(token)``; ``start``
            (retain and unwanted tokens only): the starting model's distribution, ``KL(start || p)``; or a function of
            the token ids [n], and of their log-probabilities [n] under the starting model if ``start``, to a
            :class:`~wpn_ds.losses.likelihood.LabelTarget`.
        start: the function asks for those log-probabilities (unwanted tokens only).
        ascend: the term is minus that mean: minimising it makes the tokens unlikely.
        power: p of position weights (wanted and unwanted tokens only): token t of an answer of n tokens counts
            ``n t^p / (1^p + ... + n^p)`` times, which are n in all. The plain mean is then logged as ``loss/<name>``,
            and what is minimised as ``loss/<name>_weighted``.
        lowered: the starting model's logit of the token itself is lowered by so much before it is compared to.
        multiplier: how the weight moves, if it does.
    """

    name: str
    weight: float
    role: Role
    target: Literal["token", "start"] | Callable[[Tensor, Tensor | None], LabelTarget] = "token"
    start: bool = False
    ascend: bool = False
    power: float = 0.0
    lowered: float = 0.0
    multiplier: Multiplier | None = None

    def __post_init__(self) -> None:
        _check_term(self)
        if not isinstance(self.role, Role) or self.role is Role.DEAD:
            raise UserError(f"{self.name}: role is {self.role!r}: give Role.WANTED, Role.UNWANTED or Role.RETAIN")
        if not (self.target in ("token", "start") or callable(self.target)):
            raise UserError(
                f'{self.name}: target is {self.target!r}: give "token", "start" or a function of token ids and start'
            )
        if not _is_number(self.power):
            raise UserError(f"{self.name}: power is {self.power!r}: give a number")
        if self.power and self.role is Role.RETAIN:
            raise UserError(f"{self.name}: only wanted and unwanted tokens have position weights: leave power out")
        if self.lowered and self.target != "start":
            raise UserError(
                f"{self.name}: lowered is of the starting model's logits: leave it out, or compare to start"
            )

    @property
    def minimised(self) -> str:
        """The name of what is minimised."""
        return f"{self.name}_weighted" if self.power else self.name


@dataclass(frozen=True)
class NPair:
    """``log(1 + sum_n exp((s(x, y_n) - s(x, y+)) / temperature))`` of a wanted answer y+ against all its negatives."""

    temperature: float


@dataclass(frozen=True)
class OnAnswers:
    """The mean of a loss that compares whole answers by a score each.

    The score is either the answer's log-likelihood, ``s(x, y) = beta sum_t w_t log p(y_t | x, y_<t)`` with the weights
    of ``score``, or the ``similarity`` of the prompt's and the answer's pooled states, with the weights of ``vectors``.

    Attributes:
        name, weight: as in :class:`OnTokens`.
        loss: a function of margins of any shape, element by element: ``m = s(y+) - s(y-)`` for each pair, or
            ``m = -s(y-)`` for unwanted answers ``alone``, to losses of that shape. Or an :class:`NPair`, whose items
            are the wanted answers, each with all its negatives.
        pairs: which unwanted answers a wanted one is compared to: those of its ``own`` prompt, of the whole ``step``,
            of the data set (``bank``: an NPair of frozen vectors only); ``alone``: none, they stand for themselves.
        score: pooling of the tokens' log-probabilities: a name, or the power p of weights that are as ``t^p``.
        beta: factor of such scores; times it they are logged as rewards.
        relative: such scores are counted from those of the starting model.
        vectors: pooling of the tokens' hidden states, as ``score``.
        similarity: of the pooled states.
        answers: whose states the answers' vectors are: the starting model's (``frozen``), the current model's without
            gradient (``detached``) or with it (``live``). Prompts are always live.
    """

    name: str
    weight: float
    loss: Callable[[Tensor], Tensor] | NPair
    pairs: Literal["alone", "own", "step", "bank"] = "own"
    score: Pooling | None = None
    beta: float = 1.0
    relative: bool = False
    vectors: Pooling | None = None
    similarity: Literal["cosine", "dot"] = "cosine"
    answers: Literal["frozen", "detached", "live"] = "live"

    def __post_init__(self) -> None:
        _check_term(self)
        pooling = (None, "weighted", "mean", "last", "sum")
        choices = {
            "pairs": ("alone", "own", "step", "bank"),
            "score": pooling,
            "vectors": pooling,
            "similarity": ("cosine", "dot"),
            "answers": ("frozen", "detached", "live"),
        }
        for name, allowed in choices.items():
            given, powers = getattr(self, name), allowed is pooling
            if given not in allowed and not (powers and _is_number(given)):
                known = ", ".join(choice for choice in allowed if choice) + ", or a number" * powers
                raise UserError(f"{self.name}: {name} is {given!r}: give one of {known}")
        if not (isinstance(self.loss, NPair) or callable(self.loss)):
            raise UserError(f"{self.name}: loss is {self.loss!r}: give a function of margins, or an NPair")

    @property
    def fixed(self) -> bool:
        """Whether the answers' vectors get no gradient, so that a prompt needs only its own micro-batch."""
        return self.vectors is not None and self.answers != "live"

    @property
    def coupled(self) -> bool:
        """Whether a pair's loss has gradients into other items of the step, which may be on other ranks."""
        return self.pairs != "alone" and not self.fixed

    @property
    def roles(self) -> frozenset[Role]:
        """Whose answers are compared."""
        return frozenset({Role.UNWANTED} if self.pairs == "alone" else {Role.WANTED, Role.UNWANTED})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_term(term: OnTokens | OnAnswers | OnStates) -> None:
    if not isinstance(term.weight, int | float) or not term.weight >= 0:
        how = " (an OnTokens that ascends minimises minus its mean)" if isinstance(term, OnTokens) else ""
        raise UserError(f"{term.name}: weight is {term.weight!r}: give a number from 0 on{how}")


@dataclass(frozen=True)
class OnStates:
    """The mean, over the tokens of a role, of the squared distance to a target, over its width, of the state inside the
    model that predicts a token.

    Attributes:
        name, weight, role: as in :class:`OnTokens`.
        depth: after which decoder layer the states are, as a share of all layers.
        steer: norm of the random vector that is the target, the same for all tokens; None: the starting model's states
            (retain tokens only).
        trained: how many decoder layers, up to that one, are trained at all; 0: all weights are.
    """

    name: str
    weight: float
    role: Role
    depth: float
    steer: float | None = None
    trained: int = 0

    def __post_init__(self) -> None:
        _check_term(self)
        if not 0 < self.depth < 1:
            raise UserError(f"{self.name}: depth is {self.depth!r}: give a number between 0 and 1")
        if self.steer is None and self.role is not Role.RETAIN:
            raise UserError(f"{self.name}: only retain tokens are compared to the starting model's states: give steer")


class Objective:
    """An unlearning objective: a dataclass whose fields are its flags, and the terms that they make.

    The first line of its doc-string says what it is; the string under a field is the flag's help. A field whose name
    ends in ``_weight`` is the weight of a term.

    Attributes:
        name: of ``--objective``.
        equation: what it minimises, besides the companions' terms, on one line.
        paper: number on arXiv; "" if there is none.
        wanted: where wanted answers come from without ``--wanted_file``: the ``records``' own, random answers of the
            ``retain`` data, or the package's list of ways to say "I don't know" (``dont_know``).
    """

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    wanted: ClassVar[Literal["records", "retain", "dont_know"]] = "records"

    def __post_init__(self) -> None:
        weights = self.weights
        for name, value in weights.items():
            require(self, name, value >= 0, "at least 0")
        if weights and not any(weights.values()):
            *first, last = weights
            some = f"--{', --'.join(first)} and --{last} are all" if first else f"--{last} is"
            raise UserError(f"{some} 0: nothing would be trained")

    def terms(self) -> Iterable[OnTokens | OnAnswers | OnStates]:
        """The terms; those of weight 0 may be among them."""
        raise NotImplementedError

    def resolved(self) -> Any:
        """The same with every setting that was left open filled in."""
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weights by their flags."""
        names = [flag.name for flag in flags(type(self)) if flag.name.endswith("_weight")]
        return {name: getattr(self, name) for name in names}


def flags(kind: type) -> list[Field[Any]]:
    """The fields of a dataclass, those that it brings itself before those of its bases."""
    place = {name: k for k, part in enumerate(kind.__mro__) for name in getattr(part, "__dataclass_fields__", {})}
    return sorted(fields(kind), key=lambda entry: place[entry.name])


@dataclass(frozen=True)
class Terms:
    """The terms that count, and everything the engine has to know of an objective.

    Attributes:
        tokens, answers, states: the terms of each kind whose weight is above 0.
    """

    tokens: tuple[OnTokens, ...]
    answers: tuple[OnAnswers, ...]
    states: tuple[OnStates, ...] = ()

    @classmethod
    def of(cls, objective: Objective, *, retain: bool = True) -> Terms:
        """Those of ``objective``; ``retain``: there are retain data, else terms on them are left out.

        Raises:
            UserError: the terms don't go together.
        """
        try:
            every = [term for term in objective.resolved().terms() if term.weight > 0]
        except UserError as error:
            raise UserError(f"--objective {objective.name}: {error}") from None
        except Exception as error:  # in somebody's own file it is no defect of ours
            if ":" not in objective.name:
                raise
            told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise UserError(f"--objective {objective.name}: terms() fails: {told}") from error
        if not retain:
            every = [term for term in every if isinstance(term, OnAnswers) or term.role is not Role.RETAIN]
        terms = cls(
            tuple(term for term in every if isinstance(term, OnTokens)),
            tuple(term for term in every if isinstance(term, OnAnswers)),
            tuple(term for term in every if isinstance(term, OnStates)),
        )
        if fault := terms._fault():
            raise UserError(f"--objective {objective.name}: {fault}")
        return terms

    def _fault(self) -> str:
        names = [term.name for term in self.every]
        if twice := next((name for name in names if names.count(name) > 1), None):
            return f"two terms are called {twice}: give each a name of its own"
        targets: dict[Role, Any] = {role: "token" for role in self.scored}
        for term in self.tokens:
            if targets.setdefault(term.role, term.target) != term.target:
                return f"{term.name} compares {term.role.name.lower()} tokens to something else than another term does"
            if term.target == "start" and term.role is Role.WANTED:
                return f"{term.name}: only retain and unwanted tokens can be compared to the starting distribution"
            if term.start and term.role is not Role.UNWANTED:
                return f"{term.name}: the starting model's log-probabilities are there for unwanted tokens only"
        for answer in self.answers:
            if (answer.score is None) == (answer.vectors is None):
                return f"{answer.name}: give either score or vectors"
            if answer.vectors is not None and not isinstance(answer.loss, NPair):
                return f"{answer.name}: vectors are compared by an NPair"
            if answer.vectors is not None and (answer.relative or answer.beta != 1.0):
                return f"{answer.name}: relative and beta are of scores, not of vectors"
            if answer.pairs == "bank" and (answer.vectors is None or answer.answers != "frozen"):
                return f"{answer.name}: a bank holds frozen vectors"
            if isinstance(answer.loss, NPair) and answer.pairs == "alone":
                return f"{answer.name}: an NPair compares pairs"
        if len({(term.depth, term.trained) for term in self.states}) > 1:
            return f"{self.states[1].name}: states of one layer are looked at, and one choice of layers is trained"
        return ""

    @property
    def every(self) -> list[OnTokens | OnAnswers | OnStates]:
        return [*self.answers, *self.tokens, *self.states]

    @property
    def _of_roles(self) -> list[OnTokens | OnStates]:
        return [*self.tokens, *self.states]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each mean that is minimised, by its name; other figures are only logged."""
        of_answers = {term.name: term.weight for term in self.answers}
        return of_answers | {t.minimised: t.weight for t in self.tokens} | {t.name: t.weight for t in self.states}

    @cached_property
    def scored(self) -> frozenset[Role]:
        """The roles whose answers get a score, made of the losses of their tokens."""
        return frozenset(role for term in self.answers if term.score is not None for role in term.roles)

    @cached_property
    def pools(self) -> bool:
        """Whether the states of prompts and answers are pooled."""
        return any(term.vectors is not None for term in self.answers)

    @cached_property
    def predicted(self) -> frozenset[Role]:
        """The roles whose tokens have labels, and go through the head."""
        return frozenset(term.role for term in self._of_roles) | self.scored

    @cached_property
    def read(self) -> frozenset[Role]:
        """The roles whose segments are forwarded: also the prompts, and the answers where their vectors are live."""
        vectors = (term for term in self.answers if term.vectors is not None)
        return self.predicted | {role for t in vectors for role in ({Role.WANTED} if t.fixed else t.roles)}

    @property
    def compares_wanted(self) -> bool:
        """Whether wanted answers are trained on or compared with."""
        return Role.WANTED in self.read

    @property
    def retain_weight(self) -> float:
        """Weight of what holds the model to the retain data, all together; 0: nothing does."""
        return sum(term.weight for term in self._of_roles if term.role is Role.RETAIN)

    @property
    def forgets(self) -> bool:
        """Whether anything but the retain data is trained on."""
        return bool(self.answers) or any(term.role is not Role.RETAIN for term in self._of_roles)

    @property
    def depth(self) -> float | None:
        """How deep the states are that terms look at, as a share of all layers; None: at none inside the model."""
        return self.states[0].depth if self.states else None

    @property
    def trained(self) -> int:
        """How many decoder layers, up to the one at that depth, are trained at all; 0: all weights are."""
        return self.states[0].trained if self.states else 0

    @property
    def needs_start_distribution(self) -> bool:
        """Whether the starting model's distribution at some role's tokens is asked for."""
        return bool(self.compared_to_start)

    @property
    def compared_to_start(self) -> dict[Role, OnTokens]:
        """The terms that compare to the starting model's distribution, by their role."""
        return {term.role: term for term in self.tokens if term.target == "start"}

    @property
    def needs_start_logprobs(self) -> bool:
        """Whether the starting model's log-probability of every unwanted token is asked for."""
        return any(term.start for term in self.tokens)

    @property
    def keeps_answers(self) -> bool:
        """Whether something that the starting model said of the records' own answers is kept."""
        of_tokens = self.needs_start_logprobs or Role.UNWANTED in self.compared_to_start
        return of_tokens or any(t.relative or t.fixed for t in self.answers)
