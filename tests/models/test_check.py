"""Packed rows read exactly as single sequences, for every family that claims it; others are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, CohereConfig, MistralConfig

from tests.data.made import FORMS
from tests.models.families import CONFIGS, LLAMA, POSITIONS, WINDOW, make
from wpn_ds.data.plan import Layout
from wpn_ds.errors import UserError
from wpn_ds.models.attention import KERNELS, per_segment_sdpa
from wpn_ds.models.check import check_exact_reading
from wpn_ds.models.packed import PackedLM

CPU = torch.device("cpu")
DENSE = [(family, name) for family in CONFIGS for name in ("eager", "sdpa") if (family, name) != ("gpt_neo", "sdpa")]


def run_check(lm, form: str, row_length: int = POSITIONS) -> None:
    layout = Layout(row_length, 10_000, world_size=1, **FORMS[form])
    model = PackedLM(lm, packed=layout.packed).train()
    check_exact_reading(model, model, CPU, layout)
    assert model.training, "the mode is as it was"


@pytest.mark.parametrize("form", ["padded", "rows"])
@pytest.mark.parametrize(("family", "attention"), DENSE)
def test_rows_under_a_dense_mask_give_what_single_sequences_give(family, attention, form) -> None:
    config, row_length = CONFIGS[family], POSITIONS
    if family == "mistral" and form == "rows":  # its dense mask in a row has no window
        config, row_length = MistralConfig(**LLAMA, sliding_window=16), 16
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


def reads_the_whole_row(query, key, value, pieces, scale, window, dropout):
    return per_segment_sdpa(query, key, value, ((0, pieces[-1][1], 0, 0),), scale, window, dropout)


def forgets_the_prompt(query, key, value, pieces, *rest):
    return per_segment_sdpa(query, key, value, tuple((start, stop, start, start) for start, stop, *_ in pieces), *rest)


def forgets_the_window(query, key, value, pieces, scale, window, dropout):
    return per_segment_sdpa(query, key, value, pieces, scale, None, dropout)


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


def test_a_model_whose_logits_are_more_than_its_head_is_refused() -> None:
    lm = make(CohereConfig(**LLAMA, logit_scale=0.25), "eager")
    with pytest.raises(UserError, match="differ from single sequences"):
        run_check(lm, "padded")
