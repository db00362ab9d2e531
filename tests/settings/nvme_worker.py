"""One rank: a few steps of a small model under a JSON of ours."""

from __future__ import annotations

import deepspeed
import torch

from wpn_ds.jobs.distributed import init
from wpn_ds.settings.deepspeed import resolve_deepspeed
from wpn_ds.settings.run import Config


def losses(path: str) -> list[float]:
    """Of three steps, with no parameter left in memory where ``path`` offloads them."""
    init(timeout_minutes=2)
    torch.manual_seed(0)
    config = Config.from_flat({"bf16": True}, explicit={})
    ds = resolve_deepspeed(path, config, world_size=1, hidden_size=1024, device="cpu").json
    ds["zero_optimization"].get("offload_param", {})["max_in_cpu"] = 0
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(3)))
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=list(model.parameters()))
    found = []
    for _ in range(3):
        loss = engine(torch.ones(1, 1024, dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found
