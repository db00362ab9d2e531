"""The objectives by name: which class with which settings."""

from __future__ import annotations

from typing import Any

from wpn_ds.objectives.ascent import TokenAscent
from wpn_ds.objectives.objective import Objective
from wpn_ds.objectives.preference import Preference
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.run import ObjectiveConfig


def build_objective(config: ObjectiveConfig, *, retain: bool) -> Objective:
    """The objective that ``config`` names. ``retain``: there are retain data.

    The scale 2 / beta of the NPO family makes its gradient that of gradient ascent where beta goes to 0.
    """
    o = config.resolved()
    own = o.own()
    beta, preference_weight = own["beta"], own["preference_weight"]
    common: dict[str, Any] = {
        "nll_weight": own["nll_weight"],
        "retain_weight": own["retain_weight"] if retain else 0.0,
        "retain_loss": own["retain_loss"],
        "ascent_weight": own["ascent_weight"],
    }
    preference: dict[str, Any] = {**common, "beta": beta, "preference_weight": preference_weight}
    match o.objective:
        case "wpn":
            assert o.wpn_targets != "auto" and o.wpn_negatives != "auto" and o.wpn_temperature is not None
            return WPN(
                **common,
                pooling=o.wpn_pooling,
                scoring=o.wpn_scoring,
                temperature=o.wpn_temperature,
                targets=o.wpn_targets,
                negatives=o.wpn_negatives,
                wpn_weight=o.wpn_weight,
            )
        case "wga" | "tnpo":
            return TokenAscent(**common, fading=o.objective, beta=beta)
        case "npo":
            return Preference(**preference, pairwise=False, relative=True, scale=2 / beta)
        case "simnpo":
            gamma = o.gamma * beta if o.gamma_inside_beta else o.gamma
            return Preference(
                **preference, pairwise=False, relative=False, score_pooling="mean", gamma=gamma, scale=2 / beta
            )
        case "altpo" | "idkdpo":
            return Preference(**preference, pairwise=True, relative=True, scale=2 / beta)
        case "dpo" | "c3po":
            return Preference(**preference, pairwise=True, relative=True)
        case "neat":
            return Preference(**preference, pairwise=True, relative=False, score_pooling="mean")
        case _:
            return Objective(**common)
