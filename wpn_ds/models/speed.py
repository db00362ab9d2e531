"""How fast a device multiplies matrices."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch

logger = logging.getLogger(__name__)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of a square matrix product on this device, the best of a tenth of a second, and of four.

    Of random numbers: equal ones cost a GPU less power, which lets it run faster than on any real matrix.
    """
    n = 512 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # of its own: a resumed run has its own stream
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < 0.1:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


@cache
def faster_in_bf16(device: torch.device) -> bool:
    """Whether it multiplies matrices faster in bfloat16 than in fp32."""
    return measure_peak_flops(device, torch.bfloat16) > measure_peak_flops(device, torch.float32)


def warn_of_slow_bf16(device: torch.device, dtype: torch.dtype) -> None:
    """Say so where a model in bfloat16 takes a hundred times as long as in fp32: on a CPU without its instructions."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not faster_in_bf16(device):
        logger.warning("this CPU has no instructions for bfloat16 and is far slower in it than in fp32: --bf16 false")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
