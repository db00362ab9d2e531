"""What is said of a device's speed."""

from __future__ import annotations

import pytest
import torch

from wpn_ds.models import speed

CPU = torch.device("cpu")


def test_the_measured_peak_is_a_rate_of_this_machine():
    assert 1e9 < speed.measure_peak_flops(CPU, torch.float32) < 1e14


@pytest.mark.parametrize(
    "rate, dtype, said", [(1e9, torch.bfloat16, 1), (1e9, torch.float32, 0), (4e12, torch.bfloat16, 0)]
)
def test_bfloat16_that_is_slower_than_fp32_is_said(monkeypatch, caplog, rate, dtype, said):
    rates = {torch.bfloat16: rate, torch.float32: 1e11}
    monkeypatch.setattr(speed, "measure_peak_flops", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(speed, "faster_in_bf16", speed.faster_in_bf16.__wrapped__)  # without what it remembers
    speed.warn_of_slow_bf16(CPU, dtype)
    assert len(caplog.records) == said
