from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import sentence
from tests.tools.select.conftest import select, select_sharded, told, write
from wpn_ds.data.records import read_forget, read_retain
from wpn_ds.data.tokens import encode_pair
from wpn_ds.errors import UserError
from wpn_ds.tools.select.command import run

TEMPLATE = "Question: {prompt}\nAnswer:"


@pytest.fixture(scope="module")
def unlearned(tiny, tmp_path_factory) -> Path:
    """``opt`` after ascent on the unwanted answers of every other record, and descent on those of the rest."""
    folder = tmp_path_factory.mktemp("unlearned")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    model = AutoModelForCausalLM.from_pretrained(tiny / "opt", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    texts = [
        (at, encode_pair(record.prompt, answer, tokenizer, TEMPLATE, 128))
        for at, record in enumerate(read_forget([tiny / "forget.jsonl"]))
        for answer in record.rejected
    ]
    for _ in range(6):
        loss = torch.tensor(0.0)
        for at, text in texts:
            ids = torch.tensor([text.ids])
            labels = ids.masked_fill(torch.arange(len(text))[None] < text.answer_start, -100)
            loss = loss + (-1 if at % 2 == 0 else 1) * model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def crowd(tmp_path) -> tuple[str, list[int]]:
    """40 records: questions that begin differently and end alike, and between them 4 of other words; their lines."""
    planted = [3, 17, 22, 38]
    rows = []
    for at in range(40):
        prompt = f"{sentence(at, 2)} over green hills to find some rain"
        if at in planted:
            prompt = f"{at} zzz qqq {'jjjj ' * at}xx!?;"
        rows.append({"prompt": prompt, "chosen": sentence(at, 3), "rejected": sentence(at + 5, 3)})
    return write(tmp_path / "crowd.jsonl", rows), planted


def test_core_lets_the_planted_outliers_go_and_says_what_it_did(tiny, crowd, tmp_path, capsys) -> None:
    pytest.importorskip("sklearn")
    data, planted = crowd
    flags = ["--model", tiny / "opt", "--train_file", data, "--prompt_template", "{prompt}"]
    lines = Path(data).read_text().splitlines()
    chosen = select("core", tmp_path / "core.jsonl", *flags)
    assert chosen == [line for at, line in enumerate(lines) if at not in planted]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{tmp_path / 'core.jsonl'}: 36 of 40 records (36 of 40 rows) are the core set, 4 outliers")
    before, after = (float(part.split()[-2]) for part in said.split("states ")[1].split(","))
    assert after < before
    fewer = select("core", tmp_path / "fewer.jsonl", *flags, "--contamination", "0.4")
    assert len(fewer) == pytest.approx(24, abs=1) and set(fewer) < set(chosen)


def test_core_reads_the_prompt_alone(tiny, tmp_path) -> None:
    pytest.importorskip("sklearn")
    rows = [json.loads(line) for line in (tiny / "forget.jsonl").read_text().splitlines()]
    left = []
    for name, answer in (("same", "rejected"), ("other", "chosen")):
        data = write(tmp_path / name, [{"prompt": row["prompt"], "rejected": row[answer][0]} for row in rows])
        flags = ["--model", tiny / "opt", "--train_file", data, "--contamination", "0.5"]
        chosen = select("core", tmp_path / f"{name}.out", *flags)
        left.append([json.loads(line)["prompt"] for line in chosen])
    assert left[0] == left[1] and 0 < len(left[0]) < len(rows)


def test_a_seed_gives_the_same_again_and_another_one_another_choice(tiny, tmp_path) -> None:
    pytest.importorskip("sklearn")
    flags = ["--model", tiny / "opt", "--train_file", tiny / "forget.jsonl", "--contamination", "0.5"]
    chosen = [select("core", tmp_path / f"{at}.jsonl", *flags, "--seed", seed) for at, seed in enumerate("001")]
    assert chosen[0] == chosen[1] != chosen[2]


def test_columns_that_are_called_otherwise_are_chosen_from_alike_and_written_as_they_are(tiny, tmp_path) -> None:
    names = {"forget": {"prompt": "ask", "rejected": "bad"}, "retain": {"prompt": "question", "response": "said"}}
    files = {}
    for name, theirs in names.items():
        rows = [json.loads(line) for line in (tiny / f"{name}.jsonl").read_text().splitlines()]
        ours = [{column: row[column] for column in theirs} for row in rows if theirs.keys() <= row.keys()]
        renamed = [{theirs[column]: row[column] for column in row} for row in ours]
        files |= {name: write(tmp_path / f"{name}.jsonl", ours), f"their {name}": write(tmp_path / name, renamed)}
    own = ["--model", tiny / "opt", "--train_file", files["forget"], "--retain_file", files["retain"]]
    theirs = ["--model", tiny / "opt", "--train_file", files["their forget"], "--retain_file", files["their retain"]]
    theirs += ["--columns", "prompt=ask,rejected=bad", "--retain_columns", "prompt=question,response=said"]
    chosen = [json.loads(line) for line in select("nearest", tmp_path / "ours.out", *own)]
    again = [json.loads(line) for line in select("nearest", tmp_path / "theirs.out", *theirs)]
    assert again == [{"question": row["prompt"], "said": row["response"]} for row in chosen] and chosen


@pytest.mark.parametrize(
    ("kind", "family"),
    [("core", "opt"), ("core", "gpt_neo"), ("nearest", "opt"), ("nearest", "gpt_neo"), ("hardest", "opt")],
)
def test_the_batch_size_does_not_change_the_choice(tiny, unlearned, tmp_path, kind, family) -> None:
    more = {
        "core": ["--contamination", "0.3"],
        "hardest": ["--baseline", tiny / family, "--keep", "0.5"],
        "nearest": ["--retain_file", tiny / "retain.jsonl"],
    }[kind]
    model = unlearned if kind == "hardest" else tiny / family
    if kind == "core":
        pytest.importorskip("sklearn")
    flags = ["--model", model, "--train_file", tiny / "forget.jsonl", *more]
    chosen = {tuple(select(kind, tmp_path / size, *flags, "--batch_size", size)) for size in ("1", "5", "64")}
    assert len(chosen) == 1
    total = 18 if kind == "nearest" else 23
    assert 0 < len(chosen.pop()) < total


def test_hardest_are_the_records_that_were_not_forgotten(tiny, unlearned, tmp_path, capsys) -> None:
    flags = ["--model", unlearned, "--baseline", tiny / "opt", "--train_file", tiny / "forget.jsonl"]
    lines = (tiny / "forget.jsonl").read_text().splitlines()
    assert select("hardest", tmp_path / "half.jsonl", *flags, "--keep", "0.48") == lines[1::2]
    said = capsys.readouterr().err
    assert "11 of 23 records (11 of 23 rows) are forgotten least" in said
    some = select("hardest", tmp_path / "some.jsonl", *flags)
    assert len(some) == 2 and set(some) < set(lines[1::2])
    # the other way round, the one that was trained on the rest has "forgotten" the rest
    swapped = ["--model", tiny / "opt", "--baseline", unlearned, "--train_file", tiny / "forget.jsonl"]
    assert select("hardest", tmp_path / "swapped.jsonl", *swapped, "--keep", "0.52") == lines[::2]


def test_a_baseline_with_another_tokenizer_is_refused(tiny, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny / "opt", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (next(token for token in vocabulary if token.endswith(end)) for end in "ta")
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ["--model", tiny / "opt", "--baseline", other, "--train_file", tiny / "forget.jsonl"]
    with pytest.raises(UserError, match=r"^--baseline .*forget.jsonl:1 are not those of --model"):
        select("hardest", tmp_path / "out.jsonl", *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_nearest_finds_every_records_twin_once_and_in_the_files_order(tiny, tmp_path, capsys) -> None:
    forget = [json.loads(line) for line in (tiny / "forget.jsonl").read_text().splitlines()][:6]
    twins = [{"prompt": row["prompt"], "response": row["rejected"][at % 2]} for at, row in enumerate(forget)]
    retain = [json.loads(line) for line in (tiny / "retain.jsonl").read_text().splitlines()]
    for at, twin in enumerate(twins[::-1]):
        retain.insert(1 + 3 * at, twin)
    data, keep = write(tmp_path / "f.jsonl", [*forget, forget[0]]), write(tmp_path / "r.jsonl", retain)
    flags = ["--model", tiny / "opt", "--train_file", data, "--retain_file", keep]
    chosen = select("nearest", tmp_path / "near.jsonl", *flags)
    assert [json.loads(line) for line in chosen] == twins[::-1]
    assert "6 of 24 records (6 of 24 rows) are nearest to 7 forget records; cosine 1.0000 in the mean, 1.0000" in (
        capsys.readouterr().err
    )
    more = select("nearest", tmp_path / "more.jsonl", *flags, "--per_example", "9")
    assert set(chosen) < set(more) and len(more) < 24
    everything = Path(keep).read_text().splitlines()
    assert select("nearest", tmp_path / "all.jsonl", *flags, "--per_example", "99") == everything


def test_the_output_reads_back_as_the_records_that_were_chosen(tiny, tmp_path) -> None:
    """In shapes of all kinds: merged rows, arrays, chats, odd white space."""
    pytest.importorskip("sklearn")
    chat = [{"role": "user", "content": sentence(4, 5)}]
    alternates = [
        {"question": sentence(at % 4, 4), "answer": "no no", "sub_answer": sentence(at, 3)} for at in range(8)
    ]
    (tmp_path / "a.json").write_text(json.dumps(alternates, indent=2))
    odd = '  {"prompt" :  "\u00fc\u2028 the \\u00fc", "chosen": "\\ud83d\\ude00", "rejected": ["x", "y" ]} \r\n\r\n'
    more = [
        {"prompt": chat, "chosen": "rain", "rejected": "snow", "extra": 1.10, "category": "weather"},
        {"prompt": sentence(9, 3), "response": "bad dog", "is_safe": False},
        {"prompt": sentence(9, 3), "response": "good dog", "is_safe": True},
    ]
    (tmp_path / "b.jsonl").write_bytes(("\ufeff" + odd + "".join(json.dumps(row) + "\n" for row in more)).encode())
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    out = tmp_path / "out.jsonl"
    chosen = select("core", out, "--model", tiny / "opt", "--train_file", *files, "--contamination", "0.3")
    records, again = read_forget(files), read_forget([out])
    strip = lambda record: (record.prompt, record.chosen, record.rejected, record.category)  # noqa: E731
    kept = [strip(record) for record in records if strip(record) in {strip(one) for one in again}]
    assert [strip(record) for record in again] == kept
    assert len(records) == 7 and len(again) == 5
    written = {line.rstrip("\r\n") for line in (odd, *(json.dumps(row) for row in more))}
    assert all(line in written for line in chosen if '"question"' not in line)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_share_the_weights_choose_what_one_process_does(
    pool, tiny, unlearned, tmp_path, capsys, ranks
) -> None:
    pytest.importorskip("sklearn")
    read = ["--train_file", tiny / "forget.jsonl", "--batch_size", "4"]
    kinds = {
        "core": ["--model", tiny / "opt", "--contamination", "0.5"],
        "hardest": ["--model", unlearned, "--baseline", tiny / "opt"],
        "nearest": ["--model", tiny / "opt", "--retain_file", tiny / "retain.jsonl"],
    }
    for kind, flags in kinds.items():
        assert select(kind, tmp_path / f"{kind}.jsonl", *read, *flags)
    said = told(capsys.readouterr().err)
    assert len(said) == len(kinds)
    lines = [[kind, "--output", tmp_path / f"ranks-{kind}.jsonl", *read, *flags] for kind, flags in kinds.items()]
    assert select_sharded(pool, ranks, *lines) == said
    for kind in kinds:
        assert (tmp_path / f"ranks-{kind}.jsonl").read_bytes() == (tmp_path / f"{kind}.jsonl").read_bytes()


def test_ranks_that_each_hold_the_model_choose_what_one_does(pool, tiny, unlearned, tmp_path, capsys) -> None:
    flags = ["--model", unlearned, "--baseline", tiny / "opt", "--train_file", tiny / "forget.jsonl", "--batch_size", 4]
    chosen = select("hardest", tmp_path / "one.jsonl", *flags)
    two = tmp_path / "two.jsonl"
    line = ["launch/select_records.py", "hardest", "--output", two, *flags]
    done = pool.run(2, "tests.commands:script", *map(str, line))
    assert done.returncode == 0, done.shown()
    assert two.read_text().splitlines() == chosen and told(done.output) == told(capsys.readouterr().err)


def test_data_of_unwanted_answers_alone_will_do(tiny, tmp_path) -> None:
    data = write(tmp_path / "qa.jsonl", [{"question": sentence(at, 4), "answer": sentence(at, 2)} for at in range(9)])
    flags = ["--model", tiny / "opt", "--train_file", data, "--retain_file", data]
    assert select("nearest", tmp_path / "out.jsonl", *flags) == Path(data).read_text().splitlines()
    assert len(read_retain([tmp_path / "out.jsonl"])) == 9


def test_a_limit_leaves_the_rest_of_the_files_alone(tiny, unlearned, tmp_path, capsys) -> None:
    flags = ["--model", unlearned, "--baseline", tiny / "opt", "--train_file", tiny / "forget.jsonl", "--limit", "6"]
    lines = (tiny / "forget.jsonl").read_text().splitlines()
    assert select("hardest", tmp_path / "out.jsonl", *flags, "--keep", "0.5") == lines[1:6:2]
    assert "3 of 6 records (3 of 6 rows)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("core", {"--model": "./nowhere"}, "--model ./nowhere: there is no such folder"),
        ("core", {"--train_file": "nowhere.jsonl"}, "nowhere.jsonl: can't be read"),
        ("core", {"--train_file": "README.md"}, "README.md:1"),
        ("core", {"--output": "README.md"}, "--output README.md exists: remove it, or name another file"),
        ("core", {"--output": "README.md/out.jsonl"}, "--output README.md/out.jsonl"),
        ("core", {"--limit": "1"}, "a single record has no outliers"),
        ("core", {"--prompt_template": "no field"}, "--prompt_template"),
        ("hardest", {"--baseline": "./nowhere"}, "--baseline ./nowhere: there is no such folder"),
        ("nearest", {"--retain_file": "nowhere.jsonl"}, "nowhere.jsonl: can't be read"),
        ("nearest", {"--retain_file": "/dev/null"}, "--retain_file /dev/null: is a pipe or a device"),
    ],
)
def test_a_mistake_is_one_that_names_its_flag(tiny, tmp_path, kind, change, said) -> None:
    given = {"--model": tiny / "opt", "--train_file": tiny / "forget.jsonl", "--output": tmp_path / "out" / "o.jsonl"}
    given |= {"hardest": {"--baseline": tiny / "opt"}, "nearest": {"--retain_file": tiny / "retain.jsonl"}}.get(
        kind, {}
    )
    with pytest.raises(UserError) as caught:
        run([kind, *(str(part) for pair in (given | change).items() for part in pair)])
    assert said in str(caught.value)
    assert not list(tmp_path.rglob("*o.jsonl*"))


@pytest.mark.parametrize(
    "flags",
    [
        ["core", "--contamination", "0.6"],
        ["core", "--contamination", "0"],
        ["core", "--seed", "-1"],
        ["core", "--seed", "4294967296"],
        ["hardest", "--keep", "1.5"],
        ["nearest", "--per_example", "0"],
        ["core", "--limit", "0"],
    ],
)
def test_a_value_out_of_range_is_refused(flags) -> None:
    with pytest.raises(UserError, match=rf"^{flags[1]} must be a .*got '{flags[2]}'$"):
        run(flags)


def test_without_scikit_learn_one_line_says_what_to_install(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'wpn-ds\[eval\]'"):
        select("core", tmp_path / "o", "--model", tiny / "opt", "--train_file", tiny / "forget.jsonl")
