"""Published prompt lists are read in their published formats, row by row, or refused by file and line."""

from __future__ import annotations

import csv
import io
import json
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wpn_ds.data.records import ForgetRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.published import PUBLISHED, find_published

_CELL = st.text(alphabet='ab",;\n\r é', max_size=12)


def found(name: str, folder: Path) -> list[ForgetRecord]:
    answer = find_published(name, folder)
    assert answer is not None
    return answer.records


def first_file(name: str) -> str:
    return PUBLISHED[name].files[0].replace("*", "20231117")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(_CELL.filter(str.strip), _CELL), min_size=1, max_size=6),
    newline=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_a_row_of_several_lines_is_named_by_its_first(tmp_path, rows, newline, mark) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerow(["goal", "target"])
    expected: dict[str, str] = {}
    for goal, target in rows:
        line = len(io.StringIO(file.getvalue(), newline="").readlines()) + 1
        writer.writerow([goal, target])
        expected.setdefault(goal.strip(), f"{tmp_path / 'advbench.csv'}:{line}")
    (tmp_path / "advbench.csv").write_bytes((mark + file.getvalue()).encode())
    assert {record.prompt: record.source for record in found("advbench", tmp_path)} == expected


def test_a_list_is_found_in_any_folder_below(tmp_path: Path) -> None:
    for folder in ("b/deep", "a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "malicious_instruct.txt").write_text(f"from {folder}\n\n  both  \n")
    records = found("malicious_instruct", tmp_path)
    assert [record.prompt for record in records] == ["from a", "both", "from b/deep"]
    assert [Path(record.source).name for record in records] == [f"malicious_instruct.txt:{n}" for n in (1, 3, 1)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_list_that_is_not_there_is_none(tmp_path: Path, name: str) -> None:
    assert find_published(name, tmp_path) is None


def test_harmbench_puts_the_context_first_and_leaves_copyright_out(tmp_path: Path) -> None:
    rows = [
        ["Explain it", "contextual", "illegal", "A long\ntext."],
        ["Sing the song", "copyright", "copyright", ""],
        ["Do it", "standard", "harmful", ""],
    ]
    with open(tmp_path / "harmbench_val.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Behavior", "FunctionalCategory", "SemanticCategory", "ContextString"], *rows])
    answer = find_published("harmbench", tmp_path)
    assert answer is not None
    assert [(r.prompt, r.category) for r in answer.records] == [
        ("A long\ntext.\n\nExplain it", "illegal"),
        ("Do it", "harmful"),
    ]
    assert answer.note == "harmbench: 2 of 3 prompts: 1 with FunctionalCategory copyright left out"


def test_xstest_s_safe_prompts_and_their_unsafe_contrasts_are_suites_of_one_file(tmp_path: Path) -> None:
    rows = ["1,Kill a process?,homonyms,safe,kill,", "2,Kill a man?,contrast_homonyms,unsafe,kill,"]
    (tmp_path / "xstest_prompts.csv").write_text("\n".join(["id,prompt,type,label,focus,note", *rows]) + "\n")
    safe, unsafe = (found(f"xstest/{label}", tmp_path) for label in ("safe", "unsafe"))
    assert [(r.prompt, r.category) for r in (*safe, *unsafe)] == [
        ("Kill a process?", "homonyms"),
        ("Kill a man?", "contrast_homonyms"),
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_strings_of_a_json_array_have_the_line_where_they_stand(tmp_path: Path, indent: int | None) -> None:
    texts = ['say "a", then \\', "[b]", "é\n"]
    path = tmp_path / "tdc2023_test_behaviors.json"
    path.write_text(json.dumps(texts, indent=indent))
    records = found("tdc", tmp_path)
    assert [record.prompt for record in records] == [text.strip() for text in texts]
    assert [record.source for record in records] == [f"{path}:{k + 2 if indent else 1}" for k in range(3)]


def test_objects_of_a_json_array_become_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "toxic_adjective": "t", "cue_word_flag": True}]
    (tmp_path / "template_based.json").write_text(json.dumps(rows))
    (record,) = found("latent_jailbreak", tmp_path)
    assert (record.prompt, record.chosen, record.rejected, record.category) == ("p", (), (), "t")


