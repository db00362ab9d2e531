"""Which rank keeps the others waiting.

By the clock a step takes all ranks the same time, since they wait for each other. So each rank measures what it
computes by itself: the forward passes of its decoder layers, within which nobody waits for anybody.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

#: A rank that takes so many times the median's time, in each of so many windows between two lines of metrics, is named.
SLOW, LASTING = 1.5, 5


class OwnTime:
    """Seconds of this rank's forward passes of decoder layers while it is entered, by the device's own clock."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """``model``: in its engine already, whose hooks fetch weights, and wait, before those of this begin."""
        self._event = None if device.type == "cpu" else torch.get_device_module(device).Event
        self._entered = False
        self._begun: Any = None
        self._spans: deque[tuple[Any, Any]] = deque()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # what transformers makes its layers of
                for part in _without_waiting(module):
                    part.register_forward_pre_hook(self._begin)
                    part.register_forward_hook(self._end, prepend=True)

    def __enter__(self) -> None:
        self._entered = True

    def __exit__(self, *_: object) -> None:
        self._entered, self._begun = False, None

    def take(self) -> float:
        """Seconds since the last call; nobody waits for the device: what it is not done with counts in the next."""
        seconds = 0.0
        while self._spans and (self._event is None or self._spans[0][1].query()):
            begin, end = self._spans.popleft()
            seconds += end - begin if self._event is None else begin.elapsed_time(end) / 1000
        return seconds

    def _begin(self, *_: object) -> None:
        if self._entered:
            self._begun = self._now()

    def _end(self, *_: object) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


def _without_waiting(layer: nn.Module) -> list[nn.Module]:
    """The layer, or its innermost modules where ZeRO-3 fetches the weights of each when it begins."""
    partitioned = any(hasattr(weight, "ds_id") for weight in layer.parameters())
    if not partitioned or z3_leaf_module(layer):
        return [layer]
    return [module for module in layer.modules() if not any(module.children())]


@dataclass(frozen=True)
class Lap:
    """What a step of a window took each rank, in the order of the ranks: seconds of its own, and tokens it computed."""

    seconds: Sequence[float]
    tokens: Sequence[float]


def slowness(lap: Lap) -> list[float]:
    """How many times the median's time each rank takes. A rank with more tokens may take longer in proportion; one with
    fewer is not called slow for that, since much of a small batch's time doesn't come of its tokens."""
    usual, load = statistics.median_low(lap.seconds), statistics.median_low(lap.tokens)
    return [own / usual / max(1.0, n / load) for own, n in zip(lap.seconds, lap.tokens, strict=True)]


class Stragglers:
    """Which ranks are slow for long."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts``: the ranks' nodes."""
        self._hosts = hosts
        self._laps: deque[Lap] = deque(maxlen=LASTING)

    def add(self, lap: Lap) -> tuple[int, str] | None:
        """The rank that is slowest, and a line that names it; None while no rank is slow for long."""
        if not all(lap.seconds) or not all(lap.tokens):  # a device is not done with any of it
            return None
        self._laps.append(lap)
        if len(self._laps) < LASTING:
            return None
        each = [slowness(lap) for lap in self._laps]
        slow = [rank for rank in range(len(self._hosts)) if all(times[rank] > SLOW for times in each)]
        if not slow:
            return None
        means = {rank: statistics.mean(times[rank] for times in each) for rank in slow}
        slowest = max(slow, key=means.__getitem__)
        usual = statistics.mean(statistics.median_low(lap.seconds) for lap in self._laps)
        others = f"; other slow ranks: {len(slow) - 1}" if len(slow) > 1 else ""
        return slowest, (
            f"rank {slowest} ({self._hosts[slowest]}) takes {means[slowest]:.1f} times the median's {usual:.2g} s a "
            f"step in the layers' forward passes{others}"
        )
