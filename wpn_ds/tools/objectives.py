"""``wpn-ds objectives``: what each minimises, its paper and its defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import Objective, flags
from wpn_ds.settings.parse import Flag, parse

_LEGEND = (
    "Shown is what is added to retain_weight L_retain, with the default weights. L_nll, L_retain and L_ascent are "
    "means over wanted, retain and unwanted tokens; y+ are a prompt's wanted answers, y- its unwanted ones; logp(y) is "
    "the sum of an answer's token log-probabilities, |y| their number, r(y) = logp(y) - logp_start(y). What the flags "
    "mean: wpn-ds train --objective NAME --help. One of your own: docs/own-objective.md."
)


@dataclass(frozen=True)
class Output:
    """Print the objectives that there are."""

    markdown: Flag = False
    """Print the tables of docs/objectives.md."""


def run(argv: Sequence[str]) -> int:
    """Print the objectives that there are."""
    print(markdown() if parse(Output, argv, "wpn-ds objectives").markdown else text())
    return 0


def text() -> str:
    """The objectives for a terminal."""
    found = []
    for name, kind in built_in().items():
        defaults = ", ".join(f"{flag} {value}" for flag, value in _defaults(kind).items())
        lines = [kind.equation, *textwrap.wrap(defaults, 98)]
        found.append(f"{name}  arXiv {kind.paper}" if kind.paper else name)
        found += [f"    {line}" for line in lines]
    return "\n".join([*found, "", *textwrap.wrap(_LEGEND, 102)])


def markdown() -> str:
    """Two tables, of what is minimised and of the defaults, and the papers' addresses."""
    kinds = built_in()
    papers = sorted({kind.paper for kind in kinds.values() if kind.paper})
    return "\n".join(
        [
            "| objective | what is added to L_retain | source |",
            "|---|---|---|",
            *(_row(name, kind) for name, kind in kinds.items()),
            "",
            "| flag | of | default |",
            "|---|---|---|",
            *_flag_rows({name: _defaults(kind) for name, kind in kinds.items()}),
            "",
            *(f"[{paper}]: https://arxiv.org/abs/{paper}" for paper in papers),
        ]
    )


def _row(name: str, kind: type[Objective]) -> str:
    source = f"[{kind.paper}]" if kind.paper else ""
    return " ".join(["|", f"`{name}`", "|", kind.equation.replace("|", "\\|"), "|", source, "|"]).replace("|  |", "| |")


def _flag_rows(defaults: dict[str, dict[str, str]]) -> Iterator[str]:
    """A row a flag: whose it is, its commonest default, and who has another one."""
    for flag in dict.fromkeys(flag for own in defaults.values() for flag in own):
        values = {name: own[flag] for name, own in defaults.items() if flag in own}
        groups = {value: [name for name in values if values[name] == value] for value in values.values()}
        usual = max(groups, key=lambda value: len(groups[value]))
        others = "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items() if value != usual)
        of = "all" if len(values) == len(defaults) else ", ".join(values)
        yield f"| `--{flag}` | {of} | {usual}{f' ({others})' if others else ''} |"


def _defaults(kind: type[Objective]) -> dict[str, str]:
    """{flag: its default, as one writes it}."""
    made = kind().resolved()
    return {flag.name: _written(getattr(made, flag.name)) for flag in flags(kind)}


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
