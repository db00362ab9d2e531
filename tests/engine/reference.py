"""The method written down plainly, in fp64 and one sequence at a time, independently of the package's own code."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence(lm, ids) -> tuple[Tensor, Tensor]:
    """([n, d] states that the head receives, [n, V] log-probabilities) of one sequence read alone."""
    tokens = torch.tensor([list(ids)])
    hidden = lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return hidden, torch.log_softmax(lm.lm_head(hidden), -1)


def weights(n: int, kind: str) -> Tensor:
    if kind == "sum":
        return torch.ones(n, dtype=torch.float64)
    if kind == "mean":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    if kind == "last":
        return torch.eye(n, dtype=torch.float64)[-1]
    return torch.tensor([2 * t / (n * (n + 1)) for t in range(1, n + 1)], dtype=torch.float64)


def pooled(hidden: Tensor, start: int, stop: int, kind: str) -> Tensor:
    return (weights(stop - start, kind)[:, None] * hidden[start:stop]).sum(0)


def objective(lm, start_lm, examples, retain, settings) -> dict[str, Tensor]:
    """The loss parts of one step over ``examples`` (ForgetExample) and ``retain`` (Segment), and their total.

    ``start_lm`` is the starting model: of vectors, of the KL and of likelihoods.
    """
    kind, scoring, tau = settings["pooling"], settings["scoring"], settings["temperature"]
    answers = []  # (example, is wanted, text id, anchor, vector, weighted score, own log-probabilities)
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
                    (
                        e,
                        wanted,
                        answer.text_id,
                        pooled(hidden, segment.prompt_start, segment.answer_start, kind),
                        pooled(target_hidden, segment.answer_start, len(segment.ids), kind),
                        (weights(len(own), kind) * score).sum(),
                        own,
                        begun,
                    )
                )

    def score(anchor: Tensor, answer) -> Tensor:
        if scoring.startswith("likelihood"):
            return answer[5]
        if scoring == "dot":
            return anchor @ answer[4]
        return anchor @ answer[4] / anchor.norm() / answer[4].norm()

    objective, beta = settings["objective"], settings["beta"]
    pairs = []
    for e, wanted, _, anchor, *_rest in answers:
        if not wanted:
            continue
        positive = next(a for a in answers if a[3] is anchor)
        wanted_texts = {a[2] for a in answers if a[0] == e and a[1]}
        negatives = [a for a in answers if not a[1] and a[2] not in wanted_texts]
        if settings["negatives"] == "own":
            negatives = [a for a in negatives if a[0] == e]
        gaps = [torch.exp((score(anchor, n) - score(anchor, positive)) / tau) for n in negatives]
        pairs.append(torch.log1p(torch.stack(gaps).sum()))
    preferences = []
    if objective in ("npo", "simnpo"):
        for *_, own, begun in (a for a in answers if not a[1]):
            if objective == "npo":
                preferences.append(2 / beta * torch.log(1 + torch.exp(own.sum() - begun.sum()) ** beta))
            else:
                margin = -beta / len(own) * own.sum() - settings["gamma"]
                preferences.append(-2 / beta * torch.log(torch.sigmoid(margin)))
    elif objective in ("dpo", "altpo", "idkdpo", "c3po", "neat"):
        for one in (a for a in answers if a[1]):
            texts = {a[2] for a in answers if a[0] == one[0] and a[1]}
            for other in (a for a in answers if a[0] == one[0] and not a[1] and a[2] not in texts):
                if objective == "neat":
                    margin = one[6].mean() - other[6].mean()
                else:
                    margin = (one[6].sum() - one[7].sum()) - (other[6].sum() - other[7].sum())
                scale = 2 / beta if objective in ("altpo", "idkdpo") else 1
                preferences.append(-scale * torch.log(torch.sigmoid(beta * margin)))
    nll = torch.cat([a[6] for a in answers if a[1]])
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
    unwanted = torch.cat([a[6] for a in answers if not a[1]])
    if objective == "wga":
        unwanted = unwanted.detach().exp() ** beta * unwanted
    elif objective == "tnpo":
        begun = torch.cat([a[7] for a in answers if not a[1]])
        unwanted = 2 / beta * torch.log(1 + (unwanted.exp() / begun.exp()) ** beta)
    parts = {"nll": -nll.mean(), "retain": torch.cat(retained).mean(), "ascent": unwanted.mean()}
    weights_of = {"nll": settings["nll"], "retain": settings["weights"]["retain"], "ascent": settings["ascent"]}
    if objective == "wpn":
        parts["npair"], weights_of["npair"] = torch.stack(pairs).mean(), settings["weights"]["npair"]
    if objective == "ga":
        weights_of["retain"] = 0
    if preferences:
        parts["preference"], weights_of["preference"] = (
            torch.stack(preferences).mean(),
            settings["weights"]["preference"],
        )
    parts = {name: value for name, value in parts.items() if weights_of[name]}
    if settings["harmonise"]:
        gradients = []
        for names in (parts.keys() - {"retain"}, {"retain"}):
            total = sum(weights_of[name] * parts[name] for name in names)
            found = torch.autograd.grad(total, list(lm.parameters()), retain_graph=True, allow_unused=True)
            gradients.append(
                [torch.zeros_like(p) if g is None else g for p, g in zip(lm.parameters(), found, strict=True)]
            )
        forget, kept = (torch.cat([g.flatten() for g in found]) for found in gradients)
        parts["harmony/cosine"] = forget @ kept / forget.norm() / kept.norm()
        if forget @ kept < 0:
            forget = forget - (forget @ kept) / (kept @ kept) * kept
        # the loss whose gradient this is
        parts["total"] = torch.cat([p.flatten() for p in lm.parameters()]) @ (forget + kept).detach()
        return parts
    parts["total"] = sum(weights_of[name] * value for name, value in parts.items())
    return parts
