"""What a model's architecture says about its memory: parameters, and what a layer keeps for the backward pass.

OPT and GPT-Neo are tables and formulas, so nothing is downloaded or imported to answer for them. Other causal language
models are built by transformers without memory, on the meta device, from their config alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpn_ds.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A causal language model as its memory sees it.

    Attributes:
        name: what it is called.
        parameters: of the whole model, a tied weight once.
        layers, hidden, ffn, heads, vocab: as usual; ``ffn`` is the width inside an MLP.
        embed: width of the token embedding and of the states that the head receives (not ``hidden`` in OPT-350m).
        saved: elements that a layer keeps per token for its backward pass, see :func:`estimate.activation_bytes`.
        passing: elements per token that exist for a moment at the peak: temporaries and gradients of the widest layer.
        buffers: bytes of the model's buffers, which no ZeRO stage shards.
        linears: of the linear layers but the head (name, inputs, outputs, how many there are).
        adapted: those that get adapters unless others are named.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    embed: int
    saved: int
    passing: int
    buffers: int = 0
    linears: tuple[tuple[str, int, int, int], ...] = ()
    adapted: tuple[str, ...] = ("q_proj", "v_proj")

    def adapters(self, rank: int, target: Sequence[str]) -> int:
        """Parameters of LoRA's adapters; ``target`` as --lora_target.

        Raises:
            UserError: no linear layer has one of these names.
        """
        names = self.adapted if [*target] == ["auto"] else target
        if [*names] == ["all-linear"]:
            names = [name for name, *_ in self.linears]
        known = {name for name, *_ in self.linears}
        if missing := [name for name in names if name not in known]:
            has = ", ".join(sorted(known))
            raise UserError(f"--lora_target {missing[0]}: {self.name} has no linear layer of that name, but {has}")
        return sum(count * rank * (inputs + outputs) for name, inputs, outputs, count in self.linears if name in names)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter, below which ZeRO-3 can't gather."""
        return max(self.vocab * self.embed, self.hidden * self.ffn)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def opt(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    *,
    ffn: int | None = None,
    embed: int | None = None,
    vocab: int = 50272,
    positions: int = 2048,
    final_norm: bool = True,
) -> Architecture:
    """OPT. Its positions have an offset of 2; with ``embed`` (350m) words are projected into and out of ``hidden``."""
    ffn, embed = ffn or 4 * hidden, embed or hidden
    layer = 4 * _linear(hidden, hidden) + _linear(hidden, ffn) + _linear(ffn, hidden) + 2 * 2 * hidden
    square = [(name, hidden, hidden, layers) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    around = [("project_in", embed, hidden, 1), ("project_out", hidden, embed, 1)] if embed != hidden else []
    tables = vocab * embed + (positions + 2) * hidden + (2 * embed * hidden if embed != hidden else 0)
    return Architecture(
        name, tables + layers * layer + 2 * hidden * final_norm, layers, hidden, ffn, heads, vocab, embed,
        saved=8 * hidden + ffn, passing=2 * ffn,
        linears=(*square, ("fc1", hidden, ffn, layers), ("fc2", ffn, hidden, layers), *around),
    )  # fmt: skip


def gpt_neo(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    *,
    ffn: int | None = None,
    vocab: int = 50257,
    positions: int = 2048,
) -> Architecture:
    """GPT-Neo: q, k and v without bias; each layer has a causal mask of its own as a buffer, a byte an entry."""
    ffn = ffn or 4 * hidden
    attention = 3 * hidden * hidden + _linear(hidden, hidden)
    square = [(name, hidden, hidden, layers) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    layer = attention + _linear(hidden, ffn) + _linear(ffn, hidden) + 2 * 2 * hidden
    return Architecture(
        name, (vocab + positions) * hidden + layers * layer + 2 * hidden, layers, hidden, ffn, heads, vocab, hidden,
        saved=8 * hidden + 5 * ffn, passing=3 * ffn, buffers=layers * positions**2,
        linears=(*square, ("c_fc", hidden, ffn, layers), ("c_proj", ffn, hidden, layers)),
    )  # fmt: skip


KNOWN = {
    model.name: model
    for model in (
        opt("opt-125m", 12, 768, 12),
        opt("opt-350m", 24, 1024, 16, embed=512, final_norm=False),
        opt("opt-1.3b", 24, 2048, 32),
        opt("opt-2.7b", 32, 2560, 32),
        opt("opt-6.7b", 32, 4096, 32),
        opt("opt-13b", 40, 5120, 40),
        opt("opt-30b", 48, 7168, 56),
        opt("opt-66b", 64, 9216, 72),
        gpt_neo("gpt-neo-125m", 12, 768, 12),
        gpt_neo("gpt-neo-1.3b", 24, 2048, 16),
        gpt_neo("gpt-neo-2.7b", 32, 2560, 20),
    )
}
"""Models that are known by name, in lower case and without the owner."""


def architecture(name_or_path: str) -> Architecture:
    """The architecture of a model by name, with or without its owner, or of the config in a folder or on the hub.

    Raises:
        UserError: there is no such model, or its config is none of a causal language model.
    """
    owner, _, name = name_or_path.rpartition("/")
    if owner in ("", "facebook", "EleutherAI") and name.lower() in KNOWN and not Path(name_or_path).is_dir():
        return KNOWN[name.lower()]
    from wpn_ds.models.load import Source, load_config

    try:
        return from_config(load_config(Source(name_or_path, flag="--model")), name_or_path)
    except UserError as error:
        raise UserError(f"{error}; known without a download: {', '.join(KNOWN)}") from error


def from_config(config: Any, name: str) -> Architecture:
    """The architecture that a transformers config describes.

    Raises:
        UserError: it lacks what every causal language model has.
    """
    if config.model_type == "opt" and config.enable_bias and config.layer_norm_elementwise_affine:
        return opt(
            name, config.num_hidden_layers, config.hidden_size, config.num_attention_heads, ffn=config.ffn_dim,
            embed=config.word_embed_proj_dim, vocab=config.vocab_size, positions=config.max_position_embeddings,
            final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        )  # fmt: skip
    if config.model_type == "gpt_neo":
        return gpt_neo(
            name, config.num_layers, config.hidden_size, config.num_heads, ffn=config.intermediate_size,
            vocab=config.vocab_size, positions=config.max_position_embeddings,
        )  # fmt: skip
    return _other(config, name)


def _other(config: Any, name: str) -> Architecture:
    """Exact parameters; activations of a layer with rotary positions, fp32 norms and a gated MLP, roughly."""
    import torch
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_FAMILY
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
        ffn = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        vocab = text.vocab_size
    except (AttributeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name}: not a causal language model that can be estimated ({reason})") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(
        name, parameters, layers, hidden, ffn, heads, vocab, hidden, saved=20 * hidden + 5 * ffn, passing=3 * ffn,
        linears=_linears(model), adapted=tuple(OF_FAMILY.get(config.model_type, ["all-linear"])),
    )  # fmt: skip


def _linears(model: Any) -> tuple[tuple[str, int, int, int], ...]:
    """The linear layers of a model but its head, Conv1D of GPT-2's kin among them."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head, counted = model.get_output_embeddings(), Counter[tuple[str, int, int]]()
    for name, module in model.named_modules():
        if module is not head and isinstance(module, torch.nn.Linear | Conv1D):
            outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            counted[name.rpartition(".")[2], inputs, outputs] += 1
    return tuple((*layer, count) for layer, count in counted.items())
