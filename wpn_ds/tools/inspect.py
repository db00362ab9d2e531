"""``wpn-ds inspect``: what data files hold, before a model is loaded."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wpn_ds.data.inspect import BATCH, PROMPT, Figures, Places, histogram, inspect_records, kind_of, percentile
from wpn_ds.data.origins import Origin
from wpn_ds.data.records import Record, read_forget, read_retain
from wpn_ds.data.shapes import Kind, columns_of
from wpn_ds.settings.parse import option, parse
from wpn_ds.settings.run import DataConfig
from wpn_ds.settings.style import StyleFlags
from wpn_ds.system.progress import progress
from wpn_ds.system.tables import aligned

_BAR = 16  # characters of the longest bar
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Options(StyleFlags):
    """Counts, token lengths, padding waste, truncation and duplicates of data files."""

    files: list[str] = option(positional=True, metavar="FILE")
    """Data files, folders or patterns, as for --train_file or --retain_file."""
    tokenizer_name: str | None = None
    """Tokenizer's folder or hub name (default: the planted demo model's, or plain words)."""
    kind: Literal["forget", "unwanted", "retain"] | None = None
    """What the files hold; unwanted: only what to forget, without wanted answers (default: seen from their fields)."""
    columns: str | None = None
    """Columns that are called otherwise there, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    max_length: int = DataConfig.max_length
    """Tokens of a row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig(max_length=self.max_length)


def run(argv: Sequence[str] | None = None) -> int:
    """Print the figures of all forget files together, then those of all retain files together.

    Raises:
        UserError: a file is missing or bad, or there is no such tokenizer.
    """
    options = parse(Options, argv, "wpn-ds inspect")
    columns = columns_of(options.columns, "--columns")
    files: dict[Kind, list[str]] = {}
    for path in options.files:
        kind: Kind = "forget" if options.kind == "unwanted" else options.kind or kind_of(path, columns)
        files.setdefault(kind, []).append(path)
    # All files are read before the tokenizer is loaded, which takes longer than finding a mistake in them.
    records: dict[Kind, Sequence[Record]] = {}
    for kind, paths in files.items():
        origin = Origin(paths, columns=columns, prefix="")
        is_forget, alone = kind == "forget", options.kind == "unwanted"
        records[kind] = read_forget(origin, alone=alone, plain=True) if is_forget else read_retain(origin)
    tokenizer, units = _tokenizer(options.tokenizer_name)
    print(f"Lengths are {units}; a prompt's include what its template writes.")
    for kind, paths in files.items():
        figures = inspect_records(records[kind], tokenizer, options.style(), options.max_length, progress)
        print("\n" + format_figures(f"{', '.join(paths)}: {kind} data", figures, options.max_length))
    return 0


class _Words:
    """Stands in for a tokenizer: every word between white space is a token."""

    eos_token_id = 0

    def __call__(self, texts: Any, add_special_tokens: bool = True) -> dict[str, list[Any]]:
        if isinstance(texts, str):
            return {"input_ids": [1] * len(texts.split())}
        return {"input_ids": [[1] * len(text.split()) for text in texts]}


def _tokenizer(name: str | None) -> tuple[Any, str]:
    """The tokenizer and what its units are called: the one named, else the planted demo model's, else words."""
    from wpn_ds.models.planted import PLANTED, is_planted

    hint = "" if name else " (--tokenizer_name takes another)"
    if name is None and not is_planted(PLANTED):
        return _Words(), "words between white space, fewer than any tokenizer's (--tokenizer_name gives exact figures)"
    from wpn_ds.models.load import Source, load_tokenizer

    name = name or str(PLANTED)
    return load_tokenizer(name, Source(name)), f"tokens of {name}{hint}"


def format_figures(title: str, figures: Figures, max_length: int) -> str:
    """The figures for a reader: sections of aligned lines."""
    sections = [
        [title, *_counts(figures)],
        _lengths(figures),
        _bars(figures),
        _padding(figures, max_length),
        [f"Truncation to {max_length:,} tokens", *_truncation(figures)],
        ["As the model reads them", *_reading(figures)],
        ["Duplicates", *_duplicates(figures)],
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in section) for section in sections)


