"""The method written down plainly, in fp64 and one sequence at a time, independently of the package's own code."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """An answer and what the models say of it: ``now`` and ``start`` are the log-probabilities of its tokens ``ids``,
    ``every`` and ``every_start`` [n, V] those of the whole vocabulary there; ``inner`` [n, d] are for rmu the states
    after the model's first layer that predict its tokens. Those of different ``half``s are not compared."""

    example: int
    half: int
    wanted: bool
    text: int
    anchor: Tensor
    vector: Tensor
    score: Tensor
    now: Tensor
    start: Tensor
    ids: Tensor
    every: Tensor
    every_start: Tensor
    inner: Tensor


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
        negatives = [y for y in unwanted(answers) if y.text not in texts and y.half == x.half]
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


def satimp(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    logp = torch.cat([y.now for y in unwanted(answers)])
    p = logp.detach().exp()
    return {"ascent": (p ** settings["beta"] * (1 - p) ** settings["importance"] * logp).mean()}


def divergence(targets: Tensor, logp: Tensor) -> Tensor:
    """KL of [n, V] probabilities, some of them 0, and log-probabilities: [n]."""
    return torch.where(targets > 0, targets * (targets.clamp(min=1e-300).log() - logp), 0).sum(1)


def ceu(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    losses = []
    for y in unwanted(answers):
        others = y.every.detach().clone()
        others[torch.arange(len(y.ids)), y.ids] = float("-inf")
        losses.append(divergence(others.softmax(1), y.every))
    return {"forget": torch.cat(losses).mean()}


def undial(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    losses = []
    for y in unwanted(answers):
        lowered = y.every_start.clone()
        lowered[torch.arange(len(y.ids)), y.ids] -= settings["beta"]
        losses.append(divergence(lowered.softmax(1), y.every))
    return {"forget": torch.cat(losses).mean()}


def pdu(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    logits = torch.cat([y.every for y in unwanted(answers)])  # a shift of all changes nothing
    return {"forget": ((logits.max(1).values - logits.mean(1)) ** 2).mean()}


def steered(width: int, norm: float) -> Tensor:
    content = '["steering", 0]'
    seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1
    entries = torch.rand(width, generator=torch.Generator().manual_seed(seed)).double()
    return norm * entries / entries.norm()


def rmu(settings: Settings, answers: list[Answer]) -> dict[str, Tensor]:
    states = torch.cat([y.inner for y in unwanted(answers)])
    return {"forget": ((states - steered(states.shape[1], settings["steering"])) ** 2).mean()}


#: Of each objective the parts of its loss beside those of all: nll, retain, ascent.
ORACLES: dict[str, Oracle] = {
    "wpn": npair,
    **dict.fromkeys(("ga", "graddiff", "llmu", "pmpo"), tokens_alone),
    **{"wga": wga, "tnpo": tnpo, "satimp": satimp},
    **{"ceu": ceu, "undial": undial, "pdu": pdu, "rmu": rmu},
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


def inner(lm, ids) -> Tensor:
    """[n, d] states after the first layer of one sequence read alone."""
    found: Tensor = lm(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True).hidden_states[1]
    return found[0]


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


def objective(lm, start_lm, examples, retain, settings, others_lm=None) -> dict[str, Tensor]:
    """The loss parts of one step over ``examples`` (ForgetExample) and ``retain`` (Segment), and their total.

    ``start_lm`` is the starting model: of vectors, of the KL and of likelihoods; ``others_lm`` reads all but the
    support half of the examples, which are compared among themselves.
    """
    if settings["meta"] and others_lm is None:
        return meta(lm, start_lm, examples, retain, settings)
    own_lm, lm = lm, others_lm or lm
    kind, scoring = (settings["pooling"], settings["power"]), settings["scoring"]
    method = settings["objective"]
    answers = []
    for e, example in enumerate(examples):
        half = int(others_lm is not None and e in settings["support"])
        reader = own_lm if half else lm
        for wanted, side in ((True, example.wanted), (False, example.unwanted)):
            for answer in side:
                segment = answer.segment
                hidden, logp = sequence(reader, segment.ids)
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
                        half,
                        wanted,
                        answer.text_id,
                        pooled(hidden, segment.prompt_start, segment.answer_start, *kind),
                        pooled(target_hidden, segment.answer_start, len(segment.ids), *kind),
                        (weights(len(own), *kind) * score).sum(),
                        own,
                        begun,
                        torch.tensor(segment.ids[segment.answer_start :]),
                        logp[segment.answer_start - 1 : -1],
                        start[segment.answer_start - 1 : -1],
                        (inner(reader, segment.ids) if method == "rmu" else hidden)[segment.answer_start - 1 : -1],
                    )
                )

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
        elif settings["retain_loss"] == "states":
            with torch.no_grad():
                before = inner(start_lm, segment.ids)
            apart = ((inner(lm, segment.ids) - before) ** 2).mean(-1)
            retained.append(apart[segment.answer_start - 1 : -1])
        else:
            ids = torch.tensor(segment.ids[segment.answer_start :])
            retained.append(-logp[segment.answer_start - 1 : -1].gather(1, ids[:, None]).squeeze(1))
    ascent = torch.cat([answer.now for answer in unwanted(answers)]).mean()
    parts = {"nll": -nll.mean(), "ascent": ascent} | ({"retain": torch.cat(retained).mean()} if retained else {})
    weights_of = {**settings["weights"], "nll": settings["nll"], "ascent": settings["ascent"]}
    if method == "ga":
        weights_of["retain"] = 0
    parts |= ORACLES[method](settings, answers)
    parts = {name: value for name, value in parts.items() if weights_of.setdefault(name, 1.0)}
    if settings["nll_power"] and "nll" in parts:
        parts["nll_weighted"], weights_of["nll_weighted"] = parts.pop("nll"), weights_of["nll"]
        parts["loss/nll"], weights_of["loss/nll"] = -torch.cat(wanted).mean(), 0.0  # only logged
    parts["total"] = sum(weights_of[name] * value for name, value in parts.items())
    if others_lm is not None or not (settings["harmonise"] or settings["sam_rho"] or settings["adversary"]):
        return parts
    trained = [p for p in lm.parameters() if p.requires_grad]
    kept = gradient(weights_of["retain"] * parts["retain"] if "retain" in parts else 0.0 * parts["total"], trained)
    forget = gradient(parts["total"], trained) - kept
    rho, steps = settings["sam_rho"], settings["adversary"]
    if rho or steps:
        before = [p.detach().clone() for p in trained]
        plain = settings | {"harmonise": False, "sam_rho": 0.0, "adversary": 0}
        if rho:
            move(trained, rho * forget / forget.norm())
        for _ in range(steps):  # the mean log-probability of unwanted tokens rises
            said = objective(lm, start_lm, examples, [], plain | {"objective": "graddiff", "ascent": 1.0, "nll": 0.0})
            move(trained, settings["adversary_rate"] * gradient(said["ascent"], trained))
        there = objective(lm, start_lm, examples, [], plain)
        forget = gradient(there["total"], trained)
        away = torch.cat([(p - was).flatten() for p, was in zip(trained, before, strict=True)]).norm().detach()
        parts |= there if steps else {}
        parts["adversary/distance" if steps else "sam/distance"] = away
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
    return joined(parts, trained, forget, kept, settings)


def meta(lm, start_lm, examples, retain, settings) -> dict[str, Tensor]:
    """The same where the weights make a virtual step on the support half, and all others are read there."""
    moved = copy.deepcopy(lm)
    trained, there = ([p for p in one.parameters() if p.requires_grad] for one in (lm, moved))
    support = gradient(objective(lm, start_lm, examples, retain, settings, moved)["total"], trained)
    move(there, -settings["meta"] * support)
    parts = objective(lm, start_lm, examples, retain, settings, moved)
    weight = 0.0 if settings["objective"] == "ga" else settings["weights"]["retain"]
    kept = gradient(weight * parts["retain"], there)
    forget = support + gradient(parts["total"], there) - kept
    parts["meta/distance"] = settings["meta"] * support.norm()
    return joined(parts, trained, forget, kept, settings)


def joined(parts, trained, forget: Tensor, kept: Tensor, settings) -> dict[str, Tensor]:
    """``parts`` with the loss whose gradient is that of both."""
    if settings["harmonise"]:
        parts["harmony/cosine"] = forget @ kept / forget.norm() / kept.norm()
        if forget @ kept < 0:
            forget = forget - (forget @ kept) / (kept @ kept) * kept
    parts["total"] = torch.cat([p.flatten() for p in trained]) @ (forget + kept)
    return parts


def move(trained: list[Tensor], step: Tensor) -> None:
    """Add ``step``, of all weights one after the other."""
    with torch.no_grad():
        for p, part in zip(trained, step.split([p.numel() for p in trained]), strict=True):
            p += part.view_as(p)


def gradient(loss: Tensor, trained: list[Tensor]) -> Tensor:
    """Of all weights, one after the other."""
    found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])
