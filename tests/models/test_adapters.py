"""A model with adapters: without them it is its base, with them merged a plain model, and PEFT reads their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.gradient_cases import adapt
from tests.models.families import CONFIGS, make, plain_attention
from wpn_ds.errors import UserError
from wpn_ds.models import adapters
from wpn_ds.settings.lora import LoraConfig

IDS = torch.tensor([[5, 9, 33, 12, 7, 8, 21, 40]])


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Leaves nothing."""


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    return lm.eval()(IDS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_without_adapters_it_is_the_base_and_merged_a_plain_model(family, tmp_path):
    lm = make(CONFIGS[family], plain_attention(family))
    base = logits(lm)
    lm.save_pretrained(tmp_path / "base")
    names = {name for name, _ in lm.named_parameters()}
    adapt(lm, rank=4)
    adapted = logits(lm)
    assert (adapted - base).abs().max() > 1e-3, "the adapters change what it says"
    with adapters.off(lm):
        assert torch.equal(logits(lm), base)
    assert torch.equal(logits(lm), adapted)
    assert all(p.requires_grad == (".lora_" in name) for name, p in lm.named_parameters())

    whole = adapters.merged(lm, {name: p.detach() for name, p in lm.named_parameters()})
    assert whole.keys() == names and {w.dtype for w in whole.values()} == {torch.float32}
    adapters.plain(lm).save_pretrained(tmp_path / "merged", state_dict=whole)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation=plain_attention(family))
    assert type(merged) is type(lm) and torch.allclose(logits(merged), adapted, atol=1e-4)

    trained = {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad}
    adapters.write(lm, trained, NoTokenizer(), str(tmp_path / "base"), None, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation=plain_attention(family))
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))), adapted, atol=1e-4)


def test_new_adapters_add_nothing_and_all_draw_the_same():
    one, other = (make(CONFIGS["opt"], "sdpa") for _ in range(2))
    base, state = logits(one), torch.get_rng_state()
    for lm in (one, other):
        adapters.attach(lm, LoraConfig(lora_r=2), seed=7)
        torch.manual_seed(torch.seed())
    torch.set_rng_state(state)
    assert torch.equal(logits(one), base)
    assert {name.split(".")[-4] for name, p in one.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    for (name, ours), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_adapters_of_a_bfloat16_model_are_merged_in_fp32():
    """An update that is too small for the base's rounding stays."""
    lm = make(CONFIGS["llama"], "sdpa", torch.bfloat16)
    adapt(lm, rank=4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(1e-4)
    weights = {name: p.detach() for name, p in lm.named_parameters()}
    name = "model.layers.0.mlp.up_proj"
    update = adapters.merged(lm, weights)[f"{name}.weight"] - weights[f"{name}.base_layer.weight"].float()
    a, b = (weights[f"{name}.lora_{kind}.default.weight"].float() for kind in "AB")
    assert update.abs().max() > 0 and torch.allclose(update, 2 * b @ a, atol=1e-7)
    rounded = (weights[f"{name}.base_layer.weight"].float() + update).bfloat16()
    assert (rounded == weights[f"{name}.base_layer.weight"]).float().mean() > 0.9


def test_a_name_that_no_layer_has_is_one_line():
    with pytest.raises(UserError, match=r"--lora_target wrong: Target modules .*not found") as refused:
        adapters.attach(make(CONFIGS["opt"], "sdpa"), LoraConfig(lora_r=2, lora_target=["wrong"]), seed=0)
    assert "\n" not in str(refused.value)
