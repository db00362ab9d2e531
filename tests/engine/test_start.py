"""What the starting model said stays, each term gets what is its own, and vectors of the current model follow it."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.gradient_cases import make_examples
from tests.engine.small import alone, silent, small_reader
from wpn_ds.data.batch import collate
from wpn_ds.data.layout import Layout, plan_step
from wpn_ds.engine.tables import Tables
from wpn_ds.engine.tabulate import Tabulator
from wpn_ds.losses.answers import AnswerScores, AnswerVectors
from wpn_ds.objectives.terms import NPair, OnAnswers, OnTokens, Role, Terms

EXAMPLES = make_examples()
PLAN = plan_step(EXAMPLES, [3, 1, 5], [], Layout(64, 64, True, 1), roles=frozenset({Role.WANTED}))


def refused(segments: Any) -> Any:
    raise AssertionError("no term asks for the starting model's distribution")


def loss(margins: torch.Tensor) -> torch.Tensor:
    return margins


ANSWERS = (
    OnAnswers("sums", 1.0, loss, score="sum", relative=True),
    OnAnswers("means", 1.0, loss, pairs="alone", score="mean", relative=True),
    OnAnswers("plain", 1.0, loss, score="sum"),
    OnAnswers("frozen", 1.0, NPair(0.1), vectors="mean", answers="frozen"),
    OnAnswers("detached", 1.0, NPair(0.1), vectors="last", answers="detached"),
    OnAnswers("live", 1.0, NPair(0.1), vectors="last"),
)


def test_each_term_is_compared_to_what_it_asked_for(world, tmp_path) -> None:
    terms, reader = Terms((), ANSWERS), small_reader(world)
    start = Tabulator(reader, Tables(tmp_path, {}), silent).start(terms, EXAMPLES, refused)
    assert (start.banks.keys(), start.scores.keys()) == ({"frozen"}, {"sums", "means"})
    assert start.logprobs is None and start.reference is None

    def own(i: int) -> torch.Tensor:
        s = EXAMPLES.answers[i].segment
        return torch.stack([alone(s)[1][t - 1, s.ids[t]] for t in range(s.answer_start, len(s))])

    before = start.of(PLAN)
    assert before.keys() == {term.name for term in ANSWERS}
    assert before["plain"] is None and before["live"] is None
    for name, pooled in (("sums", torch.sum), ("means", torch.mean)):
        scores = before[name]
        assert isinstance(scores, AnswerScores)
        for mine, ids in ((scores.wanted, PLAN.wanted_ids), (scores.unwanted, PLAN.unwanted_ids)):
            torch.testing.assert_close(mine, torch.stack([pooled(own(i)) for i in ids]), rtol=1e-4, atol=1e-5)
    vectors = {name: before[name] for name in ("frozen", "detached")}
    for name, of in vectors.items():
        assert isinstance(of, AnswerVectors)
        states = [alone(s := EXAMPLES.answers[i].segment)[0][s.answer_start :] for i in PLAN.wanted_ids]
        plain = torch.stack([each.mean(0) if name == "frozen" else each[-1] for each in states])
        torch.testing.assert_close(of.wanted, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in reader.engine.module.parameters():
            parameter.mul_(1.2)
    after = start.of(PLAN)
    for name, of in vectors.items():
        assert torch.equal(after[name].wanted, of.wanted) == (name == "frozen")  # type: ignore[union-attr]
    assert torch.equal(after["sums"].wanted, before["sums"].wanted)  # type: ignore[union-attr]


def test_labels_are_compared_to_what_their_term_says_and_others_to_their_tokens(world, tmp_path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def target(ids: torch.Tensor, start: torch.Tensor | None) -> Any:
        seen.append((ids, start))
        return "made"

    fading = OnTokens("fading", 1.0, Role.UNWANTED, target, start=True)
    terms, reader = Terms((fading, OnTokens("nll", 1.0, Role.WANTED)), ()), small_reader(world)
    start = Tabulator(reader, Tables(tmp_path, {}), silent).start(terms, EXAMPLES, refused)
    plan = plan_step(EXAMPLES, [3, 1, 5], [], reader.layout, roles=terms.read)
    labels = 0
    for k, rows in enumerate(plan.micro_batches[0]):
        batch = collate(rows, 0, roles=terms.predicted, flat=True)
        with start.targets(batch, plan, plan.roles(k)) as targets:
            assert targets == {Role.UNWANTED: "made"}
        ids, logprobs = seen[-1]
        plain = []
        for i in plan.unwanted_ids[list(batch.unwanted_items)]:
            s = EXAMPLES.answers[i].segment
            plain += [(s.ids[t], alone(s)[1][t - 1, s.ids[t]].item()) for t in range(s.answer_start, len(s))]
        assert ids.tolist() == [token for token, _ in plain] and logprobs is not None
        torch.testing.assert_close(logprobs, torch.tensor([p for _, p in plain]), rtol=1e-4, atol=1e-5)
        labels += len(plain)
    assert labels == plan.label_tokens[Role.UNWANTED]
