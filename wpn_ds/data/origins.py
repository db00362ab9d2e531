"""Where the rows of records come from: files, or a data set of the Hugging Face hub or of a folder."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wpn_ds.data.shapes import columns_of, renamed
from wpn_ds.data.sources import DataError, Problems, Row, data_files, file_rows, is_saved
from wpn_ds.system.files import sha256

Part = Literal["train", "retain", "validation"]


@dataclass(frozen=True)
class Origin:
    """Files (also folders and patterns, see :func:`file_rows`), or a data set in their place.

    Attributes:
        files: their paths.
        dataset, config, split: name on the hub or a local folder, and which part of it.
        columns: our name of a column that is called otherwise there.
        prefix: of the flags that name all this: "" for --dataset_name, "retain_" for --retain_dataset_name; None where
            there are no such flags.
    """

    files: Sequence[str | Path] = ()
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    prefix: str | None = None

    @property
    def named(self) -> list[str]:
        """The files, or the data set with its split; empty where nothing is named."""
        return [str(path) for path in self.files] if self.dataset is None else [f"{self.dataset}[{self.split}]"]

    @property
    def flag(self) -> str:
        """That of the columns; "" where there is none."""
        return "" if self.prefix is None else f"--{self.prefix}columns"

    def identity(self) -> list[Any]:
        """What tells these data from others, in whatever way they come: all that reading them depends on, with the
        contents of files as checksums.

        Raises:
            OSError: a file can't be read.
            DataError: `datasets` can't load the data set.
        """
        if self.dataset is not None:
            there = os.path.isdir(self.dataset)
            return [self.named, dict(self.columns), self._load(self.dataset)._fingerprint, _sums(self.dataset, there)]
        files = [file for path in self.files for file in data_files(path, Problems())]
        return [self.named, dict(self.columns), [_sums(file, True) for file in files]]

    def rows(self, problems: Problems) -> Iterator[tuple[str, Row]]:
        """(source, row) of everything, columns by our names. The source is as :func:`file_rows` has it, or
        "name[split]:row" with rows counted from 0. A column that no row has is a problem.

        Raises:
            DataError: `datasets` can't load the data set.
        """
        unseen, known = set(self.columns.values()), dict[str, None]()
        for source, row in self._rows(problems):
            unseen.difference_update(row)
            known.update(dict.fromkeys(row))
            yield source, renamed(row, self.columns)
        if unseen and known:
            columns = ", ".join(map(json.dumps, sorted(unseen)))
            there = ", ".join(map(json.dumps, list(known)[:20]))
            problems.add(self.flag, f"no row has {columns}; the fields are {there}")

    def _rows(self, problems: Problems) -> Iterator[tuple[str, Row]]:
        if self.dataset is None:
            for path in self.files:
                yield from file_rows(path, problems)
            return
        data, (name,) = self._load(self.dataset), self.named
        if not len(data):
            flag = f"--{self.prefix or ''}dataset"
            problems.add(name, f"is empty: choose another {flag}_name or {flag}_split")
        for at, row in enumerate(data):
            yield f"{name}:{at}", row

    def _load(self, name: str) -> Any:
        import datasets

        flag = f"--{self.prefix or ''}dataset"
        config = f" {flag}_config {self.config}" if self.config else ""
        flags = f"{flag}_name {name}{config} {flag}_split {self.split}"
        if os.path.isfile(name):
            raise DataError(f"{flags}: is a file: give it with --{(self.prefix or 'train_').rstrip('_')}_file")
        try:
            if not is_saved(name):
                return datasets.load_dataset(name, self.config, split=self.split)
            saved = datasets.load_from_disk(name)
        except Exception as error:  # datasets raises a dozen kinds; for the user all mean the same
            hides_reason = isinstance(error, datasets.exceptions.DatasetGenerationError)
            reason = " ".join(str(error.__cause__ if hides_reason else error).split())
            raise DataError(f"{flags}: can't be loaded: {reason:.500}") from error
        if isinstance(saved, datasets.DatasetDict):
            splits = dict(saved)
        else:
            splits = {"train": saved, str(saved.split or "train"): saved}
        if self.split not in splits:
            raise DataError(f"{flags}: there is no such split, only {', '.join(splits)}")
        return splits[self.split].with_format(None)


def _sums(path: str | Path, local: bool) -> list[tuple[str, str]]:
    """(path, checksum) of a file, or of all files in a folder."""
    if not local:
        return []
    files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if os.path.isdir(path) else [Path(path)]
    return [(str(file), sha256(file)) for file in files]


def origin_of(settings: Mapping[str, Any], part: Part) -> Origin:
    """What a run's settings (its flags, or its run.yaml) name for a part of the data; validation data have the columns
    of the training data where nothing else is said.

    Raises:
        UserError: --columns is no list of columns.
    """
    prefix = "" if part == "train" else f"{part}_"
    named = f"{prefix}columns"
    if part == "validation" and settings.get(named) is None:
        named = "columns"
    return Origin(
        files=settings.get(f"{part}_file") or [],
        dataset=settings.get(f"{prefix}dataset_name"),
        config=settings.get(f"{prefix}dataset_config"),
        split=settings.get(f"{prefix}dataset_split") or "train",
        columns=columns_of(settings.get(named), f"--{named}"),
        prefix=prefix,
    )
