"""Terms on whole answers: the states of a micro-batch that such a term is a function of, and its mean from them."""

from __future__ import annotations

import torch
from torch import Tensor

from wpn_ds.data.batch import Batch, to_device
from wpn_ds.data.plan import StepPlan
from wpn_ds.losses.answers import (
    AnswerScores,
    AnswerVectors,
    Mean,
    alone,
    npair_of_fixed,
    npair_of_scores,
    npair_of_vectors,
    paired,
    pooled,
    pooling_matrix,
)
from wpn_ds.models.packed import Output
from wpn_ds.objectives.terms import NPair, OnAnswers, Role

#: One state an item, by what it is of ("prompt", "wanted", "unwanted"): values [n, ...] and the items' indices [n].
States = dict[str, tuple[Tensor, Tensor]]
#: What the starting model says of the step's answers, or the current one without gradient.
Fixed = AnswerScores | AnswerVectors | None


def states_of(term: OnAnswers, output: Output, batch: Batch) -> States:
    """Scores [n] of the micro-batch's answers, or pooled states [n, d] of its prompts and, if live, answers."""
    if term.score is not None:
        labels = {"wanted": batch.wanted_labels, "unwanted": batch.unwanted_labels}
        spans = {name: spans for name, spans in labels.items() if Role[name.upper()] in term.roles}
        logprobs = -output.losses[:, None]
        return {name: (pooled(logprobs, of, term.score).squeeze(1), of.index) for name, of in spans.items()}
    assert term.vectors is not None
    spans = {"prompt": batch.prompts}
    if not term.fixed:
        spans |= {"wanted": batch.wanted, "unwanted": batch.unwanted}
    return {name: (pooled(output.hidden, of, term.vectors), of.index) for name, of in spans.items()}


def label_gradients(term: OnAnswers, gradients: dict[str, Tensor], batch: Batch, labels: int) -> Tensor:
    """``[labels]``: the derivative of a term by the losses of a micro-batch's labels, from its ``gradients`` by the
    scores, which are minus weighted sums of these losses."""
    assert term.score is not None
    found = torch.zeros(labels, device=batch.label_ids.device)
    for name, spans in (("wanted", batch.wanted_labels), ("unwanted", batch.unwanted_labels)):
        if name in gradients:
            matrix = pooling_matrix(spans.start, spans.stop, labels, term.score)
            found = found - gradients[name].to(matrix) @ matrix
    return found


def means_of(term: OnAnswers, states: States, plan: StepPlan, fixed: Fixed) -> dict[str, Mean]:
    """A term of the items in ``states``, all that they are compared to among them or in ``fixed``, and its figures."""
    n_wanted, n_unwanted = len(plan.wanted_ids), len(plan.unwanted_ids)
    if isinstance(fixed, AnswerVectors):
        assert isinstance(term.loss, NPair)
        return npair_of_fixed(
            term.name, *states["prompt"], fixed, term.similarity, term.loss.temperature, count=n_wanted
        )
    unwanted, columns = states["unwanted"]
    if isinstance(fixed, AnswerScores):
        unwanted = unwanted - fixed.unwanted[columns]
    if term.pairs == "alone":
        assert not isinstance(term.loss, NPair)
        return alone(term.name, unwanted, term.beta, term.loss, n_unwanted)
    wanted, rows = states["wanted"]
    if isinstance(fixed, AnswerScores):
        wanted = wanted - fixed.wanted[rows]
    mask = plan.mask(term.pairs)
    here = to_device(torch.from_numpy(mask), wanted.device)[rows][:, columns]
    if not isinstance(term.loss, NPair):
        counts = n_wanted, n_unwanted, int(mask.sum())
        return paired(term.name, AnswerScores(wanted, unwanted), term.beta, term.loss, here, counts)
    temperature = term.loss.temperature
    if term.score is not None:
        return npair_of_scores(
            term.name, AnswerScores(term.beta * wanted, term.beta * unwanted), temperature, here, n_wanted
        )
    prompts, _ = states["prompt"]
    return npair_of_vectors(term.name, prompts, wanted, unwanted, term.similarity, temperature, here, n_wanted)
