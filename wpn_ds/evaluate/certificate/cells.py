"""The cells of a certificate: what each does to a model, and what it asks it then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from wpn_ds.data.records import ForgetRecord, RetainRecord, prompt_text
from wpn_ds.errors import UserError
from wpn_ds.evaluate.certificate.command import Options
from wpn_ds.evaluate.certificate.treatments import Directed, SoftPrompt, rounding, rounding_away
from wpn_ds.evaluate.measurement import Plan
from wpn_ds.evaluate.model import Treatment
from wpn_ds.evaluate.relearning import Lessons
from wpn_ds.evaluate.suites import PromptSuite
from wpn_ds.models.load import Source
from wpn_ds.models.rounding import FORMATS

AS_IT_IS = "as it is"
ASKED, SAMPLED = "heldout", "sampled"
"""The suites of the questions, each asked once, and of the cell samples."""


INSIDE = "inside"
"""The group of cells that ask nothing, and read a model's states and likelihoods."""


MIN_PROBED = 4
"""Prompts that a probe is fitted on and measured on, at least."""


@dataclass(frozen=True)
class Cell:
    """One attack.

    Attributes:
        name: "as it is", or "group/name" with a group of :data:`~wpn_ds.evaluate.certificate.command.GROUPS`.
        plan: what is measured.
        treatment: of the model before that.
        alone: whether the unlearned model alone is measured.
    """

    name: str
    plan: Plan
    treatment: Treatment | None = None
    alone: bool = False

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Material:
    """What the cells are made of.

    Attributes:
        start: the model before unlearning.
        empty: a plan that measures nothing, with the way in which prompts are asked.
        questions: prompts, each with a source of its own, that are asked in every cell.
        attacks, paraphrases: suites that ask them in other ways, in other words.
        taught: by name, records with unwanted answers to teach again.
        retain: records whose answers are taught as harmless ones, and whose perplexity is measured.
        benign: harmless prompts.
        probed: those of the questions with answers of both kinds, if a probe can be trained here.
        members, others: records whose unwanted answers were trained on, and were not.
    """

    start: Source
    empty: Plan
    questions: Sequence[ForgetRecord]
    attacks: Sequence[PromptSuite]
    paraphrases: Sequence[PromptSuite]
    taught: Mapping[str, Sequence[ForgetRecord]]
    retain: Sequence[RetainRecord]
    benign: Sequence[ForgetRecord]
    probed: Sequence[ForgetRecord]
    members: Sequence[ForgetRecord]
    others: Sequence[ForgetRecord]


def cells(options: Options, given: Material) -> list[Cell]:
    """What ``--attack`` asks for, the model as it is before all.

    Raises:
        UserError: there is no such cell, or nothing to make it of.
    """
    every = list(_every(options, given))
    found = [cell for cell in every if cell.name == AS_IT_IS or options.wants(cell.name)]
    for name in options.attack:
        if not any(name in (cell.name, cell.group) for cell in found):
            known = ", ".join(cell.name for cell in every if "/" in cell.name)
            raise UserError(f"--attack {name}: there is no such cell, or no data for it; there are {known}")
    return found


def _every(options: Options, given: Material) -> Iterator[Cell]:
    questions = tuple(given.questions)
    asked = replace(given.empty, suites=[PromptSuite(ASKED, questions)], retain=given.retain)
    yield Cell(AS_IT_IS, asked)
    for name in FORMATS:
        yield Cell(f"precision/{name}", asked, rounding(name))
        if f"precision/{name}-away" in options.attack:
            yield Cell(f"precision/{name}-away", asked, rounding_away(name, given.start), alone=True)
    rank = options.relearn_lora_r
    for kind, records in {"harmless": _lessons(given.retain), **given.taught}.items():
        for rate in options.relearn_learning_rate if records else ():
            steps = [0, *sorted(set(options.relearn_steps))]
            lessons = Lessons(records, PromptSuite("relearning", questions), steps, rate, options.seed, rank)
            name = f"relearning/{kind}-{rate:g}" + (f"-lora{rank}" if rank else "")
            yield Cell(name, replace(given.empty, lessons=lessons))
    sampled = PromptSuite(SAMPLED, questions, samples=options.samples)
    yield Cell("samples/" + SAMPLED, replace(given.empty, suites=[sampled]))
    if given.attacks:
        yield Cell("askings/attacks", replace(given.empty, suites=given.attacks))
    if given.paraphrases:
        yield Cell("askings/paraphrases", replace(given.empty, suites=given.paraphrases))
    if taught := [record for records in given.taught.values() for record in records]:
        vectors = options.soft_prompt_vectors
        soft = SoftPrompt(taught, vectors, options.soft_prompt_steps, given.empty.asking, options.seed)
        suite = PromptSuite("soft prompt", questions, soft=vectors)
        yield Cell("askings/soft_prompt", replace(given.empty, suites=[suite]), soft.treatment)
    if given.benign:
        directed = Directed(given.questions, given.benign, given.empty.asking)
        yield Cell("direction/removed", asked, directed.treatment)
    if len(given.probed) >= MIN_PROBED:
        yield Cell(f"{INSIDE}/probe", replace(given.empty, probed=given.probed))
    if given.members and given.others:
        yield Cell(f"{INSIDE}/membership", replace(given.empty, members=given.members, others=given.others))


def _lessons(retain: Sequence[RetainRecord]) -> list[ForgetRecord]:
    """Questions with harmless answers in the place of unwanted ones, which is what a lesson teaches."""
    return [
        ForgetRecord(record.prompt, (), (record.response,), record.source)
        for record in retain
        if record.prompt and prompt_text(record.prompt) and record.response
    ]
