"""A DeepSpeed JSON with the lines of its keys, so that an error can say where in the file it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError

_DEEPEST = 100  # brackets in brackets; a copy of Python's takes two frames for each, of a thousand


class DeepSpeedFile:
    """The content of a DeepSpeed JSON, `json`, and where each of its keys stands."""

    def __init__(self, content: dict[str, Any], name: str, lines: dict[tuple[str, ...], int]) -> None:
        self.json = content
        self.name = name
        self._lines = lines

    @classmethod
    def read(cls, path_or_dict: str | Path | Mapping[str, Any]) -> DeepSpeedFile:
        """The file at a path, or the content itself, which is copied; `UserError` for what is no JSON object."""
        if isinstance(path_or_dict, Mapping):
            return cls(copy.deepcopy(dict(path_or_dict)), "the DeepSpeed configuration", {})
        path = Path(path_or_dict)
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            key_lines = list(_key_lines(text))
        except OSError as error:
            raise UserError(f"--deepspeed {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--deepspeed {path}: not UTF-8 at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{path}: can't be read: {str(error).partition(';')[0]}") from None
        except RecursionError:
            raise UserError(f"{path}: brackets in brackets, more than {_DEEPEST}: is it the right file?") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}:1: a DeepSpeed configuration is a JSON object, {{...}}")
        lines: dict[tuple[str, ...], int] = {}
        for keys, line in key_lines:
            if keys in lines:
                raise UserError(f"{path}:{line}: {'.'.join(keys)} is given twice, first in line {lines[keys]}")
            lines[keys] = line
        return cls({key: value for key, value in content.items() if value is not None}, str(path), lines)

    def section(self, *path: str, create: bool = False) -> dict[str, Any]:
        """The object at `path`; where there is none, an empty one, which is put there on `create`."""
        node = self.json
        for depth, key in enumerate(path, start=1):
            if create and node.get(key) is None:
                node[key] = {}
            child = node.get(key)
            node = {} if child is None else child
            if not isinstance(node, dict):
                raise self.error(path[:depth], "must be an object, {...}")
        return node

    def rename(self, old: str, new: str) -> None:
        """Move the section `old`, with its lines, to `new`."""
        self.json[new] = self.json.pop(old)
        self._lines |= {(new, *keys[1:]): line for keys, line in self._lines.items() if keys[0] == old}

    def at(self, path: tuple[str, ...]) -> str:
        """'file.json:12: optimizer.params.lr'."""
        line = f":{self._lines[path]}" if path in self._lines else ""
        return f"{self.name}{line}: {'.'.join(path)}"

    def error(self, path: tuple[str, ...], message: str) -> UserError:
        """The error that `message` is to be said about the key at `path`."""
        return UserError(f"{self.at(path)}: {message}")


def _key_lines(text: str) -> Iterable[tuple[tuple[str, ...], int]]:
    """(path of keys, line) for every key of a valid JSON text, in its order; a list's entries count by their index.

    Raises RecursionError for one that is nested deeper than anything that works through it can follow.
    """
    containers: list[list[Any]] = []  # [the key or index that is being read, whether it is a list]
    for token in re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\],]', text):
        mark = token.group()
        if mark in "{[":
            containers.append([0, mark == "["])
            if len(containers) > _DEEPEST:
                raise RecursionError
        elif mark in "}]":
            containers.pop()
        elif mark == ",":
            if containers[-1][1]:
                containers[-1][0] += 1
        elif token.group(2):
            containers[-1][0] = json.loads(f'"{token.group(1)}"')
            yield tuple(str(key) for key, _ in containers), text.count("\n", 0, token.start()) + 1
