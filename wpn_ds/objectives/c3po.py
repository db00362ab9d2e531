"""C3PO: DPO in scope, and two sets held in place."""

from __future__ import annotations

from wpn_ds.objectives.dpo import DPO
from wpn_ds.objectives.registry import objective


@objective
class C3PO(DPO):
    """C3PO (arXiv 2402.10893): DPO on prompts in scope, and two sets held in place, near the scope and beyond it: give
    both files with --retain_file. The weights are ours."""

    equation = "DPO's term"
    paper = "2402.10893"
