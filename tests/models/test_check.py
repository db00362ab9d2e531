"""Packed rows read exactly as single sequences, for every family that claims it; others are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Lfm2Config,
    MistralConfig,
    Phi3Config,
)

from tests.data.made import FORMS
from tests.models.families import CONFIGS, LLAMA, POSITIONS, WINDOW, make
from wpn_ds.data.layout import Layout
from wpn_ds.errors import UserError
from wpn_ds.losses.likelihood import UNFINISHED
from wpn_ds.models import attention, packed
from wpn_ds.models.attention import KERNELS, per_segment_sdpa
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.load import max_positions
from wpn_ds.models.packed import PackedLM

CPU = torch.device("cpu")
NO_SDPA = ("gpt_neo", "gemma2", "gpt_oss")
WINDOWED = ("mistral", "gemma2", "gpt_oss", "cohere2")
DENSE = [(family, name) for family in CONFIGS for name in ("eager", "sdpa") if name == "eager" or family not in NO_SDPA]


def run_check(lm, form: str, row_length: int = POSITIONS) -> None:
    layout = Layout(row_length, 10_000, world_size=1, **FORMS[form])
    model = PackedLM(lm, packed=layout.packed).train()
    check_exact_reading(model, model, CPU, layout)
    assert model.training, "the mode is as it was"


@pytest.mark.parametrize("form", ["padded", "rows"])
@pytest.mark.parametrize(("family", "attention"), DENSE)
def test_rows_under_a_dense_mask_give_what_single_sequences_give(family, attention, form) -> None:
    config, row_length = CONFIGS[family], POSITIONS
    if family in WINDOWED and form == "rows":  # the dense mask in a row has no window
        config, row_length = type(config)(**config.to_dict() | {"sliding_window": 16}), 16
    run_check(make(config, attention), form, row_length)


@pytest.mark.parametrize("form", ["flat", "shared"])
@pytest.mark.parametrize("family", CONFIGS)
def test_flat_rows_give_what_single_sequences_give(family, form) -> None:
    run_check(make(CONFIGS[family], "wpn_packed"), form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_the_mask_is_refused_with_the_flag_that_helps(dtype) -> None:
    lm = make(CONFIGS["opt"], "eager", dtype)
    run_check(lm, "rows")
    plain = lm.model.decoder.forward
    lm.model.decoder.forward = lambda *args, attention_mask=None, **rest: plain(*args, **rest)
    with pytest.raises(UserError, match=r"packed rows differ .* --packing false"):
        run_check(lm, "rows")


def reads_the_whole_row(query, key, value, pieces, *rest):
    return per_segment_sdpa(query, key, value, ((0, pieces[-1][1], 0, 0),), *rest)


def forgets_the_prompt(query, key, value, pieces, *rest):
    return per_segment_sdpa(query, key, value, tuple((start, stop, start, start) for start, stop, *_ in pieces), *rest)


def forgets_the_window(query, key, value, pieces, scale, window, *rest):
    return per_segment_sdpa(query, key, value, pieces, scale, None, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "form", "kernel"),
    [
        ("opt", "flat", reads_the_whole_row),
        ("gpt_neo", "shared", reads_the_whole_row),
        ("llama", "shared", forgets_the_prompt),
        ("gpt_neo", "flat", forgets_the_window),
        ("mistral", "shared", forgets_the_window),
    ],
)
def test_a_kernel_that_leaks_or_forgets_is_refused(monkeypatch, family, form, kernel, dtype) -> None:
    lm = make(CONFIGS[family], "wpn_packed", dtype)
    run_check(lm, form)
    monkeypatch.setitem(KERNELS, "wpn_packed", kernel)
    with pytest.raises(UserError, match=r"packed rows differ .* --packing false"):
        run_check(lm, form)


def test_the_check_reaches_beyond_a_window_that_is_longer_than_its_other_texts(monkeypatch) -> None:
    lm = make(MistralConfig(**LLAMA, sliding_window=40), "wpn_packed")
    monkeypatch.setitem(KERNELS, "wpn_packed", forgets_the_window)
    with pytest.raises(UserError, match="packed rows differ"):
        run_check(lm, "flat")
    run_check(lm, "flat", row_length=40)  # no text there will reach so far


@pytest.mark.parametrize(("form", "attention"), [("flat", "wpn_packed"), ("padded", "eager")])
def test_a_model_that_reads_nan_by_itself_is_not_told_to_pad(form, attention) -> None:
    lm = make(CONFIGS["opt"], attention)
    with torch.no_grad():
        lm.model.decoder.layers[0].fc2.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"reads a text alone as NaN or infinity, packed or not: .* for float32$"):
        run_check(lm, form)


def test_a_model_whose_rows_become_nan_is_refused() -> None:
    model = PackedLM(make(CONFIGS["opt"], "wpn_packed"), packed=True)

    def broken(batch):
        reading = model(batch)
        return reading._replace(hidden=reading.hidden * float("nan"))

    with pytest.raises(UserError, match="packed rows differ"):
        check_exact_reading(model, broken, CPU, Layout(POSITIONS, 10_000, world_size=1, **FORMS["flat"]))


def test_a_sliding_window_shorter_than_a_row_under_a_dense_mask_is_refused() -> None:
    lm = make(CONFIGS["mistral"], "eager")
    with pytest.raises(UserError, match=rf"within {WINDOW} tokens only.*--packing false, or --max_length {WINDOW}"):
        run_check(lm, "rows")


def test_a_model_without_position_ids_is_refused_with_the_flag_and_works_unpacked() -> None:
    lm = make(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "eager")
    with pytest.raises(UserError, match="--packing false"):
        run_check(lm, "rows")
    run_check(lm, "padded")


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("family", ["gemma2", "cohere2", "granite"])
def test_a_model_whose_logits_are_more_than_we_take_them_for_is_refused(monkeypatch, family, form) -> None:
    config = CONFIGS[family]
    if family == "gemma2":  # far above what random weights give
        config = Gemma2Config(**config.to_dict() | {"final_logit_softcapping": 30.0})
    lm = make(config, "wpn_packed" if form == "flat" else "eager")
    monkeypatch.setattr(packed, "finish_of", lambda config: UNFINISHED)
    with pytest.raises(UserError, match="differ from single sequences"):
        run_check(lm, form)


def has_no_gpu(*_):
    raise RuntimeError("no such device\nand more")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_the_check_reads_alone_by_the_model_s_own_attention(monkeypatch, family) -> None:
    lm = make(CONFIGS[family], "wpn_packed")
    monkeypatch.setattr(attention, "Extras", lambda *_: attention.NOTHING)  # ours ignores them in rows and alone
    with pytest.raises(UserError, match=r"packed rows differ .* --packing false"):
        run_check(lm, "flat")
    assert lm.config._attn_implementation == "wpn_packed", "and goes back to ours"


def test_whatever_fails_while_a_row_is_read_is_a_refusal_in_one_line(monkeypatch) -> None:
    monkeypatch.setitem(KERNELS, "wpn_packed", has_no_gpu)
    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM: packed rows can't be read \(no such device\): pass --pack"
    ):
        run_check(make(CONFIGS["llama"], "wpn_packed"), "flat")


@pytest.mark.parametrize("form", ["flat", "padded"])
def test_a_text_beyond_the_border_of_a_rope_that_goes_by_length_is_tried(form) -> None:
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    config = Phi3Config(**LLAMA, rope_parameters=rope, original_max_position_embeddings=32)
    lm = make(config, "wpn_packed" if form == "flat" else "sdpa")
    with pytest.raises(UserError, match="rows differ from single sequences"):
        run_check(lm, form)
    run_check(lm, form, row_length=max_positions(config))


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        Gemma3TextConfig(**LLAMA, head_dim=8, use_bidirectional_attention=True),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_carries_more_than_causal_attention_from_text_to_text_is_not_packed(config) -> None:
    with pytest.raises(UserError, match=r"packed rows .*: pass --packing false"):
        run_check(make(config, "wpn_packed"), "flat")
    run_check(make(config, "sdpa"), "padded")


def test_a_model_with_a_vision_part_reads_texts() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=LLAMA | {"head_dim": 8}, vision_config=vision | {"image_size": 28})
    run_check(make(config, "wpn_packed"), "shared")
