"""Number formats against their own libraries, and what must hold of each."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MixtralConfig

from tests.models.families import CONFIGS, make
from wpn_ds.errors import UserError
from wpn_ds.models.rounding import FORMATS, matrices, round_model, unmoved

MIXTRAL = MixtralConfig(
    vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def weights(rows: int = 24, columns: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_each_weight_gets_the_nearest_of_its_group_s_values(how) -> None:
    given = weights()
    codes, scale, offset = how.encode(given)
    levels = torch.tensor(how.levels)
    values = levels * scale + offset  # [rows, groups, levels]
    groups = how._grouped(given)
    distance = (groups.unsqueeze(-1) - values.unsqueeze(-2)).abs()
    own = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(own, distance.amin(-1), atol=1e-7)
    assert how.rounded(given).shape == given.shape and codes.max() < len(levels)


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_zero_stays_zero_and_a_group_of_zeros_has_no_nan(how) -> None:
    given = weights()
    given[:, ::3] = 0
    given[0] = 0
    rounded = how.rounded(given)
    assert torch.equal(rounded[0], given[0]) and bool(torch.isfinite(rounded).all())
    assert (rounded[given == 0] == 0).all()


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    given = weights(32, 256)
    coded, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4", compress_statistics=False)
    expected = functional.dequantize_4bit(coded, state)
    assert torch.allclose(FORMATS["nf4-64"].rounded(given), expected, atol=1e-6)


def test_q4_0_is_that_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    given, kind = weights(32, 256), gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(given.numpy(), kind), kind)
    assert torch.equal(FORMATS["q4_0"].rounded(given), torch.from_numpy(expected))


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_rounded_away_no_weight_lies_nearer_to_where_it_came_from(how) -> None:
    start = weights()
    given = start + weights(seed=1) * 0.01 * (weights(seed=2) > 0)
    rounded = how.rounded(given, away_from=start)
    codes, scale, _ = how.encode(given)
    edge = (codes == 0) | (codes == len(how.levels) - 1)  # beyond them there is no code
    inner = ~edge.flatten(1)[:, : given.shape[1]] & (given != start)
    assert inner.sum() > 1000
    tolerance = 1e-3 * scale.abs().max() if how.stored is torch.float16 else 1e-6
    assert (((rounded - given) * (given - start).sign())[inner] >= -tolerance).all()
    assert torch.equal(rounded[given == start], how.rounded(given)[given == start])


@pytest.mark.parametrize("family", ["opt", "gpt_neo", "llama", "gpt2", "mixtral"])
def test_a_model_s_layers_are_rounded_and_what_unlearning_moved_is_counted(family) -> None:
    lm = make(MIXTRAL if family == "mixtral" else CONFIGS[family], "eager")
    nudged, rounded, how = copy.deepcopy(lm), copy.deepcopy(lm), FORMATS["int4-128"]  # which divides no row here
    assert unmoved(lm, nudged, how) == (0, 0)
    count = 0
    for _, weights in matrices(nudged):
        weights[1::2] *= 1.5  # every code stays, and its scale moves
        count += weights[1::2].numel()
    moved, kept = unmoved(lm, nudged, how)
    assert (moved, kept) == (count, count)
    round_model(rounded, how)
    before, after = (dict(one.named_parameters()) for one in (lm, rounded))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inner = {name for name, weight in before.items() if ".0." in name or ".1." in name if weight.dim() > 1}
    assert changed == inner and not any(part in name for name in changed for part in ("embed", "lm_head", "wte"))


def test_two_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="no two states of one model"):
        unmoved(make(CONFIGS["opt"], "eager"), make(CONFIGS["llama"], "eager"), FORMATS["int8"])
