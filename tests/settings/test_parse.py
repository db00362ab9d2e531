"""A command's flags from a dataclass: what is read, what is refused in one line, and what ``--help`` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from wpn_ds.errors import UserError, require
from wpn_ds.settings.parse import Count, Flag, Positive, Share, Whole, option, parse, parse_one_of, settings_of


@dataclass(frozen=True)
class Shared:
    """Writing: where it goes."""

    output: Path | None = option(None, metavar="FILE")
    """File to write."""


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """Reads files."""

    files: list[Path] = option(positional=True, metavar="FILE")
    """Files to read."""

    model: str = option(more="a folder, or a hub name.")
    """The model:"""

    ranks: Count = 2
    """Processes."""

    rounds: Whole = 3
    """Rounds (default: 3, enough for most)."""

    steps: list[Count] = option([2, 5], metavar="N")
    """When to look."""

    rate: Positive = 1.0
    """How fast."""

    keep: Share | None = None
    """What stays."""

    kind: Literal["forget", "retain"] | None = None
    """What the files hold."""

    bf16: Flag = False
    """Compute in bfloat16."""

    switch: bool | None = None
    """On or off."""

    late: Path = field(default_factory=Path.cwd)
    """Looked up at the call (default: this folder)."""

    def __post_init__(self) -> None:
        if self.keep and self.kind is None:
            raise UserError("--keep: say what with --kind")


NEEDED = ["a.jsonl", "--model", "opt"]


def read(*argv: str) -> Options:
    return parse(Options, [*NEEDED, *argv], "wpn-ds read")


def error(argv: list[str], kind: type = Options) -> str:
    with pytest.raises(UserError) as caught:
        parse(kind, argv, "wpn-ds read")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_type_is_read_from_its_text(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {"files": [Path("a.jsonl")], "model": "opt", "ranks": 2, "rounds": 3, "steps": [2, 5], "rate": 1.0}
    expected |= {"keep": None, "kind": None, "bf16": False, "switch": None, "output": None, "late": tmp_path}
    assert vars(read()) == expected
    flags = "--ranks 4 --rounds 0 --steps 1 7 --rate 1e-4 --keep 0.5 --kind retain --bf16 --switch --output o --late ."
    given = {"ranks": 4, "rounds": 0, "steps": [1, 7], "rate": 1e-4, "keep": 0.5, "kind": "retain", "bf16": True}
    given |= {"switch": True, "output": Path("o"), "late": Path()}
    assert vars(read(*flags.split())) == expected | given
    assert read("--switch", "false").switch is False


def test_a_list_takes_several_values_and_several_flags() -> None:
    assert read("--steps", "1", "--steps", "2", "3").steps == [1, 2, 3]
    assert read().steps == [2, 5]  # the default is nobody's to change


def test_what_stands_without_a_flag_may_come_after_one_that_takes_no_value() -> None:
    assert parse(Options, ["--bf16", "a", "b", "--model", "opt"], "wpn-ds read").files == [Path("a"), Path("b")]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*NEEDED, "--ranks", "0"], "--ranks must be a whole number above 0, got '0'"),
        ([*NEEDED, "--ranks", "many"], "--ranks must be a whole number above 0, got 'many'"),
        ([*NEEDED, "--ranks", "1.5"], "--ranks must be a whole number above 0, got '1.5'"),
        ([*NEEDED, "--rounds", "-1"], "--rounds must be a whole number from 0 on, got '-1'"),
        ([*NEEDED, "--steps", "3", "0"], "--steps must be a whole number above 0, got '0'"),
        ([*NEEDED, "--rate", "nan"], "--rate must be a number above 0, got 'nan'"),
        ([*NEEDED, "--keep", "1.5"], "--keep must be a number above 0, at most 1, got '1.5'"),
        ([*NEEDED, "--kind", "retan"], "--kind must be one of forget, retain, got 'retan'; did you mean retain?"),
        ([*NEEDED, "--switch", "perhaps"], "--switch must be true or false, got 'perhaps'"),
        ([*NEEDED, "--output", ""], "--output must be a text, got ''"),
        ([*NEEDED, "--output"], "--output: expected one argument"),
        ([*NEEDED, "--keep", "1"], "--keep: say what with --kind"),
        ([*NEEDED, "--rank", "1"], "unknown flag --rank; did you mean --ranks?"),
        (["--model", "opt"], "FILE is missing: --help says what to give"),
        (["a.jsonl"], "--model is missing: --help says what to give"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag_and_what_is_allowed(argv, said) -> None:
    assert error(argv) == said


def test_what_is_left_over_is_refused() -> None:
    assert "unexpected argument 'more'" in error(["more"], Shared)


def test_help_names_what_must_be_given_and_has_a_section_for_each_base(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse(Options, ["--help"], "wpn-ds read")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: wpn-ds read --model STR FILE ... [--NAME VALUE ...]\n\nReads files.\n\noptions:\n")
    words = " ".join(told.split())
    assert "--model STR The model: a folder, or a hub name. --ranks INT Processes. (default: 2) --rounds INT" in words
    assert "--rounds INT Rounds (default: 3, enough for most). --steps N [N ...] When to look. (default: 2 5)" in words
    assert "--kind {forget,retain} What the files hold. --bf16 Compute in bfloat16. --switch [BOOL] On or off." in words
    assert told.index("--late") < told.index("Writing:\n  where it goes.\n") < told.index("--output FILE")


KINDS: dict[str, type] = {"read": Options, "write": Shared}


def test_a_subcommand_has_flags_of_its_own() -> None:
    assert parse_one_of(KINDS, ["write", "--output", "o"], "wpn-ds do", "Does.") == Shared(Path("o"))
    assert type(parse_one_of(KINDS, ["read", *NEEDED], "wpn-ds do", "Does.")) is Options
    for argv, said in (([], "got ''"), (["wirte"], "got 'wirte'; did you mean write?")):
        with pytest.raises(UserError) as caught:
            parse_one_of(KINDS, argv, "wpn-ds do", "Does.")
        assert str(caught.value) == f"wpn-ds do must be followed by one of read, write, {said}"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_subcommands(flag, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_one_of(KINDS, [flag], "wpn-ds do", "Does.")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: wpn-ds do {read,write} ...") and "\n\nDoes.\n\n" in told
    assert "  read   Reads files\n  write  Writing: where it goes\n" in told


@dataclass(frozen=True, kw_only=True)
class Common:
    """What both have."""

    size: int = 3
    """How large it is."""


@dataclass(frozen=True, kw_only=True)
class Shape(Common):
    """Draws shapes."""

    size: int = 5
    kind: Literal["round", "square"] = "round"
    """Of which kind it is, 100% of it."""

    note: str = option("a", line_breaks=True, hint=" (a text)")
    """What is said of it."""

    quiet: bool = option(False, hidden=True, also=["--silent"])
    """Whether nothing is."""

    def __post_init__(self) -> None:
        require(self, "size", self.size > 0, "greater than 0")


def test_a_flag_may_be_hidden_have_other_spellings_and_break_lines() -> None:
    assert parse(Shape, ["--kind=square", "--note", r"a\nb", "--silent"], "wpn-ds draw") == Shape(
        kind="square", note="a\nb", quiet=True
    )
    assert error(["--note"], Shape) == "--note: expected one argument (a text)"
    assert error(["--size", "0"], Shape) == "--size must be greater than 0, got 0"
    assert error(["--nothing"], Shape) == "unknown flag --nothing; --help lists all"


def test_help_has_a_bases_sentence_and_the_default_of_its_own(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(Shape, ["--help"], "wpn-ds draw", "Draw shapes.")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: wpn-ds draw [--NAME VALUE ...] Draw shapes. options: --kind {round,square} ")
    assert 'Of which kind it is, 100% of it. (default: "round")' in text and "quiet" not in text
    assert text.endswith("What both have: --size INT How large it is. (default: 5)")


def test_a_flag_is_of_one_group_and_of_a_type_that_a_flag_can_have() -> None:
    @dataclass
    class Odd:
        table: dict[str, int] = field(default_factory=dict)
        """A table."""

    with pytest.raises(UserError, match=r"^others: size is a flag of shape already: take another name$"):
        settings_of({"shape": Shape, "others": Common})
    with pytest.raises(UserError, match=r"^odd: table is of a type that no flag can have: give bool"):
        settings_of({"odd": Odd})
