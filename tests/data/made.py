"""Random example sets, layouts and plans for the property tests."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import SHORTEST_HEADER, Layout, plan_step
from wpn_ds.data.plan import Item, MicroBatch, Segment, StepPlan
from wpn_ds.objectives.terms import Role

BOS, EOS, PAD = 2, 2, 1
ROW = 48  # more than the longest segment below

#: What prompts may begin with, as a chat template's system turn.
HEADER = tuple(range(70, 70 + SHORTEST_HEADER))
_IDS = st.lists(st.integers(4, 90), min_size=1, max_size=9).map(tuple)
#: Few texts, so that one example's wanted text often is another one's unwanted text.
_TEXTS = st.lists(_IDS, min_size=5, max_size=9, unique=True)


@st.composite
def example_sets(draw: st.DrawFn, max_examples: int = 5) -> ExampleSet:
    """Up to five examples with one or more answers a side, with or without BOS, and up to four retain segments.

    Examples often have the same prompt, and a retain segment may begin with it. All prompts may have a header.
    """
    texts, bos = draw(_TEXTS), (BOS,) * draw(st.integers(0, 1))
    header = draw(st.sampled_from([(), HEADER]))
    prompts = [(*header, *prompt) for prompt in draw(st.lists(_IDS, min_size=1, max_size=3))]
    forget, retain = [], []
    count = 0
    for _ in range(draw(st.integers(1, max_examples))):
        prompt = draw(st.sampled_from(prompts))
        chosen = draw(st.lists(st.integers(0, len(texts) - 1), min_size=2, max_size=5, unique=True))
        cut = draw(st.integers(1, len(chosen) - 1))
        answers = []
        for k in chosen:
            segment = Segment((*bos, *prompt, *texts[k], EOS), len(bos), len(bos + prompt))
            answers.append(Answer(segment, count, k))
            count += 1
        forget.append(ForgetExample(tuple(answers[:cut]), tuple(answers[cut:])))
    for _ in range(draw(st.integers(0, 4))):
        prompt, answer = draw(st.sampled_from(prompts) | _IDS.map(lambda ids: (*header, *ids))), draw(_IDS)
        plain = draw(st.booleans())
        retain.append(Segment((*prompt, *answer), 1 if plain else 0, 1 if plain else len(prompt)))
    return ExampleSet(forget, retain)


#: What a layout can be besides its sizes.
FORMS: dict[str, dict[str, bool]] = {
    "padded": {"packed": False},
    "rows": {"packed": True},
    "flat": {"packed": True, "flat": True},
    "shared": {"packed": True, "flat": True, "share_prefix": True},
    "headed": {"packed": True, "flat": True, "share_prefix": True, "share_header": True},
}


def layout(form: str, budget: int = 10_000, world_size: int = 1) -> Layout:
    return Layout(ROW, budget, world_size=world_size, **FORMS[form])


def layouts(*forms: str) -> st.SearchStrategy[Layout]:
    """Of any form, or of those that are named; any budget, one to four ranks."""
    budgets = st.sampled_from([1, 20, 64, 150, 10_000])
    return st.builds(layout, st.sampled_from(forms or tuple(FORMS)), budgets, st.integers(1, 4))


EVERY_ROLE = frozenset(Role)


def plan_of(
    examples: ExampleSet,
    layout: Layout,
    roles: frozenset[Role] = EVERY_ROLE,
    order: Sequence[int] = (),
    halves: bool = False,
) -> StepPlan:
    """One step over everything, or over the forget examples of ``order``."""
    return plan_step(
        examples,
        order or range(len(examples.forget)),
        range(len(examples.retain)),
        layout,
        roles=roles,
        halves=halves,
    )


def flat(micro_batches: Sequence[Sequence[MicroBatch]]) -> list[MicroBatch]:
    """The micro-batches of all ranks."""
    return [micro_batch for rank in micro_batches for micro_batch in rank]


def items_of(micro_batches: Sequence[MicroBatch]) -> list[Item]:
    """All items, dead ones too, in order."""
    return [item for micro_batch in micro_batches for row in micro_batch for item in row]
