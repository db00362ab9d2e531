"""Two models' weights mixed, W = start + alpha (unlearned - start), one tensor at a time: neither is ever in memory.

Model mixing is of arXiv 2406.09179, which compares methods of unlearning at equal retention by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wpn_ds.errors import UserError
from wpn_ds.models.folder import safetensors_files

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What can be mixed; the numbers of other dtypes mean something only with a scale that stands elsewhere."""


@dataclass(frozen=True)
class Weights:
    """A model's safetensors by their headers.

    Attributes:
        name: the flag and the folder that it names, for errors.
        files: in the order of their names.
        places, shapes: each tensor's file and shape.
    """

    name: str
    files: list[Path]
    places: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, name: str, folder: Path) -> Weights:
        """Those of the model in ``folder``.

        Raises:
            UserError: there are none, or a file is damaged.
        """
        files = safetensors_files(folder)
        if not files:
            raise UserError(f"{name}: no safetensors there: load the model and save it with save_pretrained")
        places, shapes = {}, {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (it is no dict)
                        places[key], shapes[key] = path, tuple(file.get_slice(key).get_shape())
            except SafetensorError as error:
                raise UserError(f"{name}: {path.name} is damaged ({error}): copy it anew") from error
        return cls(name, files, places, shapes)

    def tensor(self, key: str) -> Tensor:
        with safe_open(self.places[key], "pt") as file:
            return file.get_tensor(key)


def check_alike(start: Weights, unlearned: Weights) -> None:
    """Raises UserError unless both have the same tensors in the same shapes."""
    for one, other in ((start, unlearned), (unlearned, start)):
        if own := sorted(one.shapes.keys() - other.shapes.keys()):
            raise UserError(
                f"{one.name} has {len(own)} weights that {other.name} lacks, {own[0]} first: name the model that the "
                "other one was made of, both saved by the same version of transformers"
            )
    for key, shape in start.shapes.items():
        if shape != unlearned.shapes[key]:
            raise UserError(
                f"{key} is {_shown(shape)} in {start.name} and {_shown(unlearned.shapes[key])} in {unlearned.name}: "
                "name the model that the other one was made of"
            )


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def mixed(start: Tensor, unlearned: Tensor, alpha: float) -> Tensor:
    """``start + alpha * (unlearned - start)`` in ``unlearned``'s dtype, computed in fp32 (in fp64 what is fp64).

    Alpha 1 gives ``unlearned`` itself and alpha 0 ``start``, bit for bit where the dtypes agree.
    """
    if alpha == 1:
        return unlearned
    if alpha == 0:
        return start.to(unlearned.dtype)
    wide = torch.promote_types(unlearned.dtype, torch.float32)
    return torch.lerp(start.to(wide), unlearned.to(wide), alpha).to(unlearned.dtype)


def write_mixed(start: Weights, unlearned: Weights, alpha: float, folder: Path) -> Iterator[str]:
    """Writes ``unlearned``'s files anew to ``folder``, with its names, dtypes and metadata, mixed with ``start``'s
    weights; yields each tensor's name once it is written.

    Raises:
        UserError: a tensor can't be mixed, or is no longer finite.
    """
    for path in unlearned.files:
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        places = {key: entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"}
        with (folder / path.name).open("xb") as out:
            out.write(length + header)
            for key in sorted(places, key=places.__getitem__):
                tensor = _checked(key, start, unlearned, alpha)
                out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                yield key


def _checked(key: str, start: Weights, unlearned: Weights, alpha: float) -> Tensor:
    one, other = start.tensor(key), unlearned.tensor(key)
    if other.dtype not in _PLAIN or one.dtype not in _PLAIN:  # masks, counters; or what is quantised
        if one.dtype == other.dtype and torch.equal(one, other):
            return other
        raise UserError(
            f"{key} is {one.dtype} in {start.name} and {other.dtype} in {unlearned.name}, which differ and can't be "
            "mixed: name models that are not quantised"
        )
    made = mixed(one, other, alpha)
    if not made.isfinite().all() and other.isfinite().all():
        raise UserError(f"--alpha {alpha:g}: {key} is no longer finite as {made.dtype}: give one nearer to 0 to 1")
    return made