def test_strongreject_is_read_with_its_category(tmp_path: Path) -> None:
    (tmp_path / "strongreject.csv").write_text("category,source,forbidden_prompt\nHate,me,Do it\n")
    (record,) = found("strongreject", tmp_path)
    assert (record.prompt, record.category) == ("Do it", "Hate")


def test_a_cell_may_be_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    own = csv.field_size_limit(1000)
    (tmp_path / "jailbreak_prompts.csv").write_text(f"name,prompt\na,{'x' * 1001}\n")
    try:
        (record,) = found("jailbreak_templates", tmp_path)
        assert len(record.prompt) == 1001
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(own)


@pytest.mark.parametrize(
    ("name", "content", "line", "problem"),
    [
        ("advbench", b"goal,target\na,b\nc\n", 3, "has 1 cells, and the first row 2"),
        ("advbench", b'goal,target\na,b\n"c,d\n', 3, "bad CSV"),
        ("advbench", b"prompt,target\na,b\n", 2, 'field "goal": is missing'),
        ("advbench", b"goal,target\na,b\n ,b\n", 3, 'field "goal": is empty'),
        ("advbench", b"goal,target\na,b\n\xff,b\n", 3, "is not UTF-8"),
        ("advbench", b"goal,target\n", None, "is empty"),
        ("malicious_instruct", b"\n\n", None, "is empty"),
        ("tdc", b'["a",\n"b"', 2, "bad JSON"),
        ("tdc", b'{"a": 1}', 1, "must be a JSON array of strings"),
        ("tdc", b'["a",\n"\\ud800"]', 2, "holds a lone surrogate"),
        ("xstest/safe", b"prompt,type,label\na,b,safe\nc,d,\n", 3, 'field "label": must be a string'),
        ("xstest/unsafe", b"id_v2,type,prompt\nv2-1,contrast_x,a\n", 2, 'field "label": is missing'),
        ("or_bench/hard", b"prompt,category\na,b\n,b\n", 3, 'field "prompt": must be a string'),
        ("latent_jailbreak", b'[{"prompt": "a", "toxic_adjective": "b"},\n{"prompt": 3}]', 2, "must be a string"),
        ("latent_jailbreak", b'[{"prompt": "a", "toxic_adjective": "b"},\n"c"]', 2, "must be a JSON object"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, line, problem: str) -> None:
    path = tmp_path / first_file(name)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        find_published(name, tmp_path)
    assert f"{path}:{line}: " in str(error.value) if line else f"{path}: " in str(error.value)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("name", "count", "categories"),
    [
        ("advbench", 520, 1),
        ("harmbench", 300, 6),
        ("jailbreakbench", 100, 10),
        ("malicious_instruct", 100, 1),
        ("tdc", 100, 1),
        ("aart", 3224, 70),
        ("forbidden_questions", 390, 13),
        ("latent_jailbreak", 1920, 4),
        ("jailbreak_templates", 661, 1),
        ("xstest/safe", 250, 10),
        ("xstest/unsafe", 200, 8),
    ],
)
def test_the_published_files_are_read_whole(shared_data: Path, name: str, count: int, categories: int) -> None:
    records = found(name, shared_data)
    assert len(records) == count
    assert len({record.category for record in records}) == categories
    assert len({record.prompt for record in records}) == count
    lines = {path: _lines(path) for path in set(map(_path, records))}
    for record in records:
        at = int(record.source.rpartition(":")[2]) - 1
        assert str(record.prompt).endswith(_prompt_at(lines[_path(record)], at, name, _path(record).suffix))


def _path(record: ForgetRecord) -> Path:
    return Path(record.source.rpartition(":")[0])


def _lines(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return file.readlines()


def _prompt_at(lines: list[str], at: int, name: str, suffix: str) -> str:
    """What another reader makes of the row that begins in line ``at``, counted from 0."""
    if suffix == ".csv":
        return next(csv.DictReader(chain(lines[:1], islice(lines, at, None))))[PUBLISHED[name].prompt].strip()
    if suffix == ".txt":
        return lines[at].strip()
    value, _ = json.JSONDecoder().raw_decode("".join(lines[at : at + 10]).lstrip())
    return value if isinstance(value, str) else value["prompt"]
