"""The method written down plainly, in fp64 and one sequence at a time, independently of the package's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """An answer and what the models say of it: ``now`` and ``start`` are the log-probabilities of its tokens."""

    example: int
    wanted: bool
    text: int
    anchor: Tensor
    vector: Tensor
    score: Tensor
    now: Tensor
    start: Tensor


Settings = dict[str, Any]
Oracle = Callable[[Settings, list[Answer]], dict[str, Tensor]]


def unwanted(answers: list[Answer]) -> list[Answer]:
    return [answer for answer in answers if not answer.wanted]


def pairs(answers: list[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """Every wanted answer with every unwanted one of its example, unless that text is wanted there too."""
    for x in (answer for answer in answers if answer.wanted):
        texts = {answer.text for answer in answers if answer.example == x.example and answer.wanted}
        for y in unwanted(answers):
            if y.example == x.example and y.text not in texts:
                yield x, y


def tokens_alone(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    return {}


def npair(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    def score(anchor: Tensor, answer: Answer) -> Tensor:
        if settings["scoring"].startswith("likelihood"):
            return answer.score
        if settings["scoring"] == "dot":
            return anchor @ answer.vector
        return anchor @ answer.vector / anchor.norm() / answer.vector.norm()

    losses = []
    for x in (answer for answer in answers if answer.wanted):
        texts = {answer.text for answer in answers if answer.example == x.example and answer.wanted}
        negatives = [y for y in unwanted(answers) if y.text not in texts]
        if settings["negatives"] == "own":
            negatives = [y for y in negatives if y.example == x.example]
        gaps = [torch.exp((score(x.anchor, y) - score(x.anchor, x)) / settings["temperature"]) for y in negatives]
        losses.append(torch.log1p(torch.stack(gaps).sum()))
    return {"npair": torch.stack(losses).mean()}


def npo(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    beta = settings["beta"]
    ratios = torch.stack([torch.exp(y.now.sum() - y.start.sum()) for y in unwanted(answers)])
    return {"preference": (2 / beta * torch.log(1 + ratios**beta)).mean()}


def simnpo(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    beta = settings["beta"]
    margins = torch.stack([-beta / len(y.now) * y.now.sum() - settings["gamma"] for y in unwanted(answers)])
    return {"preference": (-2 / beta * torch.log(torch.sigmoid(margins))).mean()}


def dpo(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    margins = torch.stack([(x.now.sum() - x.start.sum()) - (y.now.sum() - y.start.sum()) for x, y in pairs(answers)])
    return {"preference": -torch.log(torch.sigmoid(settings["beta"] * margins)).mean()}


def altpo(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    return {"preference": 2 / settings["beta"] * dpo(settings, answers)["preference"]}


def neat(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    margins = torch.stack([x.now.mean() - y.now.mean() for x, y in pairs(answers)])
    return {"preference": -torch.log(torch.sigmoid(settings["beta"] * margins)).mean()}


def wga(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    logp = torch.cat([y.now for y in unwanted(answers)])
    return {"ascent": (logp.detach().exp() ** settings["beta"] * logp).mean()}


def tnpo(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    beta = settings["beta"]
    ratios = torch.cat([y.now.exp() / y.start.exp() for y in unwanted(answers)])
    return {"ascent": (2 / beta * torch.log(1 + ratios**beta)).mean()}


#: Of each objective the parts of its loss beside those of all: nll, retain, ascent.
ORACLES: dict[str, Oracle] = {
    "wpn": npair,
    **dict.fromkeys(("ga", "graddiff", "llmu", "pmpo"), tokens_alone),
    **{"wga": wga, "tnpo": tnpo},
    **{"npo": npo, "simnpo": simnpo},
    **{"dpo": dpo, "c3po": dpo, "altpo": altpo, "idkdpo": altpo, "neat": neat},
}


def sequence(lm, ids) -> tuple[Tensor, Tensor]:
    """([n, d] states that the head receives, [n, V] log-probabilities) of one sequence read alone."""
    received: list[Tensor] = []
    hook = lm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    logits = lm(input_ids=torch.tensor([list(ids)]), use_cache=False).logits  # with the family's own caps and scales
    hook.remove()
    return received[0][0], torch.log_softmax(logits[0], -1)


def weights(n: int, kind: str, power: float) -> Tensor:
    if kind == "sum":
        return torch.ones(n, dtype=torch.float64)
    if kind == "mean":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    if kind == "last":
        return torch.eye(n, dtype=torch.float64)[-1]
    rising = torch.tensor([t**power for t in range(1, n + 1)], dtype=torch.float64)
    return rising / rising.sum()


def pooled(hidden: Tensor, start: int, stop: int, *kind: Any) -> Tensor:
    return (weights(stop - start, *kind)[:, None] * hidden[start:stop]).sum(0)


def objective(lm, start_lm, examples, retain, settings) -> dict[str, Tensor]:
    """The loss parts of one step over ``examples`` (ForgetExample) and ``retain`` (Segment), and their total.

    ``start_lm`` is the starting model: of vectors, of the KL and of likelihoods.
    """
    kind, scoring = (settings["pooling"], settings["power"]), settings["scoring"]
    answers = []
    for e, example in enumerate(examples):
        for wanted, side in ((True, example.wanted), (False, example.unwanted)):
            for answer in side:
                segment = answer.segment
                hidden, logp = sequence(lm, segment.ids)
                score = own = torch.stack(
                    [logp[t - 1, segment.ids[t]] for t in range(segment.answer_start, len(segment.ids))]
                )
                with torch.no_grad():
                    start = sequence(start_lm, segment.ids)[1]
                places = range(segment.answer_start, len(segment.ids))
                begun = torch.stack([start[t - 1, segment.ids[t]] for t in places])
                if scoring == "likelihood_ratio":
                    score = own - begun
                target_hidden = hidden
                if settings["targets"] == "reference":
                    with torch.no_grad():
                        target_hidden = sequence(start_lm, segment.ids)[0]
                elif settings["targets"] == "detached":
                    target_hidden = hidden.detach()
                answers.append(
                    Answer(
                        e,
                        wanted,
                        answer.text_id,
                        pooled(hidden, segment.prompt_start, segment.answer_start, *kind),
                        pooled(target_hidden, segment.answer_start, len(segment.ids), *kind),
                        (weights(len(own), *kind) * score).sum(),
                        own,
                        begun,
                    )
                )

    objective = settings["objective"]
    wanted = [answer.now for answer in answers if answer.wanted]
    nll = torch.cat([len(now) * weights(len(now), "weighted", settings["nll_power"]) * now for now in wanted])
    retained = []
    for segment in retain:
        _, logp = sequence(lm, segment.ids)
        if settings["retain_loss"] == "kl":
            with torch.no_grad():
                _, reference = sequence(start_lm, segment.ids)
            token = (reference.exp() * (reference - logp)).sum(-1)
            retained.append(token[segment.answer_start - 1 : -1])
        else:
            ids = torch.tensor(segment.ids[segment.answer_start :])
            retained.append(-logp[segment.answer_start - 1 : -1].gather(1, ids[:, None]).squeeze(1))
    ascent = torch.cat([answer.now for answer in unwanted(answers)]).mean()
    parts = {"nll": -nll.mean(), "retain": torch.cat(retained).mean(), "ascent": ascent}
    weights_of = {**settings["weights"], "nll": settings["nll"], "ascent": settings["ascent"]}
    if objective == "ga":
        weights_of["retain"] = 0
    parts |= ORACLES[objective](settings, answers)
    parts = {name: value for name, value in parts.items() if weights_of.setdefault(name, 1.0)}
    if settings["nll_power"] and "nll" in parts:
        parts["nll_weighted"], weights_of["nll_weighted"] = parts.pop("nll"), weights_of["nll"]
        parts["loss/nll"], weights_of["loss/nll"] = -torch.cat(wanted).mean(), 0.0  # only logged
    if settings["harmonise"]:
        gradients, trained = [], [p for p in lm.parameters() if p.requires_grad]
        for names in (parts.keys() - {"retain"}, {"retain"}):
            total = sum(weights_of[name] * parts[name] for name in names)
            found = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)])
        forget, kept = (torch.cat([g.flatten() for g in found]) for found in gradients)
        parts["harmony/cosine"] = forget @ kept / forget.norm() / kept.norm()
        if forget @ kept < 0:
            forget = forget - (forget @ kept) / (kept @ kept) * kept
        # the loss whose gradient this is
        parts["total"] = torch.cat([p.flatten() for p in trained]) @ (forget + kept).detach()
        return parts
    parts["total"] = sum(weights_of[name] * value for name, value in parts.items())
    return parts
