"""The rows of an ablation, from their YAML table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from wpn_ds.errors import UserError
from wpn_ds.settings.run import Config, parse_args

DEFAULT_GRID = Path(str(resources.files(__package__))) / "grid.yaml"

#: Settings that the ablation gives every run itself.
_OURS = ("seed", "output_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "config")


@dataclass(frozen=True)
class GridRow:
    """One way to train.

    Attributes:
        name: also its folder's.
        changes: settings in place of the default's.
    """

    name: str
    changes: Mapping[str, Any]

    @property
    def is_default(self) -> bool:
        return not self.changes

    @property
    def said(self) -> str:
        """What it changes, for a cell of the table: on one line, without the table's separator."""
        said = ", ".join(f"{name} {_text(value)}" for name, value in self.changes.items())
        return said.replace("\n", "\\n").replace("|", "\\|")


def read_grid(path: Path) -> list[GridRow]:
    """The rows in the file's order.

    Raises:
        UserError: the file can't be read, or isn't such a table.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--grid {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--grid {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict) or not table:
        raise UserError(f"--grid {path}: expected lines of 'name: {{setting: value, ...}}'")
    return [_row(path, str(name), changes) for name, changes in table.items()]


def _row(path: Path, name: str, changes: Any) -> GridRow:
    where = f"--grid {path}: row {name}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{where}: it names a folder: use letters, digits, '.', '_' and '-'")
    if not isinstance(changes, dict):
        raise UserError(f"{where}: expected {{setting: value, ...}}, got {changes!r}")
    changes = {str(setting): value for setting, value in changes.items()}
    for setting in changes:
        if setting in _OURS:
            raise UserError(f"{where}: {setting} is not for a row to set")
    return GridRow(name, changes)


def chosen_rows(rows: Sequence[GridRow], names: Sequence[str]) -> list[GridRow]:
    """The rows of these names; all without any.

    Raises:
        UserError: there is no such row.
    """
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: the grid has no such row, only {', '.join(known)}")
    return [row for row in rows if not names or row.name in names]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The settings as training's command line."""
    given = []
    for name, value in settings.items():
        given += [f"--{name}", *([_text(v) for v in value] if isinstance(value, list) else [_text(value)])]
    return given


def checked(row: GridRow, command_line: Sequence[str]) -> Config:
    """The settings as training will read them, so that a mistake shows before the first row is trained.

    Raises:
        UserError: they are wrong; names the row.
    """
    try:
        return parse_args(command_line)
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
