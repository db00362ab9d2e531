"""Preference losses and fading ascent against formulas that are written down here alone, in float64.

Sources of the formulas: TRL's DPO loss (github.com/huggingface/trl, trl/trainer/dpo_trainer.py, loss type "sigmoid");
NPO (github.com/licong-lin/negative-preference-optimization, TOFU/dataloader.py); SimNPO (arXiv 2410.07163, eq. 4, and
github.com/OPTML-Group/Unlearn-Simple, TOFU/dataloader.py); AltPO (arXiv 2409.13474, and
github.com/molereddy/Alternate-Preference-Optimization); WGA (github.com/locuslab/open-unlearning,
src/trainer/unlearn/wga.py); TNPO (arXiv 2502.19301).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.made import example_sets, layouts, plan_of
from tests.engine.stepping import Said, take
from wpn_ds.data.batch import Batch
from wpn_ds.data.plan import StepPlan
from wpn_ds.models.packed import Output
from wpn_ds.objectives.dpo import DPO
from wpn_ds.objectives.npo import NPO
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.simnpo import SimNPO
from wpn_ds.objectives.terms import Objective, Role, Terms

MARGINS = st.lists(st.floats(-30, 30), min_size=1, max_size=8)


def named(name: str, **settings) -> Objective:
    return built_in()[name](**settings)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@given(MARGINS, st.floats(0.01, 1), st.floats(-1, 1))
def test_the_loss_is_minus_the_log_of_a_sigmoid(margins, beta, gamma) -> None:
    margins = [beta * m for m in margins]
    got = SimNPO(beta=beta, gamma=gamma).loss(torch.tensor(margins, dtype=torch.float64))
    assert got.tolist() == pytest.approx([-2 / beta * math.log(sigmoid(m - gamma)) for m in margins], rel=1e-9)
    got = DPO(beta=beta).loss(torch.tensor(margins, dtype=torch.float64))
    assert got.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in margins], rel=1e-9)


@pytest.mark.parametrize("name", ["dpo", "c3po", "altpo", "idkdpo", "npo", "simnpo", "neat"])
def test_no_margin_is_so_large_that_loss_or_gradient_is_not_a_number(name) -> None:
    objective = named(name)
    margins = torch.tensor([-1e6, -1e3, 0.0, 1e3, 1e6], requires_grad=True)
    losses = objective.loss(margins)  # type: ignore[attr-defined]
    losses.sum().backward()
    assert losses.isfinite().all() and margins.grad is not None and margins.grad.isfinite().all()
    scale = losses[0].item() / 1e6
    assert scale == pytest.approx(1 if name in ("dpo", "c3po", "neat") else 2 / objective.beta)  # type: ignore[attr-defined]
    assert margins.grad.tolist() == pytest.approx([-scale, -scale, -scale / 2, 0, 0])


class Answers:
    """What a made-up model says of every answer's tokens: log-probabilities by ``answer_id``, now and at the start."""

    def __init__(self, examples, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def logprobs(n: int) -> Tensor:
            return -3 * torch.rand(n, generator=generator, dtype=torch.float64)

        self.now = [logprobs(answer.segment.answer_length) for answer in examples.answers]
        self.start = [logprobs(answer.segment.answer_length) for answer in examples.answers]


class Saying:
    """The model of :class:`Answers` for the batches of a plan."""

    training = False

    def __init__(self, answers: Answers, plan: StepPlan) -> None:
        self.ids = {Role.WANTED: plan.wanted_ids, Role.UNWANTED: plan.unwanted_ids}
        self.leaves = [logprobs.clone().requires_grad_() for logprobs in answers.now]

    def __call__(self, batch: Batch, weights: Tensor | None = None, targets: object = None) -> Output:
        losses = torch.zeros(len(batch.label_ids), dtype=torch.float64, requires_grad=True)
        for role, spans in ((Role.WANTED, batch.wanted_labels), (Role.UNWANTED, batch.unwanted_labels)):
            for start, stop, index in zip(spans.start, spans.stop, spans.index, strict=True):
                losses = torch.cat([losses[:start], -self.leaves[int(self.ids[role][index])], losses[stop:]])
        if weights is None:
            return Output(torch.zeros(0), losses, torch.zeros(()))
        return Output(torch.zeros(0), losses.detach(), (weights * losses).sum())


def measured(objective: Objective, examples, layout, answers: Answers, world) -> tuple[float, int, dict[int, Tensor]]:
    """The sum and the count of the term on whole answers, by the step, micro-batch by micro-batch; and the gradient of
    the token log-probabilities by ``answer_id``."""
    terms = replace(Terms.of(objective), tokens=())
    plan = plan_of(examples, layout, roles=terms.read)
    model = Saying(answers, plan)
    (term,) = terms.answers
    start = torch.stack([lp.sum() if term.score == "sum" else lp.mean() for lp in answers.start])
    sums = take(terms, examples, plan, layout, world, model, Said(torch.empty(0), start)).sums
    gradients = {k: leaf.grad for k, leaf in enumerate(model.leaves) if leaf.grad is not None}
    return sums.totals["preference"].item(), sums.counts["preference"], gradients


def pairs_of(examples) -> list[tuple[int, int]]:
    """(wanted, unwanted) ``answer_id`` of an example's pairs of answers; an unwanted text that is wanted makes none."""
    found = []
    for example in examples.forget:
        texts = {answer.text_id for answer in example.wanted}
        found += [
            (w.answer_id, u.answer_id) for w in example.wanted for u in example.unwanted if u.text_id not in texts
        ]
    return found


def trl_dpo(examples, a: Answers, beta: float) -> list[float]:
    losses = []
    for w, u in pairs_of(examples):
        logratios, ref_logratios = a.now[w].sum() - a.now[u].sum(), a.start[w].sum() - a.start[u].sum()
        losses.append(-math.log(sigmoid(beta * float(logratios - ref_logratios))))
    return losses


def unwanted_of(examples) -> list[int]:
    return [answer.answer_id for example in examples.forget for answer in example.unwanted]


def npo(examples, a: Answers, beta: float) -> list[float]:
    ratios = [float(a.now[u].sum() - a.start[u].sum()) for u in unwanted_of(examples)]
    return [2 / beta * math.log(1 + math.exp(ratio) ** beta) for ratio in ratios]


def simnpo(examples, a: Answers, beta: float, gamma: float) -> list[float]:
    means = [float(a.now[u].sum()) / len(a.now[u]) for u in unwanted_of(examples)]
    return [-2 / beta * math.log(sigmoid(-beta * mean - gamma)) for mean in means]


def simnpo_code(examples, a: Answers, beta: float, gamma: float) -> list[float]:
    """forget_loss = NLL / tokens - gamma; -logsigmoid(beta * forget_loss) * 2 / beta"""
    losses = [-float(a.now[u].sum()) / len(a.now[u]) - gamma for u in unwanted_of(examples)]
    return [-math.log(sigmoid(beta * loss)) * 2 / beta for loss in losses]


def ranking(examples, a: Answers, beta: float) -> list[float]:
    return [-math.log(sigmoid(beta * float(a.now[w].mean() - a.now[u].mean()))) for w, u in pairs_of(examples)]


FORMULAS = {
    "dpo": (named("dpo", beta=0.3), lambda e, a: trl_dpo(e, a, 0.3)),
    "c3po": (named("c3po", beta=0.3), lambda e, a: trl_dpo(e, a, 0.3)),
    "altpo": (named("altpo", beta=0.2), lambda e, a: [2 / 0.2 * loss for loss in trl_dpo(e, a, 0.2)]),
    "idkdpo": (named("idkdpo"), lambda e, a: [2 / 0.1 * loss for loss in trl_dpo(e, a, 0.1)]),
    "npo": (named("npo", beta=0.4), lambda e, a: npo(e, a, 0.4)),
    "simnpo": (named("simnpo", beta=2.5, gamma=0.7), lambda e, a: simnpo(e, a, 2.5, 0.7)),
    "simnpo, its code": (
        named("simnpo", beta=2.5, gamma=0.7, gamma_inside_beta=True),
        lambda e, a: simnpo_code(e, a, 2.5, 0.7),
    ),
    "neat": (named("neat", beta=0.6), lambda e, a: ranking(e, a, 0.6)),
}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(examples=example_sets(), layout=layouts())
@pytest.mark.parametrize("name", FORMULAS)
def test_a_steps_mean_is_that_of_the_plain_formula_whatever_the_layout(world, name, examples, layout) -> None:
    objective, formula = FORMULAS[name]
    answers = Answers(examples)
    total, count, gradients = measured(objective, examples, layout, answers, world)
    plain = formula(examples, answers)
    assert count == len(plain)
    assert total == pytest.approx(sum(plain), rel=1e-6, abs=1e-12)  # the pooling's weights are fp32
    assert len(gradients) > 0
    step = 1e-6
    for k in list(gradients)[:2]:  # the plain formula's own slope
        slopes = []
        for sign in (1, -1):
            answers.now[k][0] += sign * step
            slopes.append(sum(formula(examples, answers)) / max(1, len(plain)))
            answers.now[k][0] -= sign * step
        assert float(gradients[k][0]) == pytest.approx(
            objective.weights["preference_weight"] * (slopes[0] - slopes[1]) / (2 * step), rel=1e-4, abs=1e-7
        )


def test_at_the_start_npo_has_the_gradient_of_gradient_ascent() -> None:
    """NPO's weight 2 p^beta / (p^beta + p_start^beta) is 1 where p is p_start (arXiv 2404.05868, eq. 4)."""
    scores = torch.tensor([-3.0, -20.0, -0.1], dtype=torch.float64, requires_grad=True)
    NPO(beta=0.1).loss(-0.1 * (scores - scores.detach())).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "read", "starts"),
    [
        ("ga", {Role.UNWANTED}, False),
        ("graddiff", {Role.UNWANTED, Role.RETAIN}, False),
        ("llmu", {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False),
        ("wga", {Role.UNWANTED, Role.RETAIN}, False),
        ("tnpo", {Role.UNWANTED, Role.RETAIN}, True),
        ("npo", {Role.UNWANTED, Role.RETAIN}, True),
        ("simnpo", {Role.UNWANTED, Role.RETAIN}, False),
        ("altpo", {Role.WANTED, Role.UNWANTED, Role.RETAIN}, True),
        ("neat", {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False),
    ],
)
def test_an_objective_reads_no_text_and_no_start_that_it_has_no_use_for(name, read, starts) -> None:
    terms = Terms.of(named(name))
    assert terms.read == read
    assert terms.compares_wanted == (Role.WANTED in read)
    assert (any(term.relative for term in terms.answers) or terms.needs_start_logprobs) == starts
