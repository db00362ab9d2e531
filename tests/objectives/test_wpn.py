"""The objective's terms are sums with the step's counts, so that a mean is the step's whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wpn_ds.objectives.objective import FrozenTargets, StartingScores, States, Term

from tests.data.made import PAD, example_sets, flat, layout, layouts, plan_of
from wpn_ds.data.batch import Batch, collate
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.plan import Layout, MicroBatch, Role, StepPlan
from wpn_ds.data.tokens import Segment
from wpn_ds.losses.likelihood import Reading
from wpn_ds.objectives.wpn import WPN

WIDTH, VOCABULARY = 6, 91
ONE = layout("rows")
several = settings(max_examples=25, deadline=None)


@dataclass
class Model:
    """States that depend on a token and what is before it in its own text, as a causal model's do; noise elsewhere.

    fp64, so that sums can be compared.
    """

    seed: int
    head: Tensor

    @classmethod
    def make(cls, seed: int) -> Model:
        generator = torch.Generator().manual_seed(seed)
        return cls(seed, torch.randn(WIDTH, VOCABULARY, generator=generator, dtype=torch.float64))

    def states(self, ids: tuple[int, ...]) -> Tensor:
        """[n, d]"""
        seeds = [hash((self.seed, *ids[: t + 1])) % 2**31 for t in range(len(ids))]
        made = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        return torch.stack(made)

    def hidden(self, rows: MicroBatch, batch: Batch) -> Tensor:
        """[T, d]"""
        hidden = torch.randn(*batch.input_ids.shape, WIDTH, dtype=torch.float64)
        if batch.pieces is not None:
            rows = (tuple(item for row in rows for item in row),)
        for r, row in enumerate(rows):
            at = 0
            for item in row:
                hidden[r, at : at + item.tokens] = self.states(item.segment.ids)[item.shared :]
                at += item.tokens
        return hidden.flatten(0, 1)

    def reading(self, hidden: Tensor, batch: Batch, retain_loss: str) -> Reading:
        logits = hidden[batch.label_positions] @ self.head
        losses = F.cross_entropy(logits, batch.label_ids, reduction="none")
        if retain_loss == "kl":
            retain = batch.labels_of(Role.RETAIN)
            divergence = self.divergence(logits[retain])
            losses = torch.cat([losses[: retain.start], divergence, losses[retain.stop :]])
        return Reading(hidden, losses, torch.zeros(()))

    def divergence(self, logits: Tensor) -> Tensor:
        """[n] from another model's distribution, which is this one's for other tokens."""
        reference, logp = torch.log_softmax(logits.detach().roll(1, dims=1), -1), torch.log_softmax(logits, -1)
        return (reference.exp() * (reference - logp)).sum(-1)


def random(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Start:
    """What the starting model says of every answer: vectors [answers, d] and scores [answers]."""

    vectors: Tensor
    scores: Tensor

    @classmethod
    def of(cls, examples: ExampleSet) -> Start:
        return cls(random(len(examples.answers), WIDTH), random(len(examples.answers), seed=8))

    def targets(self, objective: WPN, plan: StepPlan) -> FrozenTargets:
        mask, vectors = torch.from_numpy(objective.mask(plan)), self.vectors[plan.unwanted_ids]

        def blocks(index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(vectors.split(2), mask[index].split(2, dim=1), strict=True)

        return FrozenTargets(self.vectors[plan.wanted_ids], blocks)

    def of_plan(self, objective: WPN, plan: StepPlan) -> StartingScores | None:
        scores = StartingScores(self.scores[plan.wanted_ids], self.scores[plan.unwanted_ids])
        return scores if objective.needs_starting_scores else None


@dataclass
class Forward:
    """One micro-batch as the step has it: a leaf for the states, and what is read from them."""

    batch: Batch
    hidden: Tensor
    reading: Reading
    states: States


def forwards(objective: WPN, plan: StepPlan, layout: Layout, model: Model) -> list[Forward]:
    """Every micro-batch of every rank."""
    found = []
    for rows in flat(plan.micro_batches):
        batch = collate(rows, PAD, roles=objective.predicted, flat=layout.flat)
        hidden = model.hidden(rows, batch).requires_grad_()
        reading = model.reading(hidden, batch, objective.retain_loss)
        states = objective.states(reading, batch) if objective.contrasts else {}
        found.append(Forward(batch, hidden, reading, states))
    return found


def gathered(parts: list[Forward]) -> States:
    """The states of all micro-batches, in the order of their items."""
    whole = {}
    for name in parts[0].states:
        values, index = (torch.cat(column) for column in zip(*(part.states[name] for part in parts), strict=True))
        assert sorted(index.tolist()) == list(range(len(index))), "every item has its state in one micro-batch"
        whole[name] = values[index.argsort()], torch.arange(len(index))
    return whole


def step_terms(objective: WPN, plan: StepPlan, parts: list[Forward], start: Start) -> tuple[dict[str, Term], Tensor]:
    """Terms of the whole step (sums over all micro-batches of all ranks), and the sum of their weighted totals."""
    found = [objective.likelihoods(part.reading, part.batch, plan.counts) for part in parts]
    if objective.frozen:
        targets = start.targets(objective, plan)
        found += [objective.contrast_frozen(part.states, targets, plan.counts["pairs"]) for part in parts]
    elif objective.contrasts:
        found.append(objective.contrast(gathered(parts), plan, start.of_plan(objective, plan)))
    terms: dict[str, Term] = {}
    for own in found:
        for name, term in own.items():
            assert name not in terms or terms[name].count == term.count
            terms[name] = Term(terms[name].total + term.total if name in terms else term.total, term.count)
    return terms, torch.stack([objective.total(own).double() for own in found]).sum()


# ---- the plain method ----


def pooled(states: Tensor, kind: str) -> Tensor:
    n = len(states)
    weights = {"weighted": [2 * t / (n * (n + 1)) for t in range(1, n + 1)], "mean": [1 / n] * n, "sum": [1.0] * n}
    weights["last"] = [0.0] * (n - 1) + [1.0]
    return (torch.tensor(weights[kind], dtype=torch.float64)[:, None] * states).sum(0)


def logprobs(model: Model, states: Tensor, ids: tuple[int, ...], start: int) -> Tensor:
    logp = torch.log_softmax(states @ model.head, -1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))])


def expected(objective: WPN, examples: ExampleSet, model: Model, start: Start) -> dict[str, float]:
    """Means over the step, item by item, after METHODS section 1."""
    kind, pairs, nll, retain = objective.pooling, [], [], []
    sides: dict[Role, list] = {Role.WANTED: [], Role.UNWANTED: []}
    for e, example in enumerate(examples.forget):
        for role, side in ((Role.WANTED, example.wanted), (Role.UNWANTED, example.unwanted)):
            for answer in side:
                s = answer.segment
                states = model.states(s.ids)
                own = logprobs(model, states, s.ids, s.answer_start)
                vector = start.vectors[answer.answer_id] if objective.frozen else pooled(states[s.answer_start :], kind)
                score = pooled(own[:, None], kind)[0]
                if objective.scoring == "likelihood_ratio":
                    score = score - start.scores[answer.answer_id]
                anchor = pooled(states[s.prompt_start : s.answer_start], kind)
                sides[role].append((e, answer.text_id, anchor, vector, score, own))
    unwanted = sides[Role.UNWANTED]
    for e, _, anchor, vector, score, own in sides[Role.WANTED]:
        texts = {text for other, text, *_ in sides[Role.WANTED] if other == e}
        negatives = [n for n in unwanted if n[1] not in texts and (objective.negatives == "step" or n[0] == e)]

        def s(target: Tensor, weighted: Tensor, anchor: Tensor = anchor) -> float:
            if objective.by_likelihood:
                return weighted.item()
            scale = anchor.norm() * target.norm() if objective.scoring == "cosine" else 1
            return (anchor @ target / scale).item()

        gaps = [(s(n[3], n[4]) - s(vector, score)) / objective.temperature for n in negatives]
        pairs.append(math.log1p(sum(map(math.exp, gaps))))
        nll.append(-own)
    for segment in examples.retain:
        states = model.states(segment.ids)
        if objective.retain_loss == "nll":
            retain.append(-logprobs(model, states, segment.ids, segment.answer_start))
        else:
            retain.append(model.divergence((states @ model.head)[segment.answer_start - 1 : -1]))
    parts = {"npair": sum(pairs) / len(pairs), "nll": torch.cat(nll).mean().item()}
    parts["ascent"] = torch.cat([own for *_, own in unwanted]).mean().item()
    return parts | ({"retain": torch.cat(retain).mean().item()} if retain else {})


BY_VECTORS = st.builds(
    WPN,
    pooling=st.sampled_from(["weighted", "mean", "last"]),
    scoring=st.sampled_from(["cosine", "dot"]),
    temperature=st.sampled_from([0.2, 3.0]),
    targets=st.sampled_from(["reference", "live"]),
    negatives=st.sampled_from(["step", "own"]),
    wpn_weight=st.just(0.7),
    nll_weight=st.just(1.3),
    retain_weight=st.just(2.0),
    retain_loss=st.sampled_from(["kl", "nll"]),
    ascent_weight=st.sampled_from([0.0, 0.4]),
)
BY_LIKELIHOOD = st.builds(
    WPN,
    pooling=st.sampled_from(["weighted", "mean", "last", "sum"]),
    scoring=st.sampled_from(["likelihood", "likelihood_ratio"]),
    temperature=st.sampled_from([1.0, 10.0]),
    targets=st.just("live"),
    negatives=st.just("own"),
    nll_weight=st.sampled_from([0.0, 1.3]),
    retain_loss=st.sampled_from(["kl", "nll"]),
    ascent_weight=st.sampled_from([0.0, 0.4]),
)
OBJECTIVES = BY_VECTORS | BY_LIKELIHOOD
STEPS = {"examples": example_sets(), "layout": layouts(), "seed": st.integers(0, 50)}


@several
@given(**STEPS, objective=OBJECTIVES)
def test_the_step_s_means_are_those_of_the_plain_method_whatever_the_layout(examples, layout, seed, objective) -> None:
    model, start = Model.make(seed), Start.of(examples)
    plan = plan_of(examples, layout, roles=objective.read)
    terms, total = step_terms(objective, plan, forwards(objective, plan, layout, model), start)
    means = {name: mean for name, mean in expected(objective, examples, model, start).items()
             if objective.weights[name] > 0}  # fmt: skip
    for name, mean in means.items():
        # position weights are handed out as fp32
        assert terms[name].total.item() / terms[name].count == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    weighted = sum(objective.weights[name] * mean for name, mean in means.items())
    assert total.item() == pytest.approx(weighted, rel=1e-5, abs=1e-6)


@several
@given(**STEPS, objective=OBJECTIVES)
def test_every_term_s_sum_is_the_same_however_the_step_is_split(examples, layout, seed, objective) -> None:
    model, start, results = Model.make(seed), Start.of(examples), []
    for each in (layout, ONE):
        plan = plan_of(examples, each, roles=objective.read)
        results.append(step_terms(objective, plan, forwards(objective, plan, each, model), start))
    (terms, total), (whole, whole_total) = results
    assert terms.keys() == whole.keys()
    for name in terms:
        assert terms[name].count == whole[name].count
        assert terms[name].total.item() == pytest.approx(whole[name].total.item(), rel=1e-9, abs=1e-9), name
    assert total.item() == pytest.approx(whole_total.item(), rel=1e-9, abs=1e-9)


@several
@given(**STEPS, objective=OBJECTIVES.filter(lambda objective: objective.coupled))
def test_where_a_step_is_local_its_micro_batches_contrast_by_themselves(examples, layout, seed, objective) -> None:
    start, plan = Start.of(examples), plan_of(examples, layout)
    parts = forwards(objective, plan, layout, Model.make(seed))
    of_plan = start.of_plan(objective, plan)
    whole = objective.contrast(gathered(parts), plan, of_plan)
    alone = [objective.contrast(part.states, plan, of_plan) for part in parts]
    for name in whole if plan.is_local(objective.mask(plan)) else ():
        total = torch.stack([terms[name].total for terms in alone]).sum().item()
        assert total == pytest.approx(whole[name].total.item(), rel=1e-9, abs=1e-9)


@several
@given(**STEPS, objective=OBJECTIVES)
def test_labels_times_their_weights_have_the_gradient_of_the_terms(examples, layout, seed, objective) -> None:
    plan, start = plan_of(examples, layout, roles=objective.read), Start.of(examples)
    parts = forwards(objective, plan, layout, Model.make(seed))
    terms = [objective.likelihoods(part.reading, part.batch, plan.counts) for part in parts]
    total = torch.stack([objective.total(own).double() for own in terms]).sum()
    cached: dict[str, Tensor] = {}
    if objective.by_likelihood:
        whole = gathered(parts)
        contrast = objective.total(objective.contrast(whole, plan, start.of_plan(objective, plan)))
        values = [values for values, _ in whole.values()]
        cached = dict(zip(whole, torch.autograd.grad(contrast, values, retain_graph=True), strict=True))
        total = total + contrast
    by_terms: Sequence[Tensor | None] = [None] * len(parts)
    if total.requires_grad:
        leaves = [part.hidden for part in parts]
        by_terms = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    for part, gradient in zip(parts, by_terms, strict=True):
        own = {name: cached[name][part.states[name][1]] for name in cached}
        weights = objective.label_weights(part.batch, plan.counts, own)
        assert weights.shape == part.batch.label_ids.shape
        (by_weights,) = torch.autograd.grad((weights * part.reading.losses).sum(), part.hidden)
        plain = torch.zeros_like(by_weights) if gradient is None else gradient
        assert torch.allclose(by_weights, plain, rtol=1e-4, atol=1e-7)


@several
@given(seed=st.integers(0, 1000), layout=layouts(), beta=st.sampled_from([0.1, 0.5, 2.0]), data=st.data())
def test_likelihood_ratios_of_sums_over_own_negatives_are_dpo(seed, layout, beta, data) -> None:
    """``-log sigmoid(beta (log pi/pi_0 (wanted) - log pi/pi_0 (unwanted)))``, arXiv 2305.18290."""
    texts = st.lists(st.integers(4, 90), min_size=1, max_size=8).map(tuple)
    examples, answers = ExampleSet(), []
    for e in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(texts)
        wanted, unwanted = data.draw(st.lists(texts, min_size=2, max_size=2, unique=True))
        pair = [Segment((*prompt, *text, 2), 0, len(prompt)) for text in (wanted, unwanted)]
        sides = [(Answer(segment, 2 * e + k, 2 * e + k),) for k, segment in enumerate(pair)]
        examples.forget.append(ForgetExample(*sides))
        answers.append(pair)
    policy, reference = Model.make(seed), Model.make(seed + 1)

    def score(model: Model, s: Segment) -> Tensor:
        return logprobs(model, model.states(s.ids), s.ids, s.answer_start).sum()

    ratios = torch.stack([score(policy, s) - score(reference, s) for pair in answers for s in pair]).reshape(-1, 2)
    dpo = -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean()
    start = Start(torch.empty(0), torch.stack([score(reference, a.segment) for a in examples.answers]))
    objective = WPN(
        pooling="sum",
        scoring="likelihood_ratio",
        temperature=1 / beta,
        targets="live",
        negatives="own",
        nll_weight=0,
        retain_weight=0,
    )
    plan = plan_of(examples, layout)
    _, total = step_terms(objective, plan, forwards(objective, plan, layout, policy), start)
    assert total.item() == pytest.approx(dpo.item(), rel=1e-9, abs=1e-12)


# ---- names, counts, figures ----


@several
@given(examples=example_sets(), objective=OBJECTIVES)
def test_terms_carry_the_names_and_the_step_s_counts(examples, objective) -> None:
    plan = plan_of(examples, ONE, roles=objective.read)
    terms, _ = step_terms(objective, plan, forwards(objective, plan, ONE, Model.make(0)), Start.of(examples))
    figures = {"sim/positive", "sim/negative", "sim/margin"} | ({"norm/anchor"} if objective.frozen else set())
    assert terms.keys() == {name for name, weight in objective.weights.items() if weight} | figures
    pairs = sum(len(e.wanted) for e in examples.forget)
    assert all(terms[name].count == pairs for name in {"npair"} | figures)
    assert all(terms[name].count == plan.counts[name] for name in ("nll", "retain", "ascent") if name in terms)
    margin = terms["sim/positive"].total - terms["sim/negative"].total
    assert terms["sim/margin"].total.item() == pytest.approx(margin.item(), abs=1e-9)


def frozen(positive: Tensor, negative: Tensor, mask: list[list[int]]) -> FrozenTargets:
    return FrozenTargets(positive, lambda index: [(negative, torch.tensor(mask).bool()[index])])


def test_figures_to_log_have_no_gradient_and_no_weight() -> None:
    anchors = torch.randn(2, WIDTH, requires_grad=True)
    targets = frozen(torch.randn(2, WIDTH), torch.randn(3, WIDTH), [[1, 0, 1], [0, 0, 0]])
    terms = WPN().contrast_frozen({"anchor": (anchors, torch.tensor([1, 0]))}, targets, 2)
    assert [name for name, term in terms.items() if term.total.requires_grad] == ["npair"]
    assert torch.equal(WPN(wpn_weight=3).total(terms), 3 * terms["npair"].total / 2)


def test_an_anchor_meets_the_targets_of_its_own_index() -> None:
    anchors = torch.eye(2, WIDTH)
    targets = frozen(torch.eye(2, WIDTH).flip(0), torch.eye(2, WIDTH), [[0, 1], [0, 0]])
    terms = WPN(scoring="dot", temperature=1.0).contrast_frozen({"anchor": (anchors, torch.tensor([1, 0]))}, targets, 2)
    # anchor e0 is pair 1: its positive is e0 and it has no negatives; anchor e1 is pair 0: positive e1, negative e1
    assert terms["sim/positive"].total.item() == 2 and terms["sim/negative"].total.item() == 1
    assert terms["npair"].total.item() == pytest.approx(math.log(2))


def test_a_pair_without_negatives_has_a_mean_negative_similarity_of_zero_and_no_nan() -> None:
    targets = frozen(torch.ones(1, WIDTH), torch.ones(2, WIDTH), [[0, 0]])
    terms = WPN().contrast_frozen({"anchor": (torch.ones(1, WIDTH), torch.tensor([0]))}, targets, 1)
    assert terms["npair"].total == 0 and terms["sim/negative"].total == 0


# ---- gradients and precision ----


@pytest.mark.parametrize("form", ["rows", "shared"])
@pytest.mark.parametrize("targets", ["reference", "live"])
def test_frozen_targets_move_prompts_only_and_live_ones_answers_too(targets, form) -> None:
    examples = example_set()
    objective = WPN(targets=targets, nll_weight=0, retain_weight=0)
    plan = plan_of(replace(examples, retain=[]), layout(form))
    (part,) = forwards(objective, plan, layout(form), Model.make(0))
    _, total = step_terms(objective, plan, [part], Start.of(examples))
    (gradient,) = torch.autograd.grad(total, part.hidden)
    moved = set(gradient.norm(dim=1).nonzero().flatten().tolist())
    batch = part.batch
    spans = [batch.prompts] if targets == "reference" else [batch.prompts, batch.wanted, batch.unwanted]
    places = [zip(span.start.tolist(), span.stop.tolist(), strict=True) for span in spans]
    assert moved == {t for pairs in places for start, stop in pairs for t in range(start, stop)}


def test_states_and_terms_of_a_bf16_model_are_fp32() -> None:
    examples = example_set()
    for objective in (WPN(), WPN(targets="live"), WPN(scoring="likelihood", targets="live", negatives="own")):
        plan = plan_of(examples, ONE, roles=objective.read)
        for part in forwards(objective, plan, ONE, Model.make(0)):
            reading = Reading(part.hidden.bfloat16(), part.reading.losses.float(), torch.zeros(()))
            states = objective.states(reading, part.batch)
            terms = objective.likelihoods(reading, part.batch, plan.counts)
            if objective.frozen:
                targets = Start(random(len(examples.answers), WIDTH).float(), torch.empty(0)).targets(objective, plan)
                terms |= objective.contrast_frozen(states, targets, plan.counts["pairs"])
            assert {v.dtype for v, _ in states.values()} == {t.total.dtype for t in terms.values()} == {torch.float32}
            assert objective.label_weights(part.batch, plan.counts).dtype == torch.float32


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

BOTH = {"targets": "live", "negatives": "own"}


@pytest.mark.parametrize(
    ("changes", "predicted", "frozen", "coupled"),
    [
        ({}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"targets": "detached"}, {Role.WANTED, Role.RETAIN}, True, False),
        ({"targets": "live"}, {Role.WANTED, Role.RETAIN}, False, True),
        ({"nll_weight": 0.0}, {Role.RETAIN}, True, False),
        ({"retain_weight": 0.0}, {Role.WANTED}, True, False),
        ({"ascent_weight": 0.5}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, True, False),
        ({"ascent_weight": 0.5, "wpn_weight": 0, "nll_weight": 0}, {Role.UNWANTED, Role.RETAIN}, False, False),
        ({"wpn_weight": 0.0, "targets": "live"}, {Role.WANTED, Role.RETAIN}, False, False),
        ({"wpn_weight": 0.0, "scoring": "likelihood_ratio", **BOTH}, {Role.WANTED, Role.RETAIN}, False, False),
        ({"scoring": "likelihood", **BOTH}, {Role.WANTED, Role.UNWANTED, Role.RETAIN}, False, True),
        ({"scoring": "likelihood_ratio", "nll_weight": 0.0, **BOTH}, set(Role) - {Role.DEAD}, False, True),
    ],
)
def test_only_what_a_setting_needs_is_predicted_and_gathered(changes, predicted, frozen, coupled) -> None:
    objective = replace(WPN(), **changes)
    assert objective.predicted == predicted
    assert (objective.frozen, objective.coupled) == (frozen, coupled)
    contrasted = ({Role.WANTED} if frozen or coupled else set()) | ({Role.UNWANTED} if coupled else set())
    assert objective.read == predicted | contrasted
    ratio = objective.scoring == "likelihood_ratio" and objective.wpn_weight > 0
    assert objective.needs_starting_scores == ratio


@pytest.mark.parametrize(
    ("changes", "needed"), [({}, True), ({"retain_loss": "nll"}, False), ({"retain_weight": 0.0}, False)]
)
def test_the_starting_distribution_is_needed_for_kl_alone(changes, needed) -> None:
    assert WPN(**changes).keeps_distribution == needed
