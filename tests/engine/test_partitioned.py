"""A model that is partitioned while it is loaded is the one that a plain load gives, up to its export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.test_files import HEAD, TIED, head_apart, tied_model
from wpn_ds.engine.export import export
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.models.load import Source, load_model
from wpn_ds.models.packed import PackedLM

STAGE_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
IDS = torch.tensor([[2, 40, 50, 60, 3]])


def load(folder: Path, stage: int, **options: Any) -> Any:
    source = Source(str(folder), **options)
    return load_model(source, dtype=torch.float32, zero3=STAGE_3 if stage == 3 else None)


def size(lm: Any) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in lm.parameters())


def exported(lm: Any, folder: Path, world: World) -> Any:
    """What plain transformers makes of the export of ``lm``, whose head is moved as training would."""
    PackedLM(lm, packed=True)  # as training has it
    head = lm.get_output_embeddings().weight
    with GatheredParameters([head], modifier_rank=0, enabled=hasattr(head, "ds_id")), torch.no_grad():
        head.mul_(2)
    folder.mkdir()
    export(lm, SimpleNamespace(save_pretrained=lambda path: None), folder, world, {})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", TIED)
def test_a_head_that_the_files_have_apart_is_trained_and_exported_under_every_stage(
    tmp_path, world, family, stage
) -> None:
    head_apart(tmp_path / "start", family)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32).eval()
    assert start.lm_head.weight is not start.get_input_embeddings().weight
    lm = load(tmp_path / "start", stage)
    assert size(lm) == sum(parameter.numel() for parameter in start.parameters())
    again = exported(lm, tmp_path / "out", world)
    assert again.config.tie_word_embeddings is False
    assert torch.allclose(again(IDS).logits, 2 * start(IDS).logits, rtol=1e-6)
    assert torch.equal(again.get_input_embeddings().weight, start.get_input_embeddings().weight), "not doubled"


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_head_that_is_the_embedding_stays_tied_under_every_stage(tmp_path, world, stage, in_file) -> None:
    if in_file:
        head_apart(tmp_path / "start", head=lambda embedding: embedding)
    else:
        tied_model(tmp_path / "start")
    lm = load(tmp_path / "start", stage)
    assert lm.lm_head.weight is lm.get_input_embeddings().weight
    again = exported(lm, tmp_path / "out", world)
    assert again.config.tie_word_embeddings is True and HEAD not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update(extra=torch.zeros(3)), "1 weights in the files but not in the model: extra"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), "1 weights of another shape.*: model.norm.weight"),
        (lambda w: w.pop("model.norm.weight"), "1 weights not in the files.*: model.norm.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_the_same_line_under_every_stage(tmp_path, world, change, said) -> None:
    weights = tied_model(tmp_path)
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lines = set()
    for stage in (0, 3):
        with pytest.raises(UserError, match=f"^--model_name_or_path .*{said}.*--allow_key_mismatch") as caught:
            load(tmp_path, stage)
        lines.add(str(caught.value))
    assert len(lines) == 1
    load(tmp_path, 0, allow_key_mismatch=True)
    if "another shape" in said:
        with pytest.raises(UserError, match="under ZeRO stage 3 weights of another shape can't be made up"):
            load(tmp_path, 3, allow_key_mismatch=True)
    else:
        load(tmp_path, 3, allow_key_mismatch=True)
