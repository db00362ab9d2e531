"""The objectives by name: every file of this folder that has one, and users' own."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import zlib
from types import ModuleType
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

import wpn_ds.objectives
from wpn_ds.errors import UserError, nearest
from wpn_ds.objectives.terms import Objective

Kind = TypeVar("Kind", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def objective(kind: Kind) -> Kind:
    """Class decorator: makes an :class:`Objective` a frozen dataclass that ``--objective`` finds by its name, which is
    the class's in lower case."""
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(kind)
    made.name = kind.__name__.lower()
    return made


@functools.cache
def built_in() -> dict[str, type[Objective]]:
    """The package's objectives by name, in alphabetical order."""
    names = (found.name for found in pkgutil.iter_modules(wpn_ds.objectives.__path__, "wpn_ds.objectives."))
    modules = [importlib.import_module(name) for name in names]
    kinds = {kind.name: kind for module in modules for kind in vars(module).values() if _is_objective(kind)}
    return dict(sorted(kinds.items()))


def find(name: str, origin: str = "--objective") -> type[Objective]:
    """The objective of that name, or a user's own: ``my_package.my_module:MyObjective`` or ``path/my.py:MyObjective``.

    A module is also looked for in the working folder. ``origin`` stands before what errors say.

    Raises:
        UserError: there is none, or it can't be imported.
    """
    known = built_in()
    if name in known:
        return known[name]
    place, colon, attribute = name.rpartition(":")
    if name.endswith(".py"):
        raise UserError(f"{origin} {name}: name the class in it as well, {name}:CLASS")
    if not (colon and place and attribute):
        raise UserError(f"{origin} must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    origin = f"{origin} {name}"
    file = place.endswith(".py")
    if file and not os.path.isfile(place):
        raise UserError(f"{origin}: there is no file {place}")
    try:
        module = _load_file(os.path.abspath(place)) if file else _load_module(place)
    except ModuleNotFoundError as error:
        missing = f"there is no module {error.name}"
        ours = error.name is not None and f"{place}.".startswith(f"{error.name}.")
        raise UserError(f"{origin}: {missing}" + ("" if ours else f", which {place} imports")) from None
    except Exception as error:  # whatever a user's file does while it is imported
        said = " ".join(str(error).split())
        raise UserError(f"{origin}: {place} can't be imported: {type(error).__name__}: {said}") from error
    kind = getattr(module, attribute, None)
    if kind is None:
        classes = [each.__name__ for each in vars(module).values() if _is_objective(each)]
        raise UserError(f"{origin}: {place} has no {attribute}{nearest(attribute, classes)}")
    if not _is_objective(kind):
        raise UserError(f"{origin}: {attribute} is not an Objective with @objective above it")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{origin}: its field {field.name} needs a default")
    kind.name = name
    return kind


def owners(flag: str) -> dict[str, Any]:
    """{objective: its default} of the package's objectives that have a flag."""
    fields = {name: {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
              for name, kind in built_in().items()}  # fmt: skip
    return {name: own[flag] for name, own in fields.items() if flag in own}


def _is_objective(thing: object) -> bool:
    """Whether ``thing`` is a class that the decorator has made; a subclass without it would lose its fields."""
    return isinstance(thing, type) and issubclass(thing, Objective) and "name" in vars(thing) and thing is not Objective


def _load_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there stands before a library
    return importlib.import_module(name)


@functools.cache
def _load_file(path: str) -> ModuleType:
    """The module in a file, the same one for every call."""
    name = f"own_objective_{zlib.crc32(path.encode())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module
