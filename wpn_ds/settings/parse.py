"""Commands' settings from dataclasses: a field's name is its flag, the string under it is its ``--help``.

A command says what it takes in a dataclass, whose ``__post_init__`` checks what types can't say, and calls
:func:`parse`; commands share flags by a base. Every mistake is a :class:`~wpn_ds.errors.UserError` of one line. No
torch here, so that ``--help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml

from wpn_ds.errors import UserError, nearest
from wpn_ds.objectives.terms import flags

Groups = Mapping[str, type]
"""Dataclasses by the title under which ``--help`` has their fields. No two may have a field of the same name."""

T = TypeVar("T")


@dataclass(frozen=True)
class Within:
    """What a number has to be besides its type, in words and as a test."""

    wanted: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Within("a whole number above 0", lambda number: number >= 1)]
Whole = Annotated[int, Within("a whole number from 0 on", lambda number: number >= 0)]
Positive = Annotated[float, Within("a number above 0", lambda number: number > 0)]
Share = Annotated[float, Within("a number above 0, at most 1", lambda number: 0 < number <= 1)]
Flag = Annotated[bool, "no value"]
"""True where the flag stands; unlike after that of a bool, a value is never looked for behind it."""


def option(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field with ``metadata`` of :class:`Setting`; without ``default`` it must be given."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One field of one group, as flags, YAML and help see it.

    Attributes:
        group: its title.
        name: the field's.
        type: bool, int, float, str, Path, a Literal of texts, a list of these, one of them or None, each with
            what :class:`Within` asks of it.
        default: MISSING if it must be given.
        owner: the class that brings it, the group's own or a base.
        doc: the string under the field, on one line.
        metadata: of the field. ``hidden``: neither in ``--help`` nor in YAML; ``also``: other ways to write the flag;
            ``line_breaks``: a backslash and n in the flag's text is a line break; ``hint``: what an error of a missing
            value says besides; ``positional``: given without a flag; ``metavar``: what stands for the value in
            ``--help``; ``more``: goes on where the string under the field ends.
    """

    group: str
    name: str
    type: Any
    default: Any
    doc: str
    metadata: Mapping[str, Any]
    owner: type

    @property
    def hidden(self) -> bool:
        return bool(self.metadata.get("hidden"))

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def shown(self) -> str:
        """What ``--help`` and errors call it: its flag, or what stands for a positional."""
        return self.metavar if self.metadata.get("positional") else f"--{self.name}"

    @property
    def metavar(self) -> str:
        """What stands for its value in ``--help``."""
        kind = _bare(self.type)
        if typing.get_origin(kind) is Literal:
            return "{" + ",".join(typing.get_args(kind)) + "}"
        if typing.get_origin(kind) is list:
            entry = _bare(typing.get_args(kind)[0])
            usual = "FILE" if entry in (str, Path) else entry.__name__.upper()
        else:
            usual = "BOOL" if kind is bool else kind.__name__.upper()
        return str(self.metadata.get("metavar", usual))


def parse(kind: type[T], argv: Sequence[str] | None, prog: str, description: str | None = None) -> T:
    """``kind`` from a command line (by default this process's); ``--help`` prints and exits.

    ``--help`` begins with ``description``, by default the class's doc-string, and has a section for each base that
    brings flags, called as its doc-string is up to the first colon.

    Raises:
        UserError: a flag that there isn't, one that is missing, a value of another type, or what ``kind`` refuses.
    """
    settings, about = {}, {}
    for name, setting in settings_of({"options": kind}).items():
        title, _, more = ("options", "", "") if setting.owner is kind else _text_of(setting.owner).partition(": ")
        settings[name] = dataclasses.replace(setting, group=title.rstrip("."))
        about[settings[name].group] = more
    needed = [setting for setting in settings.values() if setting.required]
    words = [f"{one.shown} {one.metavar}" for one in needed if not one.metadata.get("positional")]
    words += [one.shown + " ..." * _is_list(one.type) for one in needed if one.metadata.get("positional")]
    usage = " ".join([prog, *words, "[--NAME VALUE ...]"])
    given = parser(settings, about, usage, description or _text_of(kind)).read(sys.argv[1:] if argv is None else argv)
    found: T = build({"options": kind}, given, {name: settings[name].shown for name in given})["options"]
    return found


