"""What data files hold, in figures: counts, token lengths, padding, truncation, duplicates."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.data.examples import build_examples
from wpn_ds.data.layout import pack
from wpn_ds.data.origins import Origin
from wpn_ds.data.records import ForgetRecord, Record, RetainRecord, turn_texts
from wpn_ds.data.shapes import SHAPES, Kind, Prompt
from wpn_ds.data.sources import Problems
from wpn_ds.data.tokens import encode_answer, render_prompt, spelt_special_tokens
from wpn_ds.settings.style import PromptStyle

PROMPT = "prompt"
BATCH = 8  # texts of a padded batch, for comparison

Places = tuple[str, ...]  # where something is: sources of records


@dataclass(frozen=True)
class Padding:
    """Tokens that the same texts take, padding included, in three layouts.

    Attributes:
        texts, tokens: how many texts (a prompt with one answer each), and their real tokens after truncation.
        batched: batches of :data:`BATCH` in file order, each padded to its longest text.
        full: every text padded to ``max_length``.
        packed: rows of ``max_length`` tokens, packed.
        rows: number of these rows.
    """

    texts: int
    tokens: int
    batched: int
    full: int
    packed: int
    rows: int

    def waste(self, layout: int) -> float:
        """Share of a layout's tokens that are padding, 0 to 1."""
        return 1 - self.tokens / layout


@dataclass(frozen=True)
class Figures:
    """What some records of one kind hold, as a training run with the same settings would read them.

    Attributes:
        records: how many.
        distinct_prompts: how many different prompts.
        lengths: tokens before truncation, in file order: ``prompt`` (BOS and template included, one per record) and
            the answers by side: ``wanted`` and ``unwanted``, or ``answer``, EOS included; or plain ``text``.
        shapes: records by the name of their shape.
        categories: records by category; those without one are left out.
        padding: what the layouts cost.
        cut_prompts: records whose prompt loses its start.
        cut_answers: answers or plain texts that lose their end.
        repeated_prompts: for every prompt of several records, these records.
        repeated_records: for every record that occurs several times, where.
        contradictions: for every text that is wanted in one record and unwanted in another, one of each.
        first_prompt: the first prompt as the model reads it, if there is one.
        special_tokens: how often the texts spell out each of the tokenizer's special tokens.
        joined: answers that are not read after the tokens of their prompt alone.
    """

    records: int
    distinct_prompts: int
    lengths: dict[str, list[int]]
    shapes: Counter[str]
    categories: Counter[str]
    padding: Padding
    cut_prompts: int
    cut_answers: int
    repeated_prompts: list[Places]
    repeated_records: list[Places]
    contradictions: list[tuple[str, str]]
    first_prompt: str | None
    special_tokens: Counter[str]
    joined: int


def kind_of(path: str | Path, columns: Mapping[str, str] | None = None) -> Kind:
    """Whether a file holds forget or retain data, by the first row of a known shape (forget if there is none)."""
    for _, row in Origin([path], columns=columns or {}).rows(Problems()):
        given = {name: value for name, value in row.items() if value is not None}
        for shape in SHAPES:
            if not shape.alone and shape.fits(given):
                return shape.kind
    return "forget"