def _reading(figures: Figures) -> list[str]:
    lines = [f"  first prompt: {figures.first_prompt!r}"] if figures.first_prompt is not None else []
    if figures.special_tokens:
        named = ", ".join(f"{name} {count:,}" for name, count in figures.special_tokens.most_common())
        lines.append(f"  special tokens that texts spell out, read as text: {named} (--parse_special_tokens)")
    if figures.joined:
        lines.append(f"  answers that are not read after the tokens of their prompt alone: {figures.joined:,}")
    return lines or ["  no prompts"]


def _counts(figures: Figures) -> list[str]:
    rows = [["records", f"{figures.records:,}"]]
    if PROMPT in figures.lengths:
        rows.append(["distinct prompts", f"{figures.distinct_prompts:,}"])
    for side, lengths in figures.lengths.items():
        if side != PROMPT:
            rows.append([{"wanted": "wanted answers", "unwanted": "unwanted answers"}.get(side, f"{side}s")])
            rows[-1].append(f"{len(lengths):,}")
    lines = aligned(rows, indent="  ")
    for title, counts in (("read as", figures.shapes), ("categories", figures.categories)):
        by_size = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if by_size:
            names = f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in by_size)
            lines += textwrap.wrap(names, 100, initial_indent="  ", subsequent_indent="    ")
    return lines


def _lengths(figures: Figures) -> list[str]:
    rows = [["", "median", "p95", "max", "sum"]]
    for side, lengths in figures.lengths.items():
        values = (percentile(lengths, 0.5), percentile(lengths, 0.95), max(lengths), sum(lengths))
        rows.append([side, *(f"{value:,}" for value in values)])
    return ["Lengths", *aligned(rows, indent="  ")]


def _bars(figures: Figures) -> list[str]:
    sides = list(figures.lengths)
    bins = histogram(list(figures.lengths.values()))
    largest = [max(counts[k] for *_, counts in bins) for k in range(len(sides))]
    rows = [["", *(cell for side in sides for cell in (side, ""))]]
    for start, stop, counts in bins:
        label = f"{start:,}+" if stop is None else f"{start:,}" if stop == start else f"{start:,}-{stop:,}"
        bars = (("#" * -(-_BAR * n // top), f"{n:,}" if n else "") for n, top in zip(counts, largest, strict=True))
        rows.append([label, *(cell for pair in bars for cell in pair)])
    return aligned(rows, ">" + "<>" * len(sides), indent="  ")


def _padding(figures: Figures, max_length: int) -> list[str]:
    padding = figures.padding
    rows = [
        [f"batches of {BATCH} in file order, padded to the longest", _percent(padding.waste(padding.batched))],
        [f"padded to {max_length:,}", _percent(padding.waste(padding.full))],
        [f"packed into rows of {max_length:,} ({padding.rows:,} rows)", _percent(padding.waste(padding.packed))],
    ]
    title = f"Padding, as a share of all tokens ({padding.texts:,} texts, {padding.tokens:,} real tokens)"
    return [title, *aligned(rows, indent="  ")]


def _truncation(figures: Figures) -> list[str]:
    rows = []
    for side, lengths in figures.lengths.items():
        if side == PROMPT:
            rows.append(("prompts that lose their start", figures.cut_prompts, len(lengths)))
    answers = sum(len(lengths) for side, lengths in figures.lengths.items() if side != PROMPT)
    rows.append(("answers that lose their end" if rows else "texts that lose their end", figures.cut_answers, answers))
    return aligned([[what, f"{cut:,}", f"of {whole:,}"] for what, cut, whole in rows], indent="  ")


def _duplicates(figures: Figures) -> list[str]:
    groups: dict[str, tuple[str, Sequence[Places]]] = {
        "prompts in several records": (" = ", figures.repeated_prompts),
        "records that occur several times": (" = ", figures.repeated_records),
    }
    if "wanted" in figures.lengths:
        groups["texts wanted in one record, unwanted in another"] = (" / ", figures.contradictions)
    lines = aligned([[what, f"{len(places):,}"] for what, (_, places) in groups.items()], indent="  ")
    detailed = []
    for line, (between, places) in zip(lines, groups.values(), strict=True):
        detailed += [line, *(f"    {_joined(where, between)}" for where in places[:_LISTED])]
        detailed += ["    ..."] * (len(places) > _LISTED)
    return detailed


def _joined(places: Places, between: str) -> str:
    more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
    return between.join(os.path.basename(place) for place in places[:_LISTED]) + more


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
