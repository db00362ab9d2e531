"""The step's means and gradients are those of the plain method, however its answers lie in micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.made import PAD, example_sets, flat, layout, layouts, plan_of
from tests.engine.small import Engine
from tests.engine.stepping import Model, Rolled, Said, random, start_of, take
from wpn_ds.data.batch import collate
from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Segment
from wpn_ds.engine.step import label_gradients, means_of, states_of
from wpn_ds.models.packed import Output
from wpn_ds.objectives.terms import NPair, OnAnswers, OnTokens, Role, Terms
from wpn_ds.objectives.wpn import WPN

ONE = layout("rows")
several = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- the plain method ----


def position_weights(n: int, power: float) -> Tensor:
    weights = torch.tensor([t**power for t in range(1, n + 1)], dtype=torch.float64)
    return weights / weights.sum()


def pooled(states: Tensor, kind: str, power: float) -> Tensor:
    n = len(states)
    weights = {"weighted": position_weights(n, power).tolist(), "mean": [1 / n] * n, "sum": [1.0] * n}
    weights["last"] = [0.0] * (n - 1) + [1.0]
    return (torch.tensor(weights[kind], dtype=torch.float64)[:, None] * states).sum(0)


def logprobs(model: Model, states: Tensor, ids: tuple[int, ...], start: int) -> Tensor:
    logp = torch.log_softmax(states @ model.head, -1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))])


def divergence(logits: Tensor) -> Tensor:
    """[n] from another model's distribution, which is this one's for other tokens."""
    reference, logp = torch.log_softmax(logits.detach().roll(1, dims=1), -1), torch.log_softmax(logits, -1)
    return (reference.exp() * (reference - logp)).sum(-1)


def expected(objective: WPN, examples: ExampleSet, model: Model, said: Said) -> dict[str, Tensor]:
    """Means over the step, item by item, after METHODS section 1, with their gradients."""
    kind, pairs, nll, retain = (objective.wpn_pooling, objective.wpn_position_power), [], [], []
    by_likelihood = objective.wpn_scoring.startswith("likelihood")
    sides: dict[Role, list] = {Role.WANTED: [], Role.UNWANTED: []}
    for e, example in enumerate(examples.forget):
        for role, side in ((Role.WANTED, example.wanted), (Role.UNWANTED, example.unwanted)):
            for answer in side:
                s = answer.segment
                states = model.states(s.ids)
                own = logprobs(model, states, s.ids, s.answer_start)
                frozen = objective.wpn_targets == "reference"
                vector = said.vectors[answer.answer_id] if frozen else pooled(states[s.answer_start :], *kind)
                score = pooled(own[:, None], *kind)[0]
                if objective.wpn_scoring == "likelihood_ratio":
                    score = score - said.scores[answer.answer_id]
                prompt = pooled(states[s.prompt_start : s.answer_start], *kind)
                sides[role].append((e, answer.text_id, prompt, vector, score, own))
    unwanted = sides[Role.UNWANTED]
    for e, _, prompt, vector, score, own in sides[Role.WANTED]:
        texts = {text for other, text, *_ in sides[Role.WANTED] if other == e}
        negatives = [n for n in unwanted if n[1] not in texts and (objective.wpn_negatives == "step" or n[0] == e)]

        def s(target: Tensor, weighted: Tensor, prompt: Tensor = prompt) -> Tensor:
            if by_likelihood:
                return weighted
            scale = prompt.norm() * target.norm() if objective.wpn_scoring == "cosine" else 1
            return prompt @ target / scale

        gaps = [((s(n[3], n[4]) - s(vector, score)) / objective.wpn_temperature).exp() for n in negatives]
        pairs.append(torch.log1p(torch.stack(gaps).sum()) if gaps else torch.zeros((), dtype=torch.float64))
        nll.append(-own * len(own) * position_weights(len(own), objective.nll_position_power))
    for segment in examples.retain:
        states = model.states(segment.ids)
        if objective.retain_loss == "nll":
            retain.append(-logprobs(model, states, segment.ids, segment.answer_start))
        else:
            retain.append(divergence((states @ model.head)[segment.answer_start - 1 : -1]))
    parts = {"npair": torch.stack(pairs).mean()}
    parts["nll_weighted" if objective.nll_position_power else "nll"] = torch.cat(nll).mean()
    parts["ascent"] = torch.cat([own for *_, own in unwanted]).mean()
    return parts | ({"retain": torch.cat(retain).mean()} if retain else {})


#: Pooling and power; half of them as they are by default.
RISES = st.sampled_from([1.0, 1.0, -1.0, 0.0, 2.5]).map(lambda power: ("weighted", power))


def built(pooling: tuple[str, float], **flags: Any) -> WPN:
    return WPN(wpn_pooling=pooling[0], wpn_position_power=pooling[1], **flags)


BY_VECTORS = st.builds(
    built,
    pooling=RISES | st.sampled_from([("mean", 1.0), ("last", 1.0)]),
    wpn_scoring=st.sampled_from(["cosine", "dot"]),
    wpn_temperature=st.sampled_from([0.2, 3.0]),
    wpn_targets=st.sampled_from(["reference", "live"]),
    wpn_negatives=st.sampled_from(["step", "own"]),
    wpn_weight=st.just(0.7),
    nll_weight=st.just(1.3),
    nll_position_power=st.sampled_from([0.0, 0.0, 1.5]),
    retain_weight=st.just(2.0),
    retain_loss=st.sampled_from(["kl", "nll"]),
    ascent_weight=st.sampled_from([0.0, 0.4]),
)
BY_LIKELIHOOD = st.builds(
    built,
    pooling=RISES | st.sampled_from([("mean", 1.0), ("last", 1.0), ("sum", 1.0)]),
    wpn_scoring=st.sampled_from(["likelihood", "likelihood_ratio"]),
    wpn_temperature=st.sampled_from([1.0, 10.0]),
    wpn_targets=st.just("live"),
    wpn_negatives=st.sampled_from(["step", "own"]),
    nll_weight=st.sampled_from([0.0, 1.3]),
    nll_position_power=st.sampled_from([0.0, 0.0, -0.5]),
    retain_loss=st.sampled_from(["kl", "nll"]),
    ascent_weight=st.sampled_from([0.0, 0.4]),
)
OBJECTIVES = BY_VECTORS | BY_LIKELIHOOD
STEPS = {"examples": example_sets(), "layout": layouts(), "seed": st.integers(0, 50)}


def fit(layout: Layout, terms: Terms) -> Layout:
    """As a run lays out: what is pooled lies in one place."""
    return replace(layout, share_header=layout.share_header and not terms.pools)


@several
@given(**STEPS, objective=OBJECTIVES)
def test_the_step_s_means_and_gradients_are_those_of_the_plain_method(world, examples, layout, seed, objective) -> None:
    terms, said = Terms.of(objective, retain=bool(examples.retain)), Said.of(examples)
    layout = fit(layout, terms)
    plan = plan_of(examples, layout, roles=terms.read)
    taken = take(terms, examples, plan, layout, world, Model.make(seed), said)
    plain = Model.make(seed)
    means = {k: mean for k, mean in expected(objective, examples, plain, said).items() if k in terms.weights}
    assert means.keys() == terms.weights.keys()
    for name, mean in means.items():
        # position weights are handed out as fp32
        assert taken.means[name] == pytest.approx(mean.item(), rel=1e-5, abs=1e-6), name
    total = torch.stack([terms.weights[name] * mean for name, mean in means.items()]).sum()
    gradients = torch.autograd.grad(total, [plain.mix, plain.head], allow_unused=True)
    for parameter, gradient in zip((taken.model.mix, taken.model.head), gradients, strict=True):
        its = torch.zeros_like(parameter) if gradient is None else gradient
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@several
@given(**STEPS, objective=OBJECTIVES)
def test_every_term_s_sum_is_the_same_however_the_step_is_split(world, examples, layout, seed, objective) -> None:
    terms, said, results = Terms.of(objective, retain=bool(examples.retain)), Said.of(examples), []
    for each in (fit(layout, terms), ONE):
        plan = plan_of(examples, each, roles=terms.read)
        results.append(take(terms, examples, plan, each, world, Model.make(seed), said).sums)
    split, whole = results
    assert split.counts == whole.counts
    for name, total in split.totals.items():
        assert total.item() == pytest.approx(whole.totals[name].item(), rel=1e-9, abs=1e-9), name


@several
@given(**STEPS, power=st.sampled_from([-1.0, 0.5, 2.0]))
def test_a_token_counts_by_its_place_and_an_answer_by_its_length(world, examples, layout, seed, power) -> None:
    sides = {
        OnTokens("up", 1.3, Role.WANTED, power=power): [a.segment for e in examples.forget for a in e.wanted],
        OnTokens("down", 0.4, Role.UNWANTED, ascend=True, power=power): [
            a.segment for e in examples.forget for a in e.unwanted
        ],
    }
    terms, plain = Terms(tuple(sides), ()), Model.make(seed)
    plan = plan_of(examples, layout, roles=terms.read)
    taken = take(terms, examples, plan, layout, world, Model.make(seed), Said.of(examples))
    total = torch.zeros((), dtype=torch.float64)
    for term, segments in sides.items():
        own = [logprobs(plain, plain.states(s.ids), s.ids, s.answer_start) for s in segments]
        sign = 1 if term.ascend else -1
        weighted = [len(logp) * (position_weights(len(logp), power) * logp).sum() for logp in own]
        mean = sign * torch.stack(weighted).sum() / sum(map(len, own))
        assert taken.means[f"{term.name}_weighted"] == pytest.approx(mean.item(), rel=1e-5)
        assert taken.means[f"loss/{term.name}"] == pytest.approx(sign * torch.cat(own).mean().item(), rel=1e-5)
        total = total + term.weight * mean
    gradients = torch.autograd.grad(total, [plain.mix, plain.head])
    torch.testing.assert_close((taken.model.mix.grad, taken.model.head.grad), gradients, rtol=1e-4, atol=1e-6)


@several
@given(seed=st.integers(0, 1000), layout=layouts(), beta=st.sampled_from([0.1, 0.5, 2.0]), data=st.data())
def test_likelihood_ratios_of_sums_over_own_negatives_are_dpo(world, seed, layout, beta, data) -> None:
    """``-log sigmoid(beta (log pi/pi_0 (wanted) - log pi/pi_0 (unwanted)))``, arXiv 2305.18290."""
    texts = st.lists(st.integers(4, 90), min_size=1, max_size=8).map(tuple)
    forget, answers = [], []
    for e in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(texts)
        wanted, unwanted = data.draw(st.lists(texts, min_size=2, max_size=2, unique=True))
        pair = [Segment((*prompt, *text, 2), 0, len(prompt)) for text in (wanted, unwanted)]
        sides = [(Answer(segment, 2 * e + k, 2 * e + k),) for k, segment in enumerate(pair)]
        forget.append(ForgetExample(*sides))
        answers.append(pair)
    examples = ExampleSet(forget)
    policy, reference = Model.make(seed), Model.make(seed + 1)

    def score(model: Model, s: Segment) -> Tensor:
        return logprobs(model, model.states(s.ids), s.ids, s.answer_start).sum().detach()

    ratios = torch.stack([score(policy, s) - score(reference, s) for pair in answers for s in pair]).reshape(-1, 2)
    dpo = -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean()
    said = Said(torch.empty(0), torch.stack([score(reference, a.segment) for a in examples.answers]))
    terms = Terms.of(
        WPN(
            wpn_pooling="sum",
            wpn_scoring="likelihood_ratio",
            wpn_temperature=1 / beta,
            nll_weight=0.0,
            retain_weight=0.0,
        )
    )
    taken = take(terms, examples, plan_of(examples, layout, roles=terms.read), layout, world, policy, said)
    assert taken.means["npair"] == pytest.approx(dpo.item(), rel=1e-9, abs=1e-12)


# ---- names, counts, figures ----


@several
@given(examples=example_sets(), objective=OBJECTIVES)
def test_means_carry_the_terms_names_and_the_step_s_counts(world, examples, objective) -> None:
    terms = Terms.of(objective, retain=bool(examples.retain))
    plan = plan_of(examples, ONE, roles=terms.read)
    sums = take(terms, examples, plan, ONE, world, Model.make(0), Said.of(examples)).sums
    frozen = objective.wpn_targets == "reference"
    figures = {"sim/positive", "sim/negative", "sim/margin"} | ({"norm/anchor"} if frozen else set())
    plain = {"loss/nll"} if "nll_weighted" in terms.weights else set()
    assert sums.totals.keys() == sums.counts.keys() == terms.weights.keys() | figures | plain
    pairs = sum(len(e.wanted) for e in examples.forget)
    assert all(sums.counts[name] == pairs for name in {"npair"} | figures)
    roles = {"nll": Role.WANTED, "nll_weighted": Role.WANTED, "loss/nll": Role.WANTED}
    roles |= {"retain": Role.RETAIN, "ascent": Role.UNWANTED}
    assert all(sums.counts[name] == plan.label_tokens[role] for name, role in roles.items() if name in sums.counts)
    margin = sums.totals["sim/positive"] - sums.totals["sim/negative"]
    assert sums.totals["sim/margin"].item() == pytest.approx(margin.item(), abs=1e-9)


# ---- several terms on answers ----


def logistic(margins: Tensor) -> Tensor:
    return -F.logsigmoid(margins)


#: One of each kind: what a pair looks at, and whether it needs another pass.
KINDS = {
    "frozen": OnAnswers("frozen", 0.7, NPair(0.5), "step", vectors="mean", answers="frozen"),
    "bank": OnAnswers("bank", 0.3, NPair(0.5), "bank", vectors="last", similarity="dot", answers="frozen"),
    "detached": OnAnswers("detached", 0.6, NPair(0.5), "own", vectors="mean", answers="detached"),
    "live": OnAnswers("live", 0.9, NPair(0.5), "step", vectors="weighted"),
    "pairs": OnAnswers("pairs", 1.1, logistic, "own", score="sum", beta=0.3, relative=True),
    "means": OnAnswers("means", 0.4, logistic, "step", score="mean"),
    "alone": OnAnswers("alone", 0.5, logistic, "alone", score="mean", beta=2.0),
    "scores": OnAnswers("scores", 0.8, NPair(2.0), "own", score="weighted"),
}


@several
@given(**STEPS, names=st.sets(st.sampled_from(sorted(KINDS)), min_size=2, max_size=3))
def test_terms_on_answers_add_up_however_the_step_is_split(world, examples, layout, seed, names) -> None:
    said, kinds = Said.of(examples), [KINDS[name] for name in sorted(names)]

    def gradients(answers: list[OnAnswers], each) -> tuple[Model, dict[str, float]]:
        terms = Terms((), tuple(answers))
        plan = plan_of(ExampleSet(examples.forget), each, roles=terms.read)
        taken = take(terms, examples, plan, each, world, Model.make(seed), said)
        return taken.model, taken.means

    together, means = gradients(kinds, layout)
    apart = [gradients([kind], ONE) for kind in kinds]
    for name in ("mix", "head"):
        parts = [found.grad for model, _ in apart if (found := getattr(model, name)).grad is not None]
        mine = getattr(together, name).grad
        torch.testing.assert_close(mine, torch.stack(parts).sum(0) if parts else mine, rtol=1e-4, atol=1e-6)
    for kind, (_, own) in zip(kinds, apart, strict=True):
        named = {n if n == kind.name else f"{kind.name}/{n}": value for n, value in own.items()}
        assert {n: means.pop(n) for n in named} == pytest.approx(named, rel=1e-5, abs=1e-6)
    assert not means, "figures that are no term's"


@several
@given(**STEPS, name=st.sampled_from(["live", "pairs", "means", "scores"]))
def test_where_a_step_is_local_its_micro_batches_compare_by_themselves(world, examples, layout, seed, name) -> None:
    term, said = KINDS[name], Said.of(examples)
    terms = Terms((), (term,))
    plan, model = plan_of(examples, layout, roles=terms.read), Model.make(seed)
    fixed = start_of(terms, examples, Engine(model), layout, world, said).of(plan)[name]
    parts = []
    for rows in flat(plan.micro_batches):
        batch = collate(rows, PAD, roles=terms.predicted, flat=layout.flat)
        parts.append(states_of(term, model(batch), batch))
    whole = {}
    for kind in parts[0]:
        values, index = (torch.cat(column) for column in zip(*(part[kind] for part in parts), strict=True))
        assert sorted(index.tolist()) == list(range(len(index))), "every item has its state in one micro-batch"
        whole[kind] = values[index.argsort()], torch.arange(len(index))
    together = means_of(term, whole, plan, fixed)
    alone = [means_of(term, part, plan, fixed) for part in parts]
    for figure in together if plan.is_local(plan.mask(term.pairs)) else ():
        total = torch.stack([means[figure].total for means in alone]).sum().item()
        assert total == pytest.approx(together[figure].total.item(), rel=1e-9, abs=1e-9)


# ---- gradients and precision ----


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


@pytest.mark.parametrize("form", ["rows", "shared"])
@pytest.mark.parametrize("targets", ["reference", "live"])
def test_frozen_targets_move_prompts_only_and_live_ones_answers_too(world, targets, form) -> None:
    examples, each = ExampleSet(example_set().forget), layout(form)
    terms = Terms.of(WPN(wpn_targets=targets, nll_weight=0.0, retain_weight=0.0))
    plan = plan_of(examples, each, roles=terms.read)
    taken = take(terms, examples, plan, each, world, Model.make(0), Said.of(examples))
    (hidden,), ((rows,),) = taken.model.hidden, plan.micro_batches
    assert hidden.grad is not None
    moved = set(hidden.grad.norm(dim=1).nonzero().flatten().tolist())
    batch = collate(rows, PAD, roles=terms.predicted, flat=each.flat)
    spans = [batch.prompts] if targets == "reference" else [batch.prompts, batch.wanted, batch.unwanted]
    places = [zip(span.start.tolist(), span.stop.tolist(), strict=True) for span in spans]
    assert moved == {t for pairs in places for start, stop in pairs for t in range(start, stop)}


@pytest.mark.parametrize("name", KINDS)
def test_states_and_means_of_a_bf16_model_are_fp32(world, name) -> None:
    examples, term = example_set(), KINDS[name]
    terms, model = Terms((), (term,)), Model.make(0)
    said = Said(random(4, 6).float(), random(4).float())
    plan = plan_of(examples, ONE, roles=terms.read)
    for rows in flat(plan.micro_batches):
        batch = collate(rows, PAD, roles=terms.predicted)
        output = model(batch)
        output = Output(output.hidden.bfloat16(), output.losses.float(), torch.zeros(()))
        states = states_of(term, output, batch)
        fixed = None
        if name != "detached":
            fixed = start_of(terms, examples, Engine(model), ONE, world, said).of(plan)[name]
            means = means_of(term, states, plan, fixed)
            assert {m.total.dtype for m in means.values()} == {torch.float32}
        assert {v.dtype for v, _ in states.values()} == {torch.float32}
        if term.score is not None:
            gradients = {kind: values.detach() for kind, (values, _) in states.items()}
            assert label_gradients(term, gradients, batch, len(batch.label_ids)).dtype == torch.float32


def test_the_made_up_divergence_has_the_slope_that_it_says() -> None:
    logits = random(4, 9).requires_grad_()
    losses, slope = Rolled().losses(logits.detach().clone(), slice(0, 4))
    plain = divergence(logits)
    torch.testing.assert_close(losses, plain.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), logits)[0])
