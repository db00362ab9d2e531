"""One rank: relearning of models whose weights the ranks share, and of such that it has alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_hook

from wpn_ds.engine import copies
from wpn_ds.engine.step import Step
from wpn_ds.evaluate import relearning
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.model import AskedModel
from wpn_ds.evaluate.ranks import join_ranks
from wpn_ds.evaluate.relearning import Lessons, Relearning
from wpn_ds.jobs import partitioned
from wpn_ds.jobs.distributed import sum_over_ranks
from wpn_ds.models.load import Source


class Case(NamedTuple):
    """A model, by its folder, and what it is taught."""

    folder: Path
    lessons: Lessons
    bf16: bool = False


def shared(cases: Sequence[Case], asking: Asking) -> list[dict[str, Any]]:
    """:func:`relearned` of each case on shared weights, none of which is whole for longer than a module needs it,
    however small the model is."""
    join_ranks(shared=True)
    with mock.patch.dict(partitioned.SHARDED, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0):
        return [relearned(case, asking, shared=True) for case in cases]


def relearned(case: Case, asking: Asking, shared: bool) -> dict[str, Any]:
    """What the model ``said``; the mean NLL before each update (``losses``); whether it is ``back`` as it was, and the
    learner ``gone``; the model's ``size``, and how much of the learner was a rank's ``own`` or for a while ``whole`` on
    it, in parameters."""
    asked = AskedModel(Source(str(case.folder)), bf16=case.bf16, shared=shared)
    model, tokenizer = asked.load()
    losses: list[float] = []
    step, token_losses, copy_of = Step.__call__, relearning.token_losses, copies._copy_of
    learners: list[Any] = []
    own, whole = [0], [0]

    def taken(self: Step, plan: Any) -> Any:
        result = step(self, plan)
        (name,) = result.sums.totals
        losses.append(sum_over_ranks(result.sums.totals, self.world.device)[name] / result.sums.counts[name])
        return result

    def measured(*given: Any) -> Any:
        found = token_losses(*given)
        losses.append(float(found[0].detach().double().mean()))
        return found

    def copied(*given: Any, **more: Any) -> Any:
        made = copy_of(*given, **more)
        learners.append(weakref.ref(made))
        return made

    def look(*_: Any) -> None:
        for made in learners:
            parameters = [*made().parameters()]
            own.append(sum(p.ds_tensor.numel() for p in parameters))
            whole.append(sum(p.numel() for p in parameters))

    before = [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]
    unit = Relearning(case.lessons, asking, tokenizer).unit
    looking = register_module_forward_hook(look)
    with (
        mock.patch.object(Step, "__call__", taken),
        mock.patch.object(relearning, "token_losses", measured),
        mock.patch.object(copies, "_copy_of", copied),
    ):
        said = unit.run(model, tokenizer)
    looking.remove()
    after = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    return {
        "said": said,
        "losses": losses,
        "back": all(map(torch.equal, before, after)),
        "gone": not any(made() for made in learners),
        "size": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "own": max(own),
        "whole": max(whole),
    }
