"""IdkDPO: "I don't know" more likely than the answers to forget."""

from __future__ import annotations

from wpn_ds.objectives.altpo import AltPO
from wpn_ds.objectives.registry import objective


@objective
class IdkDPO(AltPO):
    """IdkDPO (arXiv 2404.05868, section 4): AltPO's loss whose wanted answers say "I don't know" in twenty ways."""

    equation = "AltPO's term, \"I don't know\" as y+"
    paper = "2404.05868"
    wanted = "dont_know"