def parse_one_of(kinds: Mapping[str, type[T]], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """The dataclass of the subcommand that a command line begins with, from the rest of it; ``--help`` prints and
    exits. Raises as :func:`parse` does."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in kinds:
        return parse(kinds[name], rest[:-1], f"{prog} {name}")
    if name in ("-h", "--help"):
        width = max(map(len, kinds))
        lines = [f"  {each:<{width}}  {_text_of(kind).split('. ')[0].rstrip('.')}" for each, kind in kinds.items()]
        print(f"usage: {prog} {{{','.join(kinds)}}} ...    (with --help: its flags)", "", description, "", sep="\n")
        print("\n".join(lines))
        raise SystemExit(0)
    raise UserError(f"{prog} must be followed by one of {', '.join(kinds)}, got {name!r}{nearest(name, kinds)}")


def _text_of(kind: type) -> str:
    """A class's doc-string, on one line."""
    return " ".join((inspect.getdoc(kind) or "").split())


def settings_of(groups: Groups) -> dict[str, Setting]:
    """Every setting by name, in the order of the groups.

    Raises:
        UserError: a name is in two groups, or a field has a type that no flag can have.
    """
    settings: dict[str, Setting] = {}
    for group, kind in groups.items():
        for name, setting in _fields(group, kind).items():
            if name in settings:
                raise UserError(f"{group}: {name} is a flag of {settings[name].group} already: take another name")
            settings[name] = setting
    return settings


@functools.cache
def _fields(group: str, kind: type) -> dict[str, Setting]:
    hints, docs = typing.get_type_hints(kind, include_extras=True), _docs(kind)
    owners = {name: part for part in kind.__mro__ for name in getattr(part, "__dataclass_fields__", {})}
    settings = {}
    for entry in flags(kind):
        name, hint = entry.name, hints[entry.name]
        if not _is_simple(hint):
            raise UserError(
                f"{group}: {name} is of a type that no flag can have: give bool, int, float, str or a Literal"
            )
        made = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        doc = " ".join(filter(None, [docs.get(name, ""), entry.metadata.get("more", "")]))
        settings[name] = Setting(group, name, hint, made, doc, entry.metadata, owners[name])
    return settings


def _is_simple(kind: Any) -> bool:
    bare = _bare(kind)
    if _is_union(bare):
        return False
    if typing.get_origin(bare) is list:
        return _bare(typing.get_args(bare)[0]) in (int, float, str, Path)
    return bare in (bool, int, float, str, Path) or typing.get_origin(bare) is Literal


def _bare(kind: Any) -> Any:
    """A type without its "or None" and without what :class:`Within` asks of it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated or (_is_union(kind) and arguments[1:] == (type(None),)):
        return _bare(arguments[0])
    return kind


def _is_list(kind: Any) -> bool:
    return typing.get_origin(_bare(kind)) is list


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _docs(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, on one line; a field without one has that of a base."""
    docs = {}
    for part in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            source = inspect.getsource(part)
        except OSError:  # a class of no file
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                said = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
                )
                if isinstance(said, str) and said:
                    docs[statement.target.id] = " ".join(said.split())
    return docs


def build(groups: Groups, values: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """{title: dataclass} with ``values`` of their settings; ``origins``: what errors call each, "--seed" or
    "recipe.yaml:7: seed".

    Raises:
        UserError: a name that there isn't, one that is missing, a value of another type, or what a dataclass itself
            refuses.
    """
    settings = settings_of(groups)
    given: dict[str, dict[str, Any]] = {title: {} for title in groups}
    for name, value in values.items():
        if name not in settings:
            raise unknown(name, settings, origins[name])
        given[settings[name].group][name] = convert(settings[name].type, value, origins[name])
    if missing := [one.shown for name, one in settings.items() if one.required and name not in values]:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: --help says what to give"
        )
    return {title: kind(**given[title]) for title, kind in groups.items()}


def unknown(name: str, settings: Iterable[str], origin: str) -> UserError:
    """The error of a YAML key that no setting has."""
    return UserError(f"{origin} is not a setting{nearest(name, settings)}")


