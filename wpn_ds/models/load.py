"""``from_pretrained`` with an audit: partitioned on load under ZeRO-3, dropout off, no weight silently made up."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from wpn_ds.errors import UserError, nearest
from wpn_ds.models.attention import KERNELS
from wpn_ds.models.files import compare, weight_files
from wpn_ds.models.folder import fault

logger = logging.getLogger(__name__)

#: Causal masks and a version number that older transformers saved as if they were weights (published GPT-Neo, OPT).
_LEFTOVERS = re.compile(r"\.attn\.(attention\.)?(masked_)?bias$|decoder\.version$")


_PROBES = ("The quick brown fox.", "Grüße, 42 x 7!")
"""Texts whose ids tell two tokenizers apart."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what of it is allowed. ``flag`` is what errors call it."""

    name_or_path: str
    flag: str = "--model_name_or_path"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_key_mismatch: bool = False

    @property
    def hub_arguments(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def address(self) -> str:
        """A hub model's name with its revision, which is its commit once it is :func:`pinned`; a folder's path."""
        is_folder = Path(self.name_or_path).is_dir()
        return self.name_or_path if is_folder or not self.revision else f"{self.name_or_path}@{self.revision}"


def pinned(source: Source) -> Source:
    """With the commit that its revision is on the hub now, so that all that is loaded is of the same; a folder as it
    is.

    Raises:
        UserError: the hub has no such model, or can't be reached and its cache hasn't got it.
    """
    with _one_line(f"{source.flag} {source.name_or_path}: no such folder, and no such model on the hub"):
        return replace(source, revision=hub_commit(source.name_or_path, source.revision) or source.revision)


def hub_commit(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's revision (main, if none is given) is now; None of a folder.

    It is told by where the cache keeps a file: configurations no longer carry it (transformers 5).

    Raises:
        OSError, ValueError: there is no such model, or none can be reached.
    """
    if Path(name_or_path).is_dir():
        return None
    return extract_commit_hash(cached_file(name_or_path, "config.json", revision=revision or "main"), None)


def load_config(source: Source, *, dropout: float | None = None) -> PretrainedConfig:
    """The model's configuration; ``dropout`` replaces every dropout probability in it (layerdrop becomes 0)."""
    name, place = source.name_or_path, Path(source.name_or_path)
    if place.exists() and (reason := fault(place, weights=False)):
        raise UserError(f"{source.flag} {name}: {reason}")
    with _one_line(
        f"{source.flag} {name}: " + ("damaged config.json" if place.exists() else f"no such folder{_on_the_hub(name)}"),
        *(TypeError, AttributeError, RecursionError, StrictDataclassError),  # what isn't as transformers takes it to be
    ):
        fields, _ = PretrainedConfig.get_config_dict(name, **source.hub_arguments)
        kind = fields.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING and "auto_map" not in fields:
            raise UserError(
                f"{source.flag} {name}: transformers {transformers.__version__} doesn't know the model type {kind!r} "
                "of its config.json: install a transformers that does, or take another model"
            )
        config = AutoConfig.from_pretrained(name, **source.hub_arguments)
    if dropout is not None:
        for name in dropout_fields(config):
            setattr(config.get_text_config(), name, 0.0 if name == "layerdrop" else dropout)
    return config


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest text, in tokens, that is read the same whatever is read beside it; None without a limit.

    That is the model's positions, or less: where a longest text beyond a border changes the rope's frequencies for all
    (longrope), its neighbours would be read otherwise than alone.
    """
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    borders = [
        rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for rope in (ropes, *ropes.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    own = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # MPT's name
    return min((limit for limit in (own, *borders) if limit), default=None)


def length_notes(config: PretrainedConfig, asked: int, name: str) -> list[str]:
    """A line if texts end before ``asked`` tokens and before the model's positions, see :func:`max_positions`."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or asked
    room = max_positions(config) or asked
    if room >= min(asked, positions):
        return []
    return [
        f"texts end at {room} tokens, not at --max_length {asked}: a longer one would change how {name} reads those "
        "beside it (longrope)"
    ]


def dropout_fields(config: PretrainedConfig) -> dict[str, float]:
    """The dropout probabilities of what reads texts, by name (OPT's default is 0.1 for ``dropout``)."""
    values = vars(config.get_text_config()).items()
    return {name: value for name, value in values if "drop" in name and isinstance(value, int | float)}


def load_tokenizer(
    name_or_path: str, source: Source, flag: str = "--tokenizer_name", config: PretrainedConfig | None = None
) -> Any:
    """The tokenizer; one without an EOS token is refused, since an answer's end would be unknown.

    ``config``: of the model that reads what it makes. EOS stands in for a pad token that this model lacks. The revision
    is the model's: a tokenizer from elsewhere is that of "main".
    """
    of_model = name_or_path == source.name_or_path
    arguments = (source if of_model else replace(source, revision=None)).hub_arguments
    folder = Path(name_or_path)
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if alone and importlib.util.find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise UserError(f"{flag} {name_or_path}: its tokenizer is a SentencePiece file: pip install sentencepiece")
    with _one_line(f"{flag} {name_or_path}: no tokenizer there"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **arguments)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what a folder without its files gives
        raise UserError(f"{flag} {name_or_path}: no tokenizer there (its vocabulary is empty)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name_or_path}: the tokenizer has no EOS token, so answers would never end")
    if config is not None:
        fit_pad(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def fit_pad(tokenizer: Any, rows: int) -> None:
    """EOS in place of a pad token beyond an embedding of ``rows`` rows: pads are masked, but they are looked up."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        logger.warning(
            "the pad token %s (id %d) lies beyond the model's %d tokens, so %s pads texts (pads are masked)",
            tokenizer.pad_token, tokenizer.pad_token_id, rows, tokenizer.eos_token,
        )  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token


def check_ids(ids: Iterable[int], tokenizer: Any, rows: int, source: Source) -> None:
    """Raises UserError for a token that an embedding of ``rows`` rows lacks."""
    largest = max(ids, default=-1)
    if largest >= rows:
        raise UserError(
            f"{source.flag} {source.name_or_path} has {rows} tokens, and {tokenizer.convert_ids_to_tokens(largest)!r} "
            f"in the texts is number {largest} of the tokenizer's: use the model's own tokenizer, take the token out "
            "of the texts, or resize the model (resize_token_embeddings)"
        )


def refuse_unknown_ids(model: Any, tokenizer: Any, source: Source) -> None:
    """Makes ``model`` refuse, as :func:`check_ids` does, what a tokenizer of more tokens may give it to read.

    A tokenizer that has no such token costs nothing.
    """
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None or max(tokenizer.get_vocab().values()) < rows:
        return

    def check(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        check_ids((int(ids.max()) for ids in inputs if ids.numel()), tokenizer, rows, source)

    embedding.register_forward_pre_hook(check)


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills rows; it is masked everywhere, so EOS serves where there is no pad token (GPT-Neo)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    dropout: float = 0.0,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    four_bits: bool = False,
    zero3: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Any:
    """A transformers causal LM in training mode, audited.

    Args:
        attention: "auto", "sdpa", "eager", or one of :data:`wpn_ds.models.attention.KERNELS`.
        four_bits: the linear layers but the head in NF4 with scales that are quantised as well (QLoRA), by
            bitsandbytes; they compute in ``dtype``.
        zero3: a DeepSpeed configuration of stage 3 without batch sizes: the weights are then partitioned as they are
            read, and no rank ever holds the whole model.
        tokenizer: whose ids it reads; those that it lacks are then refused when they come.

    Raises:
        UserError: the model is missing, isn't a causal LM, doesn't support ``attention``, or its weights and its
            architecture disagree.
    """
    config = load_config(source, dropout=dropout)
    where = f"{source.flag} {source.name_or_path}"
    if Path(source.name_or_path).is_dir() and (reason := fault(Path(source.name_or_path))):
        raise UserError(f"{where}: {reason}")
    quantised = quantisation(config) is not None
    if not quantised:
        with _one_line(f"{where}: the model can't be loaded", RuntimeError, UnpicklingError):
            files = weight_files(source.name_or_path, config, source.revision or "main")
            report = compare(config, files, where, source.trust_remote_code)
        audit(report, source)
        if zero3 is not None and report["mismatched_keys"]:
            raise UserError(f"{where}: under ZeRO stage 3 weights of another shape can't be made up: pass another JSON")
    partition_on_load = None
    if zero3 is not None:
        from transformers.integrations import HfDeepSpeedConfig  # loads deepspeed, which a plain load can do without

        # from_pretrained partitions while this object is alive; a leftover one would partition later plain loads too.
        partition_on_load = HfDeepSpeedConfig(dict(zero3))
    arguments = source.hub_arguments
    if four_bits:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    loaded: Any = None
    with _one_line(f"{where}: the model can't be loaded"):
        loaded = AutoModelForCausalLM.from_pretrained(
            source.name_or_path,
            config=config,
            dtype=dtype,  # transformers would load OPT as fp16, which overflows in training
            attn_implementation=_attention(config, attention),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the audit refuses them, in one line
            **arguments,
        )
    del partition_on_load
    if zero3 is not None:
        gc.collect()  # a partitioned weight refers to itself: the head that tying has replaced would stay for a while
    model, info = loaded
    if quantised:
        audit(info, source)
    if four_bits:  # on a CPU, evaluating would otherwise pack the weights anew, with scales rounded to bfloat16
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if names := not_finite(model):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"{where}: NaN or infinity in {len(names)} of its weights ({', '.join(names[:3])}{more}): the model is "
            "broken, take another"
        )
    model.train()
    if gradient_checkpointing:
        checkpoint_activations(model)
    if tokenizer is not None:
        refuse_unknown_ids(model, tokenizer, source)
    return model


def checkpoint_activations(model: Any) -> None:
    """Recompute a layer's activations in the backward pass. Non-reentrant: the reentrant kind runs the head's chunks
    twice under ZeRO-3, which asserts."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def decoder_layers(lm: Any) -> Any:
    """The layers of a causal language model, of whichever family, with its head or without.

    Raises:
        UserError: nothing in it is a list of as many as its configuration says.
    """
    body, depth = lm.base_model, lm.config.get_text_config().num_hidden_layers
    lists = (module for module in body.modules() if isinstance(module, torch.nn.ModuleList))
    found = next((layers for layers in lists if len(layers) == depth), None)
    if found is None:
        raise UserError(f"{type(lm).__name__} has no list of its {depth} layers, so they can't be told from the rest")
    return found


def quantisation(config: PretrainedConfig) -> str | None:
    """How the files' weights are quantised; None if they are not."""
    how = getattr(config, "quantization_config", None)
    return None if how is None else str(how.get("quant_method", how) if isinstance(how, Mapping) else how.quant_method)


def audit(info: Mapping[str, Any], source: Source) -> None:
    """Refuse a load that left weights out or made them up; say so if ``--allow_key_mismatch`` was given."""
    problems = []
    for kind, meaning in (
        ("missing_keys", "not in the files, so newly initialised"),
        ("mismatched_keys", "of another shape, so newly initialised"),
        ("unexpected_keys", "in the files but not in the model"),
    ):
        named = (str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        keys = sorted(key for key in named if not (kind == "unexpected_keys" and _LEFTOVERS.search(key)))
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            problems.append(f"{len(keys)} weights {meaning}: {', '.join(keys[:5])}{more}")
    if info.get("error_msgs"):
        problems.append("; ".join(info["error_msgs"]))
    if not problems:
        return
    message = f"{source.flag} {source.name_or_path}: {'; '.join(problems)}"
    if not source.allow_key_mismatch:
        way_out = ", or pass --allow_key_mismatch if this is meant" if source.flag == Source.flag else ""
        raise UserError(f"{message}. Check the folder{way_out}")
    logger.warning("%s (allowed by --allow_key_mismatch)", message)


def not_finite(model: Any) -> list[str]:
    """The parameters that hold NaN or infinity, the same on all ranks; of partitioned ones each reads its own part."""
    own, shared = [], False
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if hasattr(parameter, "ds_tensor"):
            shared = True
            if parameter.ds_tensor.status.name == "NOT_AVAILABLE":  # on NVMe
                continue
            # The last rank's part ends in padding that nobody has written.
            part = parameter.ds_tensor.flatten()
            start = dist.get_rank(parameter.ds_process_group) * part.numel()
            values = part[: max(0, parameter.ds_numel - start)]
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            own.append(name)
    if shared:
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, own)
        found = {name for part in parts for name in part}
        own = [name for name, _ in model.named_parameters() if name in found]
    return own


def tokenizer_doubt(tokenizer: Any, source: Source, config: PretrainedConfig) -> str:
    """Why ``tokenizer`` may be another model's, in a line; "" if nothing speaks for it.

    Ids that fit into the model's vocabulary still mean nothing to it if they stand for other texts.
    """
    own, name = tokenizer, source.name_or_path
    if tokenizer.name_or_path != name:
        with contextlib.suppress(UserError):  # a model without one says nothing
            own = load_tokenizer(name, source)
    if any(own(text)["input_ids"] != tokenizer(text)["input_ids"] for text in _PROBES):
        return (
            f"--tokenizer_name {tokenizer.name_or_path} reads texts as other ids than {name}'s own tokenizer, by which "
            "the model learnt to read: leave it out unless that is meant"
        )
    for kind in ("bos", "eos"):
        id_, wanted = getattr(tokenizer, f"{kind}_token_id", None), getattr(config, f"{kind}_token_id", None)
        known = wanted if isinstance(wanted, list) else [wanted]
        if id_ is not None and wanted is not None and id_ not in known:
            return (
                f"the tokenizer's {kind.upper()} is id {id_}, and {name}'s configuration has {wanted}: is it another "
                "model's tokenizer?"
            )
    return ""


def default_attention(config: PretrainedConfig) -> str:
    """The model's own attention: SDPA where it gives all that the family asks for, else eager (GPT-Neo)."""
    return "sdpa" if _has_sdpa(config) else "eager"


def _attention(config: PretrainedConfig, wanted: str) -> str:
    if wanted in KERNELS:
        return wanted
    if wanted == "sdpa" and not _has_sdpa(config):
        raise UserError(f"--attention sdpa: {config.model_type} has no SDPA attention; use --attention eager")
    return default_attention(config) if wanted == "auto" else wanted


def _has_sdpa(config: PretrainedConfig) -> bool:
    """Whether the family has it, and no soft cap on scores, which SDPA leaves out: transformers says so only since
    5.21."""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return bool(getattr(cls, "_supports_sdpa", False)) and not capped


def accepts_packing(model: Any) -> bool:
    """Whether the backbone takes the position ids that packed rows need."""
    return "position_ids" in inspect.signature(model.base_model.forward).parameters


def _on_the_hub(name: str) -> str:
    """What there is to say of a name that may be one on the hub: the nearest of those that are on this machine."""
    cached = [path.name.removeprefix("models--").replace("--", "/") for path in Path(HF_HUB_CACHE).glob("models--*")]
    return f", and no such model on the hub or in its cache here{nearest(name, cached)}"


@contextlib.contextmanager
def _one_line(what: str, *also: type[Exception]) -> Iterator[None]:
    """A library's failure as one line that names the flag."""
    expected: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, ImportError, SafetensorError, *also)
    try:
        yield
    except expected as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} ({first})") from error
