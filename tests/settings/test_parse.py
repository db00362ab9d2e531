"""A dataclass becomes a command's flags, with its sentences and its checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from wpn_ds.errors import UserError, require
from wpn_ds.settings.parse import parse, settings_of


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both have."""

    size: int = 3
    """How large it is."""


@dataclass(frozen=True, kw_only=True)
class Shape(Common):
    """The shape."""

    size: int = 5
    kind: Literal["round", "square"] = "round"
    """Of which kind it is, 100% of it."""
    weight: float | None = None
    """What it weighs."""
    note: str = field(default="a", metadata={"line_breaks": True, "hint": " (a text)"})
    """What is said of it."""
    quiet: bool = field(default=False, metadata={"hidden": True, "also": ["--silent"]})
    """Whether nothing is."""

    def __post_init__(self) -> None:
        require(self, "size", self.size > 0, "greater than 0")


@dataclass(frozen=True)
class Files:
    """The files."""

    file: list[str] = field(default_factory=list)
    """Names of files."""


def parsed(*argv: str) -> dict[str, Any]:
    return parse({"shape": Shape, "files": Files}, argv, "wpn-ds draw", "Draw shapes.")


def test_flags_fill_the_dataclasses_of_their_group() -> None:
    assert parsed() == {"shape": Shape(), "files": Files()}
    made = parsed("--weight", "1e3", "--kind=square", "--note", r"a\nb", "--silent", "--file", "a", "b", "--file", "c")
    assert made["shape"] == Shape(weight=1000.0, kind="square", note="a\nb", quiet=True)
    assert made["files"] == Files(["a", "b", "c"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "0"], "--size must be greater than 0, got 0"),
        (["--size", "big"], "--size must be a whole number, got 'big'"),
        (["--kind", "squar"], "--kind must be one of round, square, got 'squar'; did you mean square?"),
        (["--wieght", "1"], "unknown flag --wieght; did you mean --weight?"),
        (["--nothing"], "unknown flag --nothing; --help lists all"),
        (["draw"], "unexpected argument 'draw': settings are given as --name value"),
        (["--note"], "--note: expected one argument (a text)"),
        (["--weight"], "--weight: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert str(caught.value) == said


def test_help_has_the_groups_with_their_sentences_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: wpn-ds draw [--NAME VALUE ...] Draw shapes.")
    assert 'shape: The shape. --kind {round,square} Of which kind it is, 100% of it. (default: "round")' in text
    assert "--weight FLOAT What it weighs. --note STR What is said of it." in text
    assert "--size INT How large it is. (default: 5) files:" in text, "the sentence of the base, the default of its own"
    assert "files: The files. --file FILE [FILE ...] Names of files." in text and "quiet" not in text


def test_a_flag_is_of_one_group_and_of_a_type_that_a_flag_can_have() -> None:
    @dataclass
    class Odd:
        table: dict[str, int] = field(default_factory=dict)
        """A table."""

    with pytest.raises(UserError, match=r"^others: size is a flag of shape already: take another name$"):
        settings_of({"shape": Shape, "others": Common})
    with pytest.raises(UserError, match=r"^odd: table is of a type that no flag can have$"):
        settings_of({"odd": Odd})
