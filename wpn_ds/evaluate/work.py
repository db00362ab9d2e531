"""The work of an evaluation in units: spread over ranks, each result kept in a file as soon as it is there.

A unit's result depends on the unit alone, never on the rank that computes it or on what ran before it. Therefore one
rank and many give the same report, and a call that was killed goes on with what is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from wpn_ds.data.tokens import today, writes_date
from wpn_ds.errors import UserError
from wpn_ds.evaluate.ranks import from_rank_0
from wpn_ds.models.generate import side_by_side
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import usable, write_atomically
from wpn_ds.system.progress import progress, working


@dataclass(frozen=True)
class Unit:
    """A piece of work on one model.

    Attributes:
        name: what the progress bar calls it.
        content: whatever the result depends on beside the model; JSON.
        size: its share of the progress, in prompts.
        run: from (model, tokenizer) to a JSON value; leaves the model as it was.
        generates: once, and nothing else. Where ranks share a model's weights, they can do such units side by side: who
            is done first goes on until all are.
    """

    name: str
    content: Any
    size: int
    run: Callable[[Any, Any], Any]
    generates: bool = False

    @property
    def key(self) -> str:
        """The unit's own, the same in every call and on every rank."""
        text = json.dumps([self.name, self.content], sort_keys=True)
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:24]}"


class Ledger:
    """The results of units on one model, in a folder that all ranks share: a JSONL file a rank."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder = folder
        self._file = folder / f"rank-{rank}.jsonl"
        with usable(f"--output_dir {folder.parent.parent}"):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        """Every result by its unit's key; a last line that a kill cut short is left out, and its unit runs again."""
        results = {}
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, result = json.loads(line)
                except ValueError:
                    continue
                results[key] = result
        return results

    def results(self, units: Sequence[Unit], flag: str) -> dict[str, Any]:
        """The same. Raises UserError if one of ``units`` isn't among them; ``flag`` is what names the folder."""
        results = self.read()
        if missing := [unit.name for unit in units if unit.key not in results]:
            raise UserError(
                f"{self._folder} lacks {len(missing)} results of other ranks, {missing[0]} first: give {flag} a "
                "folder that all of them share"
            )
        return results

    def run(
        self,
        units: Sequence[Unit],
        load: Callable[[], tuple[Any, Any]],
        *,
        world: tuple[int, int],
        label: str,
        shared: bool = False,
    ) -> None:
        """Run what is left of this rank's share of ``units``; ``load`` makes (model, tokenizer) if there is anything.

        ``world`` is (rank, number of ranks). Units go round the ranks in their order. ``shared``: the ranks share the
        model's weights, and all of them must call this together.
        """
        rank, size = world
        if shared:
            finished = from_rank_0(rank, size, self.read)
            own = left = together([unit for unit in units if unit.key not in finished], rank, size)
        else:
            finished = self.read()
            own = list(units[rank::size])
            left = [unit for unit in own if unit.key not in finished]
        if not left:
            return
        model, tokenizer = load()
        total = sum(unit.size for unit in own)
        initial = total - sum(unit.size for unit in left)
        # A line that a kill cut short gets its end, so that the next one is a line of its own.
        with (
            self._file.open("a", encoding="utf-8") as file,
            progress(what=label, total=total, initial=initial, unit="prompts", quiet=rank > 0) as bar,
        ):
            if file.tell():
                file.write("\n")
            for unit in left:
                what = f"{label}: {unit.name}"
                bar.set_description_str(what, refresh=False)  # it would be a line of a log each time
                with working(what, quiet=rank > 0):
                    result = unit.run(model, tokenizer)
                file.write(json.dumps([unit.key, result]) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(unit.size)


def together(units: Sequence[Unit], rank: int, size: int) -> list[Unit]:
    """What ``rank`` runs of ``units`` where ranks share a model's weights, as many as any other: those that generate
    :func:`side_by_side`, and the others all at once."""
    own = []
    for generates, run in groupby(units, lambda unit: unit.generates):
        those = list(run)
        own += side_by_side(those, rank, size) if generates else those
    return own


def dated(style: PromptStyle, tokenizer: Any, folder: Path) -> PromptStyle:
    """``style`` with one day for all ranks and all calls that share the work in ``folder``, where the tokenizer's chat
    template writes today's date."""
    if style.chat_date is not None or not writes_date(tokenizer):
        return style
    kept = folder / "chat_date"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        own = write_atomically(folder / f".chat_date.{secrets.token_hex(4)}", today())
        try:
            os.link(own, kept)  # the first one stays, and is whole
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            write_atomically(kept, today())
        own.unlink()
    return replace(style, chat_date=kept.read_text(encoding="utf-8"))
