"""What a model's files hold, held against its architecture before a weight is read.

Under ZeRO-3 transformers (read in 5.23.0) decides this by weights that are partitioned, which look empty: a head of its
own is tied to the embedding, since the two seem equal, and neither weights that the model lacks nor weights of another
shape are reported (the latter on rank 0 alone). So every load, partitioned or not, is decided by the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from wpn_ds.errors import UserError


def weight_files(name_or_path: str, config: PretrainedConfig, revision: str) -> list[str]:
    """The files with the weights of a model in a folder or on the hub, in transformers' own order of preference.

    Raises:
        OSError: there are none.
    """
    usual = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    named = getattr(config, "transformers_weights", None)
    for name in (named,) if named else usual:
        found = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            if not name.endswith(".index.json"):
                return [found]
            return get_checkpoint_shard_files(name_or_path, found, revision=revision)[0]
    raise OSError(f"there is no {named or SAFE_WEIGHTS_NAME}")


def compare(config: PretrainedConfig, files: Sequence[str], flag: str, trust_remote_code: bool) -> Mapping[str, Any]:
    """``from_pretrained``'s report on missing, unexpected and mismatched keys, from the names and shapes in ``files``.

    Where the files have an output layer of its own, ``config`` no longer ties it to the embedding.

    Raises:
        UserError: the files have other weights apart that the model has as one.
    """
    shapes: dict[str, Tensor] = {}
    held: dict[str, str] = {}
    for path in files:
        there = load_state_dict(path, map_location="meta")
        shapes |= there
        held |= dict.fromkeys(there, path)
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    text = config.get_text_config()
    own = text if architecture.config_class is type(text) else config  # of several parts, only the text's is loaded
    model, report = _dry_run(architecture, own, shapes)
    if _apart(model, own, shapes, held):
        config.tie_word_embeddings = text.tie_word_embeddings = False
        model, report = _dry_run(architecture, own, shapes)
        for one, other in _apart(model, own, shapes, held):
            raise UserError(
                f"{flag}: {one} and {other} are one weight in the model, but the files have two that differ"
            )
    return report


def _dry_run(architecture: Any, config: PretrainedConfig, shapes: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """(model, report) of a load on the meta device, which reads and holds nothing."""
    with _silence():
        return architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(shapes),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )


def _apart(
    model: Any, config: PretrainedConfig, shapes: Mapping[str, Tensor], held: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Pairs of weights that ``config`` ties, of which the files have both, with different values.

    ``model`` comes of a dry run, which ties only where one of the two is not in the files.
    """
    tied = model.all_tied_weights_keys.items()
    pairs = [(one, other) for one, other in tied if model.get_parameter(one) is not model.get_parameter(other)]
    if not pairs:
        return []
    names = _names_in_files(model, config, shapes, {name for pair in pairs for name in pair})
    known = [pair for pair in pairs if names.keys() >= set(pair)]
    return [pair for pair in known if not torch.equal(*(_read(names[name], held) for name in pair))]


def _names_in_files(
    model: Any, config: PretrainedConfig, shapes: Mapping[str, Tensor], parameters: set[str]
) -> dict[str, str]:
    """What the files call ``parameters``: a dry run reports each under an impossible shape that tells them."""
    wanted = {model.get_parameter(name).shape for name in parameters}
    candidates = [name for name, tensor in shapes.items() if tensor.shape in wanted]
    marked = {name: torch.empty(1, 1, number, device="meta") for number, name in enumerate(candidates)}
    _, report = _dry_run(type(model), config, {**shapes, **marked})
    return {
        name: candidates[shape[2]]
        for name, shape, _ in report["mismatched_keys"]
        if name in parameters and len(shape) == 3
    }


def _read(name: str, held: Mapping[str, str]) -> Tensor:
    return load_state_dict(held[name])[name]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What a dry run has to say is said by the audit."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
