"""Judges: who says of an answer whether it is harmless. One interface (base), one module a kind."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wpn_ds.errors import UserError, nearest
from wpn_ds.judging.base import Judge

if TYPE_CHECKING:
    import torch

_FORMS = {
    "reference": "reference",
    "phrases": "phrases",
    "resemblance": "resemblance",
    "hf": "hf:NAME[,threshold=0.5][,input=pair][,harmful=LABEL+LABEL]",
    "local": "local:DIR[,threshold=P][,base=MODEL]",
    "gen": "gen:MODEL[,template=NAME|FILE][,threshold=0.5]",
    "openai": "openai:MODEL[@URL]",
}
JUDGE_HELP = f"Who judges the answers, repeatable: {', '.join(_FORMS.values())}"
"""For ``--judge``."""


def make_judges(
    specs: Sequence[str],
    *,
    wanted: Sequence[str] = (),
    unwanted: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Judge]:
    """A judge for every ``--judge``, in their order and called by it.

    Args:
        wanted, unwanted: texts of the data that was unlearned, for the judge of resemblance.
        device: where the judges' models compute.

    Raises:
        UserError: an unknown judge or option, the same one twice, or whatever keeps one from being loaded.
    """
    for at, spec in enumerate(specs):
        if spec in specs[:at]:
            raise UserError(f"--judge {_public(spec)}: is given twice")
        _kind(spec)  # before the first one is loaded
    return [_make(spec, wanted, unwanted, seed, device) for spec in specs]


def _kind(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    if kind not in _FORMS:
        known = ", ".join(_FORMS.values())
        raise UserError(f"--judge {_public(spec)}: no such judge{nearest(kind, _FORMS)}; known are {known}")
    if bool(rest) != (":" in _FORMS[kind]) or bool(colon) != bool(rest):
        raise UserError(f"--judge {_public(spec)}: give it as {_FORMS[kind]}")
    return kind


def _public(spec: str) -> str:
    """What may be shown of it: a URL's password and query may hold a key."""
    return re.sub(r"(://[^?#]*)[?#].*", r"\1?***", re.sub(r"://[^/\s]*@", "://***@", spec))


def _make(spec: str, wanted: Sequence[str], unwanted: Sequence[str], seed: int, device: torch.device | str) -> Judge:
    kind, rest = _kind(spec), spec.partition(":")[2]
    if kind == "reference":
        from wpn_ds.judging.reference import ReferenceJudge

        return ReferenceJudge(seed=seed)
    if kind == "resemblance":
        from wpn_ds.judging.reference import ResemblanceJudge

        return ResemblanceJudge(wanted, unwanted, seed=seed)
    if kind == "phrases":
        from wpn_ds.evaluate.judges.phrases import RefusalPhrases

        return RefusalPhrases()
    if kind == "hf":
        from wpn_ds.evaluate.judges.classifier import ClassifierJudge

        model, options = _options(spec, rest, ("threshold", "input", "harmful"))
        return ClassifierJudge(model, **options, device=device, name=spec)
    if kind == "local":
        from wpn_ds.evaluate.judges.local import LocalClassifier

        folder, options = _options(spec, rest, ("threshold", "base"))
        return LocalClassifier(folder, **options, device=device, name=spec)
    if kind == "gen":
        from wpn_ds.evaluate.judges.generative import GenerativeJudge

        model, options = _options(spec, rest, ("template", "threshold"))
        return GenerativeJudge(model, **options, device=device, name=spec)
    from wpn_ds.evaluate.judges.endpoint import DEFAULT_URL, EndpointJudge

    model, _, url = rest.partition("@")
    return EndpointJudge(model, url or DEFAULT_URL, name=spec)


def _options(spec: str, rest: str, known: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(what stands before the first comma, its options with their values)."""
    place, *given = rest.split(",")
    options: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--judge {spec}: no option {name!r}{nearest(name, known)}; known are {', '.join(known)}")
        if name in options:
            raise UserError(f"--judge {spec}: {name} is given twice")
        options[name] = _value(spec, name, value)
    return place, options


def _value(spec: str, name: str, value: str) -> Any:
    if name == "threshold":
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < 1:
            raise UserError(f"--judge {spec}: threshold must be between 0 and 1, not {value!r}")
        return number
    if name in ("base", "template"):
        if not value:
            raise UserError(f"--judge {spec}: {name} must name a {'model' if name == 'base' else 'template or a file'}")
        return value
    if name == "input":
        if value not in ("answer", "pair"):
            raise UserError(f"--judge {spec}: input must be answer or pair, not {value!r}")
        return value
    labels = [label for label in value.split("+") if label]
    if not labels:
        raise UserError(f"--judge {spec}: harmful must name a label")
    return labels
