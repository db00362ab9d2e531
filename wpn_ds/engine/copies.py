"""A copy of a model whose weights ranks share that is trained: it is shared out as they are, with its gradient and what
its optimizer keeps (ZeRO-3), and reads packed rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from wpn_ds.data.layout import Layout
from wpn_ds.engine.policy import build_engine, exact_layout
from wpn_ds.engine.reading import Reader
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.jobs.partitioned import inference_json, learning_json, let_go
from wpn_ds.models.adapters import attach
from wpn_ds.models.check import candidates, supported
from wpn_ds.models.load import Source, checkpoint_activations, default_attention, pad_token_id, refuse_unknown_ids
from wpn_ds.models.packed import PackedLM
from wpn_ds.settings.lora import LoraConfig

#: Tokens of a rank's forward pass at most (ours), unless one text has more.
TOKENS = 4096


class Copy:
    """The copy. Every rank must make the same calls, from the first to :meth:`close`; the model that it is of is never
    written to.

    Without adapters it is in fp32, where small steps are not rounded away. With adapters it computes with the very
    shards of the model, in their number format, and so do the adapters, which are updated in fp32.
    """

    def __init__(
        self, lm: Any, tokenizer: Any, optimizer: Mapping[str, Any], lora_r: int, seed: int, max_length: int
    ) -> None:
        """``lm``: of :func:`~wpn_ds.jobs.partitioned.partitioned`; ``optimizer``: as DeepSpeed's JSON has it;
        ``lora_r``: rank of its adapters, 0 for none, which ``seed`` draws; ``max_length``: tokens of a text at most.

        Raises:
            UserError: none of the ways to read rows is exact for this family.
        """
        self.asked, self.tokenizer = lm, tokenizer
        self.world = World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), lm.device)
        config = lm.config.get_text_config()
        flat = supported(lm.config)
        attention = candidates("auto", self.world.device, 0.0)[0] if flat else default_attention(lm.config)
        self.lm = _copy_of(lm, torch.float32 if not lora_r else lm.dtype, attention, share=lora_r > 0)
        refuse_unknown_ids(self.lm, tokenizer, Source(lm.config.name_or_path, "the model"))
        if lora_r:
            attach(self.lm, LoraConfig(lora_r=lora_r), seed)
        checkpoint_activations(self.lm.train())  # without dropout, which the configuration has at 0
        bf16 = self.lm.dtype == torch.bfloat16
        model = PackedLM(self.lm, packed=True)
        json = learning_json(bf16, optimizer, config.hidden_size, self.world.size)
        self.engine = build_engine(model, json, None)
        layout = Layout(max_length, TOKENS, True, self.world.size, flat=flat, share_prefix=flat, share_header=flat)
        try:
            self.layout = exact_layout(model, self.engine, layout, "auto", 0.0, self.world)
        except UserError:  # of all ranks at once; as a last resort, a row a text
            model.packed = False
            plain = Layout(max_length, TOKENS, False, self.world.size)
            self.layout = exact_layout(model, self.engine, plain, "auto", 0.0, self.world)
        self.pad_id = pad_token_id(tokenizer)
        self.reader = Reader(self.engine, self.layout, self.pad_id, self.world)

    def close(self) -> None:
        """Free what it holds."""
        asked = self.asked
        self.engine.destroy()
        vars(self).clear()
        let_go(but=asked)


def _copy_of(lm: Any, dtype: torch.dtype, attention: str, *, share: bool) -> Any:
    """A model like ``lm``, shared out alike, in ``dtype``; ``share``: its shards are those of ``lm`` themselves.

    It is made anew and not by ``copy.deepcopy``: that would copy the hooks of the first one's engine, and none of what
    DeepSpeed knows of a weight.
    """
    partition_on_load = HfDeepSpeedConfig(inference_json(dtype == torch.bfloat16))
    made = type(lm)._from_config(copy.deepcopy(lm.config), dtype=dtype, attn_implementation=attention)
    del partition_on_load  # as long as it lives, every model would be partitioned
    made.generation_config = copy.deepcopy(lm.generation_config)
    with torch.no_grad():
        for (name, own), (given, weight) in zip(made.named_parameters(), lm.named_parameters(), strict=True):
            assert name == given, (name, given)
            own.requires_grad_(True)
            if share:
                own.ds_tensor.data = weight.ds_tensor.data
            else:
                own.ds_tensor.copy_(weight.ds_tensor)
        for own, buffer in zip(made.buffers(), lm.buffers(), strict=True):
            own.copy_(buffer)
    return made
