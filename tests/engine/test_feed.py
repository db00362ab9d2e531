"""The feed gives a step its examples: a function of its state, which a resumed run takes up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.data.made import example_sets, flat, items_of
from tests.engine.gradient_cases import make_examples
from tests.engine.small import alone, small_reader
from wpn_ds.data.examples import ExampleSet, answer_ids
from wpn_ds.data.layout import Layout
from wpn_ds.data.plan import Segment
from wpn_ds.engine import feed as feed_module
from wpn_ds.engine.feed import Feed, still_known
from wpn_ds.engine.reading import Reader, answer_scores
from wpn_ds.engine.redraw import Redraw, Replay, Request
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.run import TrainingConfig

LAYOUT = Layout(48, 150, packed=True, world_size=1)
several = settings(max_examples=40)


def feed_of(examples: ExampleSet, past: Mapping[str, Any] | None = None, size: int = 2, **more: Any) -> Feed:
    training = TrainingConfig(seed=5, global_batch_size=size)
    return Feed(examples, training, 2, LAYOUT, frozenset(Role), past=past, **more)


def taken(feed: Feed, step: int) -> list[tuple[Role, Segment]]:
    return [(item.role, item.segment) for item in items_of(flat(feed.plan(step).micro_batches))]


# ---- the order, and the state ----


@several
@given(examples=example_sets(), size=st.integers(1, 6), step=st.integers(1, 40), data=st.data())
def test_a_feed_goes_on_from_its_state_as_it_would_have_gone_on(examples, size, step, data) -> None:
    everything = list(range(len(examples.forget)))
    feed = feed_of(examples, size=size)
    for _ in range(data.draw(st.integers(0, 3))):
        known = everything if feed.left is None else feed.left
        feed.keep(sorted(data.draw(st.sets(st.sampled_from(known), min_size=1))), data.draw(st.integers(0, step - 1)))
    resumed = feed_of(examples, json.loads(json.dumps(feed.state())), size=size)
    assert resumed.state() == feed.state() and resumed.empty == feed.empty
    assert [taken(resumed, s) for s in (step, step + 1)] == [taken(feed, s) for s in (step, step + 1)]


@several
@given(examples=example_sets(), size=st.integers(1, 6), order=st.permutations(range(1, 9)))
def test_a_step_s_examples_depend_on_no_step_before_it(examples, size, order) -> None:
    feed = feed_of(examples, size=size)
    apart = {step: taken(feed, step) for step in order}
    assert apart == {step: taken(feed_of(examples, size=size), step) for step in range(1, 9)}


@several
@given(examples=example_sets(), data=st.data())
def test_only_what_is_left_is_taken_and_all_of_it_in_an_epoch(examples, data) -> None:
    left = sorted(data.draw(st.sets(st.integers(0, len(examples.forget) - 1), min_size=1)))
    since = data.draw(st.integers(0, 7))
    feed = feed_of(examples, size=1)
    feed.keep(left, since)
    if len(left) == len(examples.forget):
        assert feed.state()["left"] is None and feed.state()["left_since"] == 0, "nothing left, nothing begins again"
        since = 0
    found = [wanted for s in range(since + 1, since + 1 + len(left)) for wanted in feed.plan(s).wanted_ids.tolist()]
    assert sorted(found) == sorted(answer.answer_id for i in left for answer in examples.forget[i].wanted)


def test_the_next_plan_is_made_ahead_and_thrown_away_where_it_is_of_other_examples(monkeypatch) -> None:
    made: list[list[int]] = []
    plain = feed_module.plan_step
    monkeypatch.setattr(feed_module, "plan_step", lambda *given, **more: made.append(given[1]) or plain(*given, **more))
    examples = make_examples()
    feed = feed_of(examples)
    plans = [feed.plan(step) for step in (1, 2, 3)]
    feed._planner.shutdown()  # the fourth is made
    assert len(made) == 4, "each once"
    assert [plan.wanted_ids.tolist() for plan in plans] == [
        feed_of(examples).plan(step).wanted_ids.tolist() for step in (1, 2, 3)
    ]
    feed = feed_of(examples)
    feed.plan(1)
    feed.keep([0, 1, 3], 1)
    assert taken(feed, 2) == taken(feed_of(examples, feed.state()), 2), "as a feed takes it that made nothing ahead"
    feed.current = examples.with_drawn({Role.UNWANTED: {0: [50, 61], 1: [51, 61], 3: [52, 61]}})
    assert {segment.ids[-2] for role, segment in taken(feed, 3) if role is Role.UNWANTED} <= {50, 51, 52}


def test_a_feed_is_empty_once_nothing_is_left() -> None:
    feed = feed_of(make_examples())
    assert not feed.empty
    feed.keep([3], 2)
    assert not feed.empty
    feed.keep([], 4)
    assert feed.empty and feed_of(make_examples(), feed.state()).empty


# ---- answers that are drawn anew ----


class Said:
    """A model whose answers count up; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], list[int]]] = []

    def __call__(self, what: str, prompts: Sequence[list[int]], tokens: int, seeds: Sequence[int]) -> list[list[int]]:
        self.asked.append((list(prompts), list(seeds)))
        return [[50 + len(self.asked), 60 + k, 61][: tokens - k % 2] for k in range(len(prompts))]


