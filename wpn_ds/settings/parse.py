"""Commands' settings from dataclasses: a field's name is its flag, the string under it is its ``--help``.

A command says what it takes in one dataclass or several, whose ``__post_init__`` checks what types can't say, and
calls :func:`parse`. Every mistake is a :class:`~wpn_ds.errors.UserError` of one line. No torch here, so that ``--help``
and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from wpn_ds.errors import UserError, nearest
from wpn_ds.objectives.terms import flags

Groups = Mapping[str, type]
"""Dataclasses by the title under which ``--help`` has their fields. No two may have a field of the same name."""


@dataclass(frozen=True)
class Setting:
    """One field of one group, as flags, YAML and help see it.

    Attributes:
        group: its title.
        type: bool, int, float, str, list[str], a Literal of texts, or one of them or None.
        default: [] for a list.
        doc: the string under the field, on one line.
        metadata: of the field. ``hidden``: neither in ``--help`` nor in YAML; ``also``: other ways to write the flag;
            ``line_breaks``: a backslash and n in the flag's text is a line break; ``hint``: what an error of a missing
            value says besides.
    """

    group: str
    type: Any
    default: Any
    doc: str
    metadata: Mapping[str, Any]

    @property
    def hidden(self) -> bool:
        return bool(self.metadata.get("hidden"))


def parse(groups: Groups, argv: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """{title: dataclass} of ``groups`` from a command line; ``--help`` prints and exits.

    Raises:
        UserError: a flag that there isn't, a value of another type, or what a dataclass itself refuses.
    """
    given = parser(groups, f"{prog} [--NAME VALUE ...]", description).read(argv)
    return build(groups, given, {name: f"--{name}" for name in given})


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
    hints, docs = typing.get_type_hints(kind), _docs(kind)
    settings = {}
    for entry in flags(kind):
        if not _is_simple(hints[entry.name]):
            raise UserError(f"{group}: {entry.name} is of a type that no flag can have")
        default = [] if entry.default is dataclasses.MISSING else entry.default
        settings[entry.name] = Setting(group, hints[entry.name], default, docs.get(entry.name, ""), entry.metadata)
    return settings


def _is_simple(kind: Any) -> bool:
    arguments = typing.get_args(kind)
    if _is_union(kind):
        return len(arguments) == 2 and arguments[1] is type(None) and _is_simple(arguments[0])
    return kind in (bool, int, float, str, list[str]) or typing.get_origin(kind) is Literal


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
        UserError: a name that there isn't, a value of another type, or what a dataclass itself refuses.
    """
    settings = settings_of(groups)
    given: dict[str, dict[str, Any]] = {title: {} for title in groups}
    for name, value in values.items():
        if name not in settings:
            raise unknown(name, settings, origins[name])
        given[settings[name].group][name] = convert(settings[name].type, value, origins[name])
    return {title: kind(**given[title]) for title, kind in groups.items()}


def unknown(name: str, settings: Iterable[str], origin: str) -> UserError:
    """The error of a YAML key that no setting has."""
    return UserError(f"{origin} is not a setting{nearest(name, settings)}")


def convert(kind: Any, value: Any, origin: str) -> Any:
    """`value` (a flag's text, or what YAML made of it) as the type of a field, or a `UserError` that names `origin`."""
    arguments = typing.get_args(kind)
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
    if kind is str:
        if isinstance(value, str) and value:
            return value
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
            hint = nearest(name.lstrip("-").replace("-", "_"), [*self.settings, "config"], "--")
            raise UserError(f"unknown flag {name}{hint or '; --help lists all'}")
        given = vars(namespace)
        for name in given:
            if name in self.settings and self.settings[name].metadata.get("line_breaks"):
                given[name] = given[name].replace("\\n", "\n")
        return given


def parser(groups: Groups, usage: str, description: str, about: Mapping[str, str] | None = None) -> Parser:
    """The flags, one a setting, grouped as the dataclasses are. ``about``: what stands above a group in ``--help``, if
    not its doc-string."""
    made = Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    sections = {
        title: made.add_argument_group(title, (about or {}).get(title, inspect.getdoc(kind)))
        for title, kind in groups.items()
    }
    made.settings = settings_of(groups)
    for name, setting in made.settings.items():
        kind = next((part for part in typing.get_args(setting.type) if part in (str, int, float)), setting.type)
        options: dict[str, Any] = {"metavar": kind.__name__.upper() if isinstance(kind, type) else None, "dest": name}
        if typing.get_origin(setting.type) is Literal:
            options["metavar"] = "{" + ",".join(typing.get_args(setting.type)) + "}"
        elif typing.get_origin(setting.type) is list:
            options |= {"metavar": "FILE", "nargs": "+", "action": "extend"}
        elif setting.type is bool:
            options |= {"metavar": "BOOL", "nargs": "?", "const": True}
        default = "" if setting.default in (None, []) else f" (default: {json.dumps(setting.default)})"
        options["help"] = argparse.SUPPRESS if setting.hidden else (setting.doc + default).replace("%", "%%")
        sections[setting.group].add_argument(f"--{name}", *setting.metadata.get("also", ()), **options)
    return made
