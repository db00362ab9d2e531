"""What is done to a model's weights or states before it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wpn_ds.data.plan import Segment
from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.tokens import encode_prompt
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.model import AskedModel, Treatment
from wpn_ds.evaluate.scoring import right_padded
from wpn_ds.models.folder import identity
from wpn_ds.models.generate import batches, evaluation_mode
from wpn_ds.models.load import Source, decoder_layers, max_positions, pad_token_id, pinned
from wpn_ds.models.rounding import FORMATS, round_model


def rounding(name: str) -> Treatment:
    """To the number format ``name`` and back."""
    return Treatment(["rounded", name], lambda lm, _: round_model(lm, FORMATS[name]))


def rounding_away(name: str, start: Source) -> Treatment:
    """The same, with what unlearning moved rounded to the side away from the model ``start`` that it was before."""

    def apply(lm: Any, _: Any) -> None:
        before = AskedModel(start, bf16=lm.dtype == torch.bfloat16)
        round_model(lm, FORMATS[name], before.load()[0])

    return Treatment(["rounded away", name, identity(pinned(start).address)], apply)


@dataclass(frozen=True)
class Directed:
    """Takes a direction out of a model's states: the difference of the means over ``harmful`` and over ``harmless``
    prompts, at their last token after the middle layer (arXiv 2406.11717), which in a model that refuses is the
    refusal's. It is taken out of what each decoder layer hands on."""

    harmful: Sequence[ForgetRecord]
    harmless: Sequence[ForgetRecord]
    asking: Asking

    @property
    def treatment(self) -> Treatment:
        told = [[repr(record.prompt) for record in records] for records in (self.harmful, self.harmless)]
        return Treatment(["direction", told, repr(self.asking.style)], self._apply)

    def _apply(self, lm: Any, tokenizer: Any) -> None:
        harmful, harmless = (self._mean(lm, tokenizer, records) for records in (self.harmful, self.harmless))
        direction = torch.nn.functional.normalize((harmful - harmless).float(), dim=0)

        def without(_: Any, __: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            along = direction.to(states)
            states = states - (states @ along).unsqueeze(-1) * along
            return (states, *output[1:]) if isinstance(output, tuple) else states

        for layer in decoder_layers(lm):
            layer.register_forward_hook(without)

    def _mean(self, lm: Any, tokenizer: Any, records: Sequence[ForgetRecord]) -> Tensor:
        """[d]: over the prompts, of the state at the last token after the middle layer."""
        room = min(self.asking.max_length, max_positions(lm.config) or self.asking.max_length)
        ids = [encode_prompt(record.prompt, tokenizer, self.asking.style, room) for record in records]
        layers, states = decoder_layers(lm), []

        def keep(_: Any, __: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        sums = []
        handle = layers[len(layers) // 2].register_forward_hook(keep)
        try:
            for part in batches(ids, self.asking.batch_size):
                read = [Segment(tuple(ids[at]), 0, len(ids[at])) for at in part]
                padded, mask = right_padded(read, pad_token_id(tokenizer))
                with evaluation_mode(lm):
                    lm(input_ids=padded.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False)
                last = (mask.sum(1) - 1).to(lm.device)
                sums.append(states.pop()[torch.arange(len(part)), last].float().sum(0))
        finally:
            handle.remove()
        return torch.stack(sums).sum(0) / len(ids)