def redraw_of(examples: ExampleSet, said: Any, roles: Sequence[Role] = (Role.UNWANTED,), **more: Any) -> Redraw:
    requests = {role: [Request([9 + role, i], 2) for i in range(len(examples.forget))] for role in roles}
    return Redraw(said, requests, tokens=3, max_length=96, seed=5, ema=None, **more)


def test_the_answers_of_the_steps_ahead_are_drawn_when_they_are_due_and_resumed_as_they_were() -> None:
    examples, said = make_examples(), Said()
    feed = feed_of(examples, redraw=redraw_of(examples, said), every=2)
    assert feed.state()["drawn"] == []
    figures = feed.refresh(1)
    assert feed.refresh(2) == {}, "not due"
    (prompts, seeds), ahead = said.asked[0], feed_of(examples)
    due = sorted({ids[1] for ids in prompts})
    taken_ahead = {a for step in (1, 2) for a in ahead.plan(step).unwanted_ids.tolist()}
    assert due == [i for i, e in enumerate(examples.forget) if {a.answer_id for a in e.unwanted} <= taken_ahead]
    assert len(set(seeds)) == len(seeds) == len(due) > 2
    drawn = dict(feed.state()["drawn"])
    assert list(drawn) == due and {len(ids) for ids in drawn.values()} == {3}, "what ended by itself has its end"
    assert figures["redraw/taken"] == 1 and figures["redraw/tokens"] == 3 and figures["redraw/seconds"] >= 0
    for step in (1, 2):
        tails = {s.ids[s.answer_start :] for role, s in taken(feed, step) if role is Role.UNWANTED}
        assert tails <= {tuple(ids) for ids in drawn.values()}
    resumed = feed_of(examples, json.loads(json.dumps(feed.state())), redraw=redraw_of(examples, said), every=2)
    assert taken(resumed, 2) == taken(feed, 2) and resumed.refresh(2) == {} and len(said.asked) == 1
    assert resumed.refresh(3) and dict(resumed.state()["drawn"]).keys() != drawn.keys()


def test_answers_that_may_not_be_pushed_away_are_counted_as_not_taken() -> None:
    examples = make_examples()
    wanted = {
        i: list(e.wanted[0].segment.ids[e.wanted[0].segment.answer_start :]) for i, e in enumerate(examples.forget)
    }
    half = {i: ids if i % 2 else [7, 7, 2] for i, ids in wanted.items()}
    redraw: Any = lambda examples, chosen, step: {Role.UNWANTED: {i: half[i] for i in chosen}}  # noqa: E731
    feed = feed_of(examples, size=6, redraw=redraw, every=1)
    figures = feed.refresh(1)
    assert figures["redraw/taken"] == 0.5
    assert figures["redraw/tokens"] == sum(map(len, half.values())) / 6


def test_once_some_are_forgotten_answers_are_drawn_for_those_that_are_left_at_once() -> None:
    examples, said = make_examples(), Said()
    feed = feed_of(examples, redraw=redraw_of(examples, said), every=4)
    feed.refresh(1)
    assert feed.refresh(3) == {}
    feed.keep([1, 4], 2)
    assert feed.refresh(3) and [ids[1] for ids in said.asked[1][0]] == [1, 4]


def test_wanted_answers_are_drawn_by_a_prompt_and_by_seeds_of_their_own() -> None:
    examples, said = make_examples(), Said()
    feed = feed_of(examples, size=6, redraw=redraw_of(examples, said, (Role.UNWANTED, Role.WANTED)), every=1)
    figures = feed.refresh(1)
    (of_wanted, seeds), (of_unwanted, others) = said.asked
    assert [ids[0] for ids in of_wanted] == [9 + Role.WANTED] * 6 and [ids[0] for ids in of_unwanted] == [
        9 + Role.UNWANTED
    ] * 6
    assert not {*seeds} & {*others}
    assert figures["redraw/taken_wanted"] == figures["redraw/taken"] == 1 and figures["redraw/tokens"] == 6
    drawn = feed.state()
    for role, name in ((Role.WANTED, "drawn_wanted"), (Role.UNWANTED, "drawn")):
        tails = [s.ids[s.answer_start :] for r, s in taken(feed, 1) if r is role]
        assert sorted(tails) == sorted(tuple(ids) for _, ids in drawn[name])
    resumed = feed_of(examples, json.loads(json.dumps(drawn)), size=6)
    assert taken(resumed, 1) == taken(feed, 1)