def convert(kind: Any, value: Any, origin: str) -> Any:
    """`value` (a flag's text, or what YAML made of it) as the type of a field, or a `UserError` that names `origin`."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        if not isinstance(arguments[1], Within):
            return convert(arguments[0], value, origin)
        try:
            found = convert(arguments[0], value, origin)
        except UserError:
            found = None
        if found is None or not arguments[1].holds(found):
            raise UserError(f"{origin} must be {arguments[1].wanted}, got {value!r}")
        return found
    if typing.get_origin(kind) is Literal:
        if value in arguments:
            return value
        hint = nearest(str(value), arguments)
        raise UserError(f"{origin} must be one of {', '.join(arguments)}, got {value!r}{hint}")
    if _is_union(kind):
        return None if value is None else convert(arguments[0], value, origin)
    if typing.get_origin(kind) is list:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{origin} must be a list of texts, got {value!r}")
        return [convert(arguments[0], entry, origin) for entry in values]
    if kind in (str, Path):
        if isinstance(value, str) and value:
            return kind(value)
        hint = "" if value is None or value == "" else ": put it in quotation marks"
        raise UserError(f"{origin} must be a text, got {value!r}{hint}")
    if kind is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise UserError(f"{origin} must be true or false, got {value!r}")
        return truth
    # Numbers: YAML reads 1e-5 as text (it wants 1.0e-5), so texts are parsed here as those of flags are.
    wanted = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number: int | float = _number(value) if isinstance(value, str) else value
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        raise UserError(f"{origin} must be {wanted}, got {value!r}") from None


def _number(text: str) -> int | float:
    """The number that a text spells; whole ones exactly, however many digits they have."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_yaml(path: str) -> dict[str, tuple[Any, int]]:
    """{key: (value, line)} of a YAML file of settings, whatever the keys.

    Raises:
        UserError: it can't be read, isn't such a file, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(Path(path).expanduser().read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"--config {path}: expected lines of 'name: value'")
        values: dict[str, tuple[Any, int]] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in values:
                raise UserError(f"{path}:{line}: {key} is given twice, first in line {values[key][1]}")
            try:
                values[key] = (loader.construct_object(value_node, deep=True), line)
            except (ValueError, LookupError, AttributeError) as error:  # a date or a tagged value that there isn't
                raise UserError(f"{path}:{line}: {key}: not a value of YAML: {error}") from None
        return values
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UserError(f"{path}: brackets in brackets beyond any setting: is it the right file?") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter from an escape that is no character
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and no usage dump.

    Attributes:
        settings: those that have a flag, by name.
    """

    settings: Mapping[str, Setting] = {}

    def error(self, message: str) -> NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            message = f"{message.removeprefix(missing)} is missing: --help says what to give"
        message = message.removeprefix("argument ")
        setting = self.settings.get(message.partition(":")[0].removeprefix("--"))
        raise UserError(message + (setting.metadata.get("hint", "") if setting else ""))

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """{name: text, list of texts or True} of the flags that are there; --help prints and exits."""
        namespace, others = self.parse_known_args(list(argv))
        if others:
            name = others[0].split("=")[0]
            if not name.startswith("-"):
                raise UserError(f"unexpected argument {name!r}: settings are given as --name value")
            known = [flag.lstrip("-") for flag in self._option_string_actions]
            hint = nearest(name.lstrip("-").replace("-", "_"), known, "--")
            raise UserError(f"unknown flag {name}{hint or '; --help lists all'}")
        given = vars(namespace)
        for name in given:
            if name in self.settings and self.settings[name].metadata.get("line_breaks"):
                given[name] = given[name].replace("\\n", "\n")
        return given


def parser(settings: Mapping[str, Setting], about: Mapping[str, str], usage: str, description: str) -> Parser:
    """The flags, one a setting, in sections as they are grouped; ``about``: what stands above a section's flags."""
    made = Parser(
        usage=usage,
        description=description,
        add_help="options" not in about,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    sections = {title: made.add_argument_group(title, text or None) for title, text in about.items()}
    made.settings = settings
    for name, setting in settings.items():
        options: dict[str, Any] = {"metavar": setting.metavar}
        if _is_list(setting.type):
            options |= {"nargs": "+", "action": "extend"}
        elif setting.type == Flag:
            options = {"action": "store_true"}
        elif _bare(setting.type) is bool:
            options |= {"nargs": "?", "const": True}
        names = [name]
        if not setting.metadata.get("positional"):
            names, options["dest"] = [f"--{name}", *setting.metadata.get("also", ())], name
        text = setting.doc + _default(setting)
        options["help"] = argparse.SUPPRESS if setting.hidden else text.replace("%", "%%")
        sections[setting.group].add_argument(*names, **options)
    if "options" in about:
        sections["options"].add_argument("-h", "--help", action="help", help="Show this and exit.")
    return made


def _default(setting: Setting) -> str:
    """What ``--help`` says of a default: nothing where there is none, and where the setting's own sentence has it."""
    default = setting.default
    if default in (None, [], dataclasses.MISSING) or setting.type == Flag or "(default" in setting.doc:
        return ""
    told = " ".join(map(str, default)) if isinstance(default, list) else json.dumps(default, default=str)
    return f" (default: {told})"
