"""The objective's terms are sums with the step's counts, so that a mean is the step's whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.made import PAD, ROW, example_sets, flat, layouts, plan_of
from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.plan import Layout, MicroBatch, Role, StepPlan
from wpn_ds.data.tokens import Segment
from wpn_ds.objectives.wpn import WPN, FrozenTargets, Output, Term

WIDTH, VOCABULARY = 6, 91
ONE = Layout(ROW, 10_000, True, 1)
several = settings(max_examples=25, deadline=None)
KINDS = st.sampled_from(["weighted", "mean", "last"])


@dataclass
class Model:
    """States per item, wherever it lies; what lies in no item is noise. fp64, so that sums can be compared."""

    seed: int
    head: Tensor

    @classmethod
    def make(cls, seed: int) -> Model:
        generator = torch.Generator().manual_seed(seed)
        return cls(seed, torch.randn(WIDTH, VOCABULARY, generator=generator, dtype=torch.float64))

    def item(self, role: int, index: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + 100 * role + index)
        return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)

    def output(self, rows: MicroBatch, batch: Batch) -> Output:
        hidden = torch.randn(*batch.input_ids.shape, WIDTH, dtype=torch.float64)
        for r, row in enumerate(rows):
            offset = 0
            for item in row:
                n = len(item.segment)
                hidden[r, offset : offset + n] = self.item(item.role, item.index, n)
                offset += n
        states = hidden.flatten(0, 1)
        logits = states[batch.label_positions] @ self.head
        retain = logits[batch.labels_of(Role.RETAIN)]
        return Output(states, logits, reference_logits=retain.roll(1, dims=1))


def bank(examples: ExampleSet, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(examples.answers), WIDTH, generator=generator, dtype=torch.float64)


def frozen_targets(objective: WPN, plan: StepPlan, vectors: Tensor) -> FrozenTargets:
    mask = torch.from_numpy(objective.mask(plan))
    return FrozenTargets(vectors[plan.wanted_ids], vectors[plan.unwanted_ids], mask)


def step_terms(objective: WPN, plan: StepPlan, model: Model, vectors: Tensor) -> tuple[dict[str, Term], Tensor]:
    """Terms of the whole step (sums over all micro-batches of all ranks), and the sum of their weighted totals."""
    terms: dict[str, Term] = {}
    total = torch.zeros((), dtype=torch.float64)
    states: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for rows in flat(plan.micro_batches):
        batch = collate(rows, PAD, roles=objective.predicted)
        output = model.output(rows, batch)
        parts = objective.likelihoods(output, batch, plan.counts)
        own = objective.states(output, batch) if objective.contrasts else {}
        for name, pair in own.items():
            states.setdefault(name, []).append(pair)
        if objective.frozen:
            targets = frozen_targets(objective, plan, vectors)
            parts |= objective.contrast_frozen(own, targets, plan.counts["pairs"])
        if parts:
            total = total + objective.total(parts)
        for name, term in parts.items():
            assert name not in terms or terms[name].count == term.count
            terms[name] = Term(terms[name].total + term.total if name in terms else term.total, term.count)
    if objective.coupled:
        ordered = {}
        for name, pairs in states.items():
            values, index = (torch.cat(column) for column in zip(*pairs, strict=True))
            assert sorted(index.tolist()) == list(range(len(index))), "every item has its state in one micro-batch"
            ordered[name] = values[index.argsort()]
        parts = objective.contrast_all(ordered, plan)
        terms |= parts
        total = total + objective.total(parts)
    return terms, total


# ---- the plain method ----


def pooled(states: Tensor, kind: str) -> Tensor:
    n = len(states)
    weights = {"weighted": [2 * t / (n * (n + 1)) for t in range(1, n + 1)], "mean": [1 / n] * n}
    weights["last"] = [0.0] * (n - 1) + [1.0]
    return (torch.tensor(weights[kind], dtype=torch.float64)[:, None] * states).sum(0)


def logprobs(model: Model, states: Tensor, ids: tuple[int, ...], start: int) -> Tensor:
    logp = torch.log_softmax(states @ model.head, -1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))])


def expected(objective: WPN, examples: ExampleSet, model: Model, vectors: Tensor) -> dict[str, float]:
    """Means over the step, item by item, after METHODS section 1."""
    kind, pairs, nll, retain = objective.pooling, [], [], []
    sides: dict[Role, list] = {Role.WANTED: [], Role.UNWANTED: []}
    for e, example in enumerate(examples.forget):
        for role, side in ((Role.WANTED, example.wanted), (Role.UNWANTED, example.unwanted)):
            for answer in side:
                s = answer.segment
                states = model.item(role, len(sides[role]), len(s))
                own = logprobs(model, states, s.ids, s.answer_start)
                vector = vectors[answer.answer_id] if objective.frozen else pooled(states[s.answer_start :], kind)
                score = pooled(own[:, None], kind)[0]
                anchor = pooled(states[s.prompt_start : s.answer_start], kind)
                sides[role].append((e, answer.text_id, anchor, vector, score, own))
    unwanted = sides[Role.UNWANTED]
    for e, _, anchor, vector, score, own in sides[Role.WANTED]:
        texts = {text for other, text, *_ in sides[Role.WANTED] if other == e}
        negatives = [n for n in unwanted if n[1] not in texts and (objective.negatives == "step" or n[0] == e)]

        def s(target: Tensor, weighted: Tensor, anchor: Tensor = anchor) -> float:
            if objective.scoring == "likelihood":
                return weighted.item()
            scale = anchor.norm() * target.norm() if objective.scoring == "cosine" else 1
            return (anchor @ target / scale).item()

        gaps = [(s(n[3], n[4]) - s(vector, score)) / objective.temperature for n in negatives]
        pairs.append(math.log1p(sum(map(math.exp, gaps))))
        nll.append(-own)
    for k, segment in enumerate(examples.retain):
        states = model.item(Role.RETAIN, k, len(segment))
        if objective.retain_loss == "nll":
            retain.append(-logprobs(model, states, segment.ids, segment.answer_start))
        else:
            logits = (states @ model.head)[segment.answer_start - 1 : -1]
            reference, logp = torch.log_softmax(logits.roll(1, dims=1), -1), torch.log_softmax(logits, -1)
            retain.append((reference.exp() * (reference - logp)).sum(-1))
    parts = {"npair": sum(pairs) / len(pairs), "nll": torch.cat(nll).mean().item()}
    return parts | ({"retain": torch.cat(retain).mean().item()} if retain else {})


OBJECTIVES = st.builds(
    WPN,
    pooling=KINDS,
    scoring=st.sampled_from(["cosine", "dot"]),
    temperature=st.sampled_from([0.2, 3.0]),
    targets=st.sampled_from(["reference", "live"]),
    negatives=st.sampled_from(["step", "own"]),
    wpn_weight=st.just(0.7),
    nll_weight=st.just(1.3),
    retain_weight=st.just(2.0),
    retain_loss=st.sampled_from(["kl", "nll"]),
) | st.builds(WPN, pooling=KINDS, scoring=st.just("likelihood"), temperature=st.just(1.0), negatives=st.just("own"))


@several
@given(examples=example_sets(), layout=layouts(), objective=OBJECTIVES, seed=st.integers(0, 50))
def test_the_step_s_means_are_those_of_the_plain_method_whatever_the_layout(examples, layout, objective, seed) -> None:
    model, vectors = Model.make(seed), bank(examples)
    plan = plan_of(examples, layout, with_unwanted=objective.coupled)
    terms, total = step_terms(objective, plan, model, vectors)
    means = expected(objective, examples, model, vectors)
    for name, mean in means.items():
        # position weights are handed out as fp32
        assert terms[name].total.item() / terms[name].count == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    weighted = sum(objective.weights[name] * mean for name, mean in means.items())
    assert total.item() == pytest.approx(weighted, rel=1e-5, abs=1e-6)


@several
@given(examples=example_sets(), layout=layouts(), objective=OBJECTIVES, seed=st.integers(0, 50))
def test_every_term_s_sum_is_the_same_however_the_step_is_split(examples, layout, objective, seed) -> None:
    model, vectors = Model.make(seed), bank(examples)
    plans = [plan_of(examples, each, with_unwanted=objective.coupled) for each in (layout, ONE)]
    (terms, total), (whole, whole_total) = (step_terms(objective, plan, model, vectors) for plan in plans)
    assert terms.keys() == whole.keys()
    for name in terms:
        assert terms[name].count == whole[name].count
        assert terms[name].total.item() == pytest.approx(whole[name].total.item(), rel=1e-9, abs=1e-9), name
    assert total.item() == pytest.approx(whole_total.item(), rel=1e-9, abs=1e-9)


# ---- names, counts, figures ----


@several
@given(examples=example_sets(), objective=OBJECTIVES)
def test_terms_carry_the_names_and_the_step_s_counts(examples, objective) -> None:
    plan = plan_of(examples, ONE, with_unwanted=objective.coupled)
    terms, _ = step_terms(objective, plan, Model.make(0), bank(examples))
    figures = {"sim/positive", "sim/negative", "sim/margin"} | ({"norm/anchor"} if objective.frozen else set())
    assert terms.keys() == {"npair", "nll", "retain"} | figures
    pairs = sum(len(e.wanted) for e in examples.forget)
    assert all(terms[name].count == pairs for name in {"npair"} | figures)
    assert terms["nll"].count == plan.counts["nll"] and terms["retain"].count == plan.counts["retain"]
    margin = terms["sim/positive"].total - terms["sim/negative"].total
    assert terms["sim/margin"].total.item() == pytest.approx(margin.item(), abs=1e-9)


def test_figures_to_log_have_no_gradient_and_no_weight() -> None:
    anchors = torch.randn(2, WIDTH, requires_grad=True)
    targets = FrozenTargets(torch.randn(2, WIDTH), torch.randn(3, WIDTH), torch.tensor([[1, 0, 1], [0, 0, 0]]).bool())
    terms = WPN().contrast_frozen({"anchor": (anchors, torch.tensor([1, 0]))}, targets, 2)
    assert [name for name, term in terms.items() if term.total.requires_grad] == ["npair"]
    assert torch.equal(WPN(wpn_weight=3).total(terms), 3 * terms["npair"].total / 2)


def test_an_anchor_meets_the_targets_of_its_own_index() -> None:
    anchors = torch.eye(2, WIDTH)
    mask = torch.tensor([[False, True], [False, False]])
    targets = FrozenTargets(torch.eye(2, WIDTH).flip(0), torch.eye(2, WIDTH), mask)
    terms = WPN(scoring="dot", temperature=1.0).contrast_frozen({"anchor": (anchors, torch.tensor([1, 0]))}, targets, 2)
    # anchor e0 is pair 1: its positive is e0 and it has no negatives; anchor e1 is pair 0: positive e1, negative e1
    assert terms["sim/positive"].total.item() == 2 and terms["sim/negative"].total.item() == 1
    assert terms["npair"].total.item() == pytest.approx(math.log(2))


def test_a_pair_without_negatives_has_a_mean_negative_similarity_of_zero_and_no_nan() -> None:
    targets = FrozenTargets(torch.ones(1, WIDTH), torch.ones(2, WIDTH), torch.zeros(1, 2, dtype=torch.bool))
    terms = WPN().contrast_frozen({"anchor": (torch.ones(1, WIDTH), torch.tensor([0]))}, targets, 1)
    assert terms["npair"].total == 0 and terms["sim/negative"].total == 0


# ---- gradients and precision ----


@pytest.mark.parametrize("targets", ["reference", "live"])
def test_frozen_targets_move_prompts_only_and_live_ones_answers_too(targets) -> None:
    examples = example_set()
    objective = WPN(targets=targets, nll_weight=0, retain_weight=0)
    plan = plan_of(examples, ONE, with_unwanted=True)
    (rows,) = plan.micro_batches[0]
    batch = collate(rows, PAD, roles=objective.predicted)
    output = Model.make(0).output(rows, batch)
    hidden = output.hidden.requires_grad_()
    states = objective.states(output, batch)
    if objective.frozen:
        terms = objective.contrast_frozen(states, frozen_targets(objective, plan, bank(examples)), plan.counts["pairs"])
    else:
        terms = objective.contrast_all({n: v[i.argsort()] for n, (v, i) in states.items()}, plan)
    (gradient,) = torch.autograd.grad(objective.total(terms), hidden)
    moved = set(gradient.norm(dim=1).nonzero().flatten().tolist())
    spans = batch.prompts if targets == "reference" else (*batch.prompts, *batch.wanted, *batch.unwanted)
    assert moved == {t for span in spans for t in range(span.start, span.stop)}


def test_states_and_terms_of_a_bf16_model_are_fp32() -> None:
    examples = example_set()
    for objective in (WPN(), WPN(targets="live"), WPN(scoring="likelihood", negatives="own")):
        plan = plan_of(examples, ONE, with_unwanted=objective.coupled)
        (rows,) = plan.micro_batches[0]
        batch = collate(rows, PAD, roles=objective.predicted)
        exact = Model.make(0).output(rows, batch)
        assert exact.reference_logits is not None
        output = Output(exact.hidden.bfloat16(), exact.logits.bfloat16(), exact.reference_logits.bfloat16())
        states = objective.states(output, batch)
        terms = objective.likelihoods(output, batch, plan.counts)
        if objective.frozen:
            targets = frozen_targets(objective, plan, bank(examples).float())
            terms |= objective.contrast_frozen(states, targets, plan.counts["pairs"])
        assert {v.dtype for v, _ in states.values()} == {t.total.dtype for t in terms.values()} == {torch.float32}


def example_set() -> ExampleSet:
    """Two examples with BOS, a wanted and an unwanted answer each, and a retain segment."""
    forget = [
        ForgetExample(*((Answer(Segment((2, *prompt, *text, 2), 1, 1 + len(prompt)), k, k),) for k, text in side))
        for prompt, side in (
            ((5, 6, 7), ((0, (8, 9)), (1, (10,)))),
            ((11,), ((2, (12, 13, 14)), (3, (15, 16)))),
        )
    ]
    return ExampleSet(forget, [Segment((2, 20, 21, 22), 1, 1)])


# ---- what a setting asks for ----


@pytest.mark.parametrize(
    ("changes", "predicted", "frozen", "coupled"),
    [
        ({}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"targets": "detached"}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"targets": "live"}, {Role.WANTED, Role.RETAIN}, False, True),
        ({"nll_weight": 0.0}, {Role.RETAIN}, True, False),
        ({"retain_weight": 0.0}, {Role.WANTED}, True, False),
        ({"wpn_weight": 0.0, "targets": "live"}, {Role.WANTED, Role.RETAIN}, False, False),
        ({"scoring": "likelihood"}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False, True),
        ({"scoring": "likelihood", "nll_weight": 0.0}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False, True),
    ],
)
def test_only_what_a_setting_needs_is_predicted_and_gathered(changes, predicted, frozen, coupled) -> None:
    objective = replace(WPN(), **changes)
    assert objective.predicted == predicted
    assert (objective.frozen, objective.coupled) == (frozen, coupled)


@pytest.mark.parametrize(
    ("changes", "needed"), [({}, True), ({"retain_loss": "nll"}, False), ({"retain_weight": 0.0}, False)]
)
def test_the_reference_model_is_needed_for_kl_alone(changes, needed) -> None:
    assert WPN(**changes).needs_reference_logits == needed