def inspect_records(
    records: Sequence[Record],
    tokenizer: Any,
    style: PromptStyle | str,
    max_length: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> Figures:
    """The figures of records of one kind.

    Raises:
        UserError: a text that training would refuse.
    """
    forget = [record for record in records if isinstance(record, ForgetRecord)]
    retain = [record for record in records if isinstance(record, RetainRecord)]
    examples = build_examples(forget, retain, tokenizer, style, max_length, progress)
    segments = examples.segments
    ordered: list[Record] = [*forget, *retain]
    texts = [(record, side, text) for record in ordered for side, text in _texts(record)]
    lengths: dict[str, list[int]] = defaultdict(list)
    cut_prompts, seen = set(), set()
    for (record, side, text), segment in zip(texts, segments, strict=True):
        whole = segment
        if segment.prompt_truncated or segment.answer_truncated:
            whole = encode_answer(record.prompt or None, text, tokenizer, style, sys.maxsize)
        if record.prompt and record.source not in seen:
            lengths[PROMPT].append(whole.answer_start)
        lengths[side].append(whole.answer_length if record.prompt else len(whole))
        seen.add(record.source)
        if segment.prompt_truncated:
            cut_prompts.add(record.source)
    prompts = _places((_key(record.prompt), record.source) for record in records if record.prompt)
    return Figures(
        records=len(records),
        distinct_prompts=len(prompts),
        lengths=dict(lengths),
        shapes=Counter(record.shape for record in records if record.shape),
        categories=Counter(record.category for record in records if record.category),
        padding=_padding([len(segment) for segment in segments], max_length),
        cut_prompts=len(cut_prompts),
        cut_answers=sum(segment.answer_truncated for segment in segments),
        repeated_prompts=_repeated(prompts),
        repeated_records=_repeated(_places((_identity(record), record.source) for record in records)),
        contradictions=contradictions(forget),
        first_prompt=next((render_prompt(r.prompt, tokenizer, style) for r in ordered if r.prompt), None),
        special_tokens=spelt_special_tokens(_all_texts(ordered), tokenizer),
        joined=sum(segment.joined for segment in segments),
    )


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least ``share`` of the values don't exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def histogram(series: Sequence[Sequence[int]], bins: int = 10) -> list[tuple[int, int | None, list[int]]]:
    """``(from, to, count of each series)`` over common bins of a round width; the last is open (``to`` is None) where
    the longest twentieth of all values would need many more bins than the rest."""
    values = [value for one in series for value in one]
    high = percentile(values, 0.95)
    widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    width = next(width for width in widths if high // width - min(values) // width < bins)
    first, last = min(values) // width, max(values) // width
    is_open = last - first >= bins + bins // 2
    edges = [k * width for k in range(first, (high // width + 1 if is_open else last) + 1)]
    counts = [Counter(bisect_right(edges, value) - 1 for value in one) for one in series]
    return [
        (edge, None if is_open and edge == edges[-1] else edge + width - 1, [count[k] for count in counts])
        for k, edge in enumerate(edges)
    ]


def _texts(record: Record) -> list[tuple[str, str]]:
    """(side, text) of every answer, in the order in which they are tokenised."""
    if isinstance(record, ForgetRecord):
        return [("wanted", text) for text in record.chosen] + [("unwanted", text) for text in record.rejected]
    return [("text" if record.prompt is None else "answer", record.response)]


def _all_texts(records: Iterable[Record]) -> Iterable[str]:
    """What users wrote: every turn of the prompts, and every answer."""
    for record in records:
        yield from turn_texts(record.prompt)
        yield from (text for _, text in _texts(record))


def _padding(lengths: list[int], max_length: int) -> Padding:
    batches = [lengths[at : at + BATCH] for at in range(0, len(lengths), BATCH)]
    rows = len(pack(lengths, max_length))
    return Padding(
        texts=len(lengths),
        tokens=sum(lengths),
        batched=sum(len(batch) * max(batch) for batch in batches),
        full=len(lengths) * max_length,
        packed=rows * max_length,
        rows=rows,
    )


def _key(prompt: Prompt | None) -> Hashable:
    return prompt.strip() if isinstance(prompt, str) else prompt


def _identity(record: Record) -> Hashable:
    """What makes a record a repetition of another, in whatever order its answers are."""
    return _key(record.prompt), frozenset((side, text.strip()) for side, text in _texts(record))


def _places(pairs: Iterable[tuple[Hashable, str]]) -> dict[Hashable, list[str]]:
    places: dict[Hashable, list[str]] = defaultdict(list)
    for key, source in pairs:
        places[key].append(source)
    return places


def _repeated(places: dict[Hashable, list[str]]) -> list[Places]:
    return [tuple(sources) for sources in places.values() if len(sources) > 1]


def contradiction_note(records: Sequence[ForgetRecord]) -> str:
    """What a run says of :func:`contradictions`, in a line; "" if there are none."""
    found = contradictions(records)
    if not found:
        return ""
    wanted = {(_key(record.prompt), text.strip()) for record in records for text in record.chosen}
    unwanted = {(_key(record.prompt), text.strip()) for record in records for text in record.rejected}
    places, same = " / ".join(found[0]), len(wanted & unwanted)
    return (
        f"texts wanted in one record, unwanted in another: {len(found)} (first: {places}), {same} times for the same "
        "prompt: what one teaches the other takes away; wpn-ds inspect lists them"
    )


def contradictions(records: Sequence[ForgetRecord]) -> list[tuple[str, str]]:
    """Where each text is, once of both, that is wanted in one record and unwanted in another."""
    wanted = _places((text.strip(), record.source) for record in records for text in record.chosen)
    unwanted = _places((text.strip(), record.source) for record in records for text in record.rejected)
    return [(wanted[text][0], unwanted[text][0]) for text in wanted if text in unwanted]
