"""The model that is asked or read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wpn_ds.jobs.partitioned import inference_json, partitioned
from wpn_ds.models.adapters import whole
from wpn_ds.models.folder import identity
from wpn_ds.models.load import Source, load_config, load_model, load_tokenizer, max_positions, pinned
from wpn_ds.models.speed import faster_in_bf16, warn_of_slow_bf16
from wpn_ds.system.progress import working


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A task that srun shows its own GPU alone sees it as the first.
    return torch.device("cuda", min(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() - 1))


@dataclass(frozen=True)
class Treatment:
    """What is done to a model before it is asked.

    Attributes:
        content: whatever it depends on beside the model, as JSON.
        apply: does it in place, to (model, tokenizer).
    """

    content: Any
    apply: Callable[[Any, Any], None]


class AskedModel:
    """A model by its configuration and tokenizer, which are there at once; its weights come when there is work.

    Args:
        bf16: in bfloat16, or else in fp32; None: in the faster of the two.
        device: where it computes; None: :func:`device`.
        treatment: what is done to it once it is loaded; it is another model then.
        shared: each rank holds a part of the weights, and all of them compute together.

    Attributes:
        name: as the user gave it.
        source: pinned, since an updated model is another one.
        positions: tokens that it reads at most; None without a limit.

    Raises:
        UserError: there is no such model, or no tokenizer beside it.
    """

    def __init__(
        self,
        source: Source,
        *,
        bf16: bool | None,
        device: torch.device | str | None = None,
        treatment: Treatment | None = None,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self.name, self.source, self._device = source.name_or_path, pinned(whole(source)), device
        self._treatment = treatment
        self._bf16 = faster_in_bf16(self._place) if bf16 is None else bf16
        self.config = load_config(self.source)
        self.tokenizer = load_tokenizer(self.source.name_or_path, self.source, source.flag, self.config)
        self.positions = max_positions(self.config)

    @property
    def digest(self) -> str:
        """What its answers depend on: its files or its commit, the number format, the kind of device."""
        what = [identity(self.source.address), self._bf16, device().type]
        what += [self._treatment.content] if self._treatment else []
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    def load(self) -> tuple[Any, Any]:
        """(the model on its device in eval mode, its tokenizer)."""
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        warn_of_slow_bf16(self._place, dtype)
        with working(f"loading {self.name}"):
            zero3 = inference_json(self._bf16) if self._shared else None
            lm = load_model(self.source, dtype=dtype, tokenizer=self.tokenizer, zero3=zero3).eval()
            lm = partitioned(lm, self._bf16) if self._shared else lm.to(self._place)
            if self._treatment:
                self._treatment.apply(lm, self.tokenizer)
        return lm, self.tokenizer

    @property
    def _place(self) -> torch.device:
        return torch.device(self._device or device())
