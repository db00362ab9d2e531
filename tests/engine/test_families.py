"""Promise 1 for the families of today: a step under ZeRO-3 on two ranks, packed with shared prompts, against fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.engine.gradient_cases import VOCABULARY, case, save_larger
from tests.engine.test_gradient import TOLERANCE, WORKER, compare
from tests.models.families import CONFIGS, LLAMA, WINDOW

_MOE = LLAMA | {"num_experts_per_tok": 2, "output_router_logits": False}
FAMILIES: dict[str, PretrainedConfig] = {
    **{name: config for name, config in CONFIGS.items() if name not in ("opt", "opt-350m", "gpt_neo")},
    "gemma3": Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=WINDOW),
    "phi3": Phi3Config(**LLAMA),
    "smollm3": SmolLM3Config(**LLAMA),
    "mixtral": MixtralConfig(**_MOE, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**_MOE, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "qwen3_moe": Qwen3MoeConfig(**_MOE, head_dim=8, num_experts=4, moe_intermediate_size=32),
}
"""Those of which test_gradient.py doesn't run the whole matrix."""

CASES = [case(targets="live", layout="shared"), case(layout="padded", several=False)]


def make_family(config: PretrainedConfig, folder: Path, seed: int) -> None:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0}
    own = type(config)(**config.to_dict() | special | {"vocab_size": VOCABULARY, "max_position_embeddings": 96})
    torch.manual_seed(seed)
    save_larger(AutoModelForCausalLM.from_config(own), folder)


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_equals_the_plain_gradient(pool, family, tmp_path):
    for name, seed in (("start", 1), ("reference", 2)):
        make_family(FAMILIES[family], tmp_path / name, seed)
    pool.call(2, WORKER, CASES, tmp_path, tmp_path)
    errors = [compare(tmp_path, tmp_path / f"{k}.safetensors", of) for k, of in enumerate(CASES)]
    print(family, [f"{error:.1e}" for error in errors])
    assert max(errors) <= TOLERANCE