class Ends(Said):
    """Answers of as many tokens as there may be, but for every second one, which ends."""

    def __call__(self, what: str, prompts: Sequence[list[int]], tokens: int, seeds: Sequence[int]) -> list[list[int]]:
        self.asked.append((list(prompts), list(seeds)))
        return [[70 + k] * (tokens if k % 2 else 1) for k in range(len(prompts))]


def test_a_segment_of_a_wanted_answer_is_the_models_and_the_rest_stays_unless_it_ended() -> None:
    examples, said, starts = make_examples(), Ends(), set()
    redraw = redraw_of(examples, said, segments=True)
    for step in range(1, 9):
        drawn = redraw(examples, range(6), step)[Role.UNWANTED]
        for k, prompt in enumerate(said.asked[-1][0]):
            start = len(prompt) - 2
            wanted = [ids for a in examples.forget[k].wanted if (ids := answer_ids(a))[:start] == tuple(prompt[2:])]
            said_then = [70 + k] * (3 if k % 2 else 1)
            ends = [[*prompt[2:], *said_then, *(ids[start + 3 :] if k % 2 else [2])] for ids in wanted]
            assert drawn[k] in ends and any(start <= len(ids) - 2 for ids in wanted)
            starts.add((k, start))
    assert len(starts) > 20, "they begin at random"


def test_an_example_is_given_its_own_draws_those_more_often_that_were_given_less() -> None:
    replay = Replay(6, seed=3)
    given: list[list[int]] = []
    for step in range(1, 200):
        new = {Role.UNWANTED: {0: [step], 1: [-step]}, Role.WANTED: {0: [1000 + step], 1: [0]}}
        found = replay.exchange(new, step)
        assert found[Role.UNWANTED][0][0] > 0 > found[Role.UNWANTED][1][0], "its own"
        assert found[Role.WANTED][0] == [1000 + found[Role.UNWANTED][0][0]], "the answers of one draw stay together"
        assert step - found[Role.UNWANTED][0][0] < 3, "the last six draws are three of each"
        given.append([step - found[Role.UNWANTED][0][0], replay.draws[-2][3]])
    ages = [age for age, _ in given]
    assert ages.count(0) > ages.count(2) > 0, "one that was never given is likelier"
    kept, as_now = replay.state(), json.dumps(replay.state())
    again = Replay(6, 3, json.loads(as_now))
    assert again.exchange({Role.UNWANTED: {0: [7]}}, 200) == replay.exchange({Role.UNWANTED: {0: [7]}}, 200)
    assert json.dumps(kept) == as_now != json.dumps(replay.state()), "what is being written stays as it was"
    assert Replay(1, 3).exchange({Role.UNWANTED: {0: [7], 1: [8]}}, 1) == {Role.UNWANTED: {0: [7], 1: [8]}}


# ---- what is forgotten ----


def test_an_answer_s_probability_is_the_geometric_mean_over_its_tokens_read_alone(world) -> None:
    segments = [answer.segment for answer in make_examples().answers]
    expected = []
    for s in segments:
        log = alone(s)[1]
        expected.append(torch.stack([log[t - 1, s.ids[t]] for t in range(s.answer_start, len(s))]).mean().exp())
    torch.testing.assert_close(answer_scores(small_reader(world), "mean", segments).exp(), torch.stack(expected))


def test_an_example_stays_while_one_of_its_answers_is_known(world) -> None:
    reader, examples = small_reader(world), make_examples()
    best = [max(answer_scores(reader, "mean", [a.segment for a in e.unwanted]).exp().tolist()) for e in examples.forget]
    assert any(len(example.unwanted) > 1 for example in examples.forget)
    below = sorted(best)[2] * 0.999
    expected = [i for i, p in enumerate(best) if p >= below]
    assert still_known(reader, examples.forget, range(len(best)), below) == expected
    assert still_known(reader, examples.forget, [1, 3], 1e-9) == [1, 3]
    assert still_known(reader, examples.forget, range(len(best)), 0.999) == []
    feed = feed_of(examples)
    assert feed.known(reader, below) == expected
    feed.keep(expected[1:], 1)
    assert feed.known(reader, below) == expected[1:], "what has left does not come back"


def test_a_model_that_broke_has_forgotten_nothing(world, monkeypatch) -> None:
    def broken(reader: Reader, pooling: str, segments: Sequence[Segment]) -> Tensor:
        return torch.full((len(segments),), torch.nan)

    monkeypatch.setattr(feed_module, "answer_scores", broken)
    assert still_known(small_reader(world), make_examples().forget, [0, 2], 0.5) == [0, 2]
