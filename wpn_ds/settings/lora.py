"""Settings of adapters that are trained in place of the model's own weights."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from wpn_ds.errors import UserError, require

#: Why there is no --load_in_4bit there.
NOT_SHARDED = "ZeRO stage 3 can't shard weights of 4 bits: take ds_configs/zero2.json"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of the model's own weights (LoRA, arXiv 2106.09685); off unless --lora_r is given."""

    lora_r: int = 0
    """Rank of the adapters; 0 trains the whole model."""

    lora_alpha: int = 32
    """What adapters add to a layer is scaled by lora_alpha / lora_r."""

    lora_dropout: float = 0.0
    """Dropout of what adapters read."""

    lora_target: list[str] = field(default_factory=lambda: ["auto"])
    """Layers with adapters: auto (those that PEFT has for the family, or else all-linear), all-linear (all but the
    output layer), or names of modules such as q_proj v_proj."""

    load_in_4bit: bool = False
    """Keep the frozen weights of linear layers but the output layer in 4 bits (QLoRA, arXiv 2305.14314), by
    bitsandbytes; not under ZeRO stage 3."""

    lora_merge: bool = False
    """Export the whole model with the adapters merged into it, in fp32, in place of the adapters alone."""

    def __post_init__(self) -> None:
        require(self, "lora_r", self.lora_r >= 0, "at least 0")
        require(self, "lora_alpha", self.lora_alpha > 0, "greater than 0")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        require(self, "lora_target", bool(self.lora_target), "auto, all-linear, or names of modules")
        given = [entry.name for entry in fields(self) if getattr(self, entry.name) != _default(entry)]
        if given and not self.lora_r:
            raise UserError(f"--{given[0]}: there are no adapters without their rank: give --lora_r as well")

    def __bool__(self) -> bool:
        return self.lora_r > 0


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
