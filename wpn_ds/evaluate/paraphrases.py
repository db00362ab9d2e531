"""Questions in other words, or in other languages, out of the user's own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.sources import Problems, field_problem, file_rows
from wpn_ds.errors import UserError
from wpn_ds.evaluate.attacks import last_turn, with_question
from wpn_ds.evaluate.suites import PromptSuite

FLAG = "--paraphrase_file"


def paraphrased(paths: Sequence[str], questions: Sequence[ForgetRecord]) -> list[PromptSuite]:
    """The ``questions`` as rows {"prompt", "paraphrase"} say them, which may have a "language": a suite has each
    question once at most, and one language.

    Raises:
        DataError: names file, line and field.
        UserError: no row is of one of the questions.
    """
    problems, seen = Problems(), Counter[tuple[str, str]]()
    asked = {last_turn(record.prompt).strip(): record for record in questions}
    found: dict[str, list[ForgetRecord]] = {}
    for at, row in (pair for path in paths for pair in file_rows(path, problems)):
        row = {name: value for name, value in row.items() if value is not None}
        fields = ["prompt", "paraphrase", *(["language"] if "language" in row else [])]
        if bad := [problem for field in fields if (problem := field_problem(row, field))]:
            problems.add(at, bad[0])
            continue
        if (record := asked.get(row["prompt"].strip())) is None:
            continue
        language = row.get("language", "").strip()
        seen[record.source, language] += 1
        number = seen[record.source, language]
        name = "-".join(["paraphrase", *filter(None, [language]), *([str(number)] if number > 1 else [])])
        said = replace(record, prompt=with_question(record.prompt, row["paraphrase"].strip()))
        found.setdefault(name, []).append(said)
    problems.check(FLAG)
    if paths and not found:
        raise UserError(f"{FLAG} {' '.join(paths)}: no row's prompt is one that is asked: take those of --heldout_file")
    return [PromptSuite(name, tuple(found[name])) for name in sorted(found)]
