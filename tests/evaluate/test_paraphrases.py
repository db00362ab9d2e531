from __future__ import annotations

import json

import pytest

from wpn_ds.data.records import ForgetRecord
from wpn_ds.data.shapes import Message
from wpn_ds.data.sources import DataError
from wpn_ds.errors import UserError
from wpn_ds.evaluate.paraphrases import paraphrased

CHAT = (Message("system", "Be kind."), Message("user", "Why not?"))
ASKED = [ForgetRecord("How?", ("a",), ("b",), "f:1"), ForgetRecord(CHAT, ("c",), ("d",), "f:2")]


def written(path, rows) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_each_suite_has_a_question_once_in_other_words_or_in_one_language(tmp_path) -> None:
    rows = [("How?", "In which way?", None), ("How?", "By what means?", None), ("How?", "Wie?", "de")]
    rows += [("Why not?", "What for?", None), ("elsewhere", "nowhere", None)]
    fields = [{"prompt": asked, "paraphrase": said, "language": language} for asked, said, language in rows]
    made = {suite.name: suite.records for suite in paraphrased(written(tmp_path / "other.jsonl", fields), ASKED)}
    assert list(made) == ["paraphrase", "paraphrase-2", "paraphrase-de"]
    assert [record.prompt for record in made["paraphrase"]] == [
        "In which way?",
        (CHAT[0], Message("user", "What for?")),
    ]
    assert [(one.prompt, one.source, one.rejected) for one in made["paraphrase-de"]] == [("Wie?", "f:1", ("b",))]
    assert paraphrased([], ASKED) == []


def test_a_row_without_a_text_and_a_file_of_other_questions_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r'bad.jsonl:1.*field "paraphrase": is missing'):
        paraphrased(written(tmp_path / "bad.jsonl", [{"prompt": "How?"}]), ASKED)
    others = written(tmp_path / "other.jsonl", [{"prompt": "Who?", "paraphrase": "Which man?"}])
    with pytest.raises(UserError, match=r"--paraphrase_file .*no row's prompt is one that is asked"):
        paraphrased(others, ASKED)
