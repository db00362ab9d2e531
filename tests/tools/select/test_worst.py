"""The worst-case forget set: the projection, the search on losses that are known, and the search on a model."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import sentence
from tests.tools.select.conftest import select, select_sharded, told, write
from wpn_ds.data.plan import Segment
from wpn_ds.data.records import read_forget, read_retain
from wpn_ds.data.tokens import encode_answer
from wpn_ds.errors import UserError
from wpn_ds.evaluate.scoring import token_losses
from wpn_ds.settings.style import PromptStyle
from wpn_ds.tools.select.choosing import hardest, least, projected, worst_case
from wpn_ds.tools.select.command import Worst, run
from wpn_ds.tools.select.reading import Reader, Settings, Text
from wpn_ds.tools.select.unlearning import Unlearning, unlearning

HARD, RECORDS = [3, 8, 13, 18], 20


@settings(max_examples=50)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), data=st.data())
def test_the_projection_is_the_nearest_point_of_its_set(values, data) -> None:
    """A point x of a convex set is the nearest to p if (p - x) y is at most (p - x) x for all y of the set; over this
    set (p - x) y is largest where y is 1 at the ``total`` largest entries of p - x."""
    total = data.draw(st.integers(0, len(values)))
    point = torch.tensor(values, dtype=torch.float64)
    found = projected(point, total)
    assert found.dtype == torch.float64 and bool(((found >= 0) & (found <= 1)).all())
    assert float(found.sum()) == pytest.approx(total, abs=1e-9)
    apart = point - found
    assert float(apart @ found) == pytest.approx(float(apart.topk(total).values.sum()), abs=1e-6)
    torch.testing.assert_close(projected(found, total), found, atol=1e-9, rtol=0)


@settings(max_examples=50)
@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=12), share=st.floats(0.05, 0.95))
def test_the_projection_is_what_a_scan_of_all_shifts_finds(values, share) -> None:
    """The sum of clamp(p - shift, 0, 1) is linear between the shifts at which an entry meets 0 or 1."""
    point, total = torch.tensor(values, dtype=torch.float64), share * len(values)
    sum_at = lambda shift: float((point - shift).clamp(0, 1).sum())  # noqa: E731
    knots = sorted({*values, *(value - 1 for value in values)})
    left, right = next(pair for pair in pairwise(knots) if sum_at(pair[1]) <= total)
    shift = left + (right - left) * (sum_at(left) - total) / (sum_at(left) - sum_at(right))
    torch.testing.assert_close(projected(point, total), (point - shift).clamp(0, 1), atol=1e-8, rtol=0)


def losses_after(weights: Tensor) -> Tensor:
    """Two records that hardly can be forgotten, two that only seem so as long as nobody tries, and four others."""
    kept = torch.tensor([1.0, 1, 0, 0, 4, 4, 4, 4], dtype=torch.float64)
    return kept + torch.tensor([0.0, 0, 3, 3, 3, 3, 3, 3], dtype=torch.float64) * weights


def test_the_search_ends_where_what_is_chosen_is_hard_to_forget_and_one_round_is_deceived() -> None:
    start = torch.full((8,), 0.25, dtype=torch.float64)
    objectives, weights = zip(*worst_case(losses_after, start, 60, 0.1), strict=True)
    assert least(-weights[0], 2) == [2, 3]
    assert least(-weights[-1], 2) == [0, 1]
    assert objectives[-1] < objectives[0]
    assert all(float(one.sum()) == pytest.approx(2) for one in weights)
    end, none = losses_after(weights[-1]), weights[-1] < 1e-6
    assert none.tolist() == [False] * 4 + [True] * 4
    torch.testing.assert_close(end[~none], torch.ones(4, dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_large_gamma_spreads_the_weights_and_the_objective_has_it() -> None:
    uneven = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    (objective, weights), *_ = worst_case(losses_after, uneven, 1, 1e-4, gamma=5e3)
    assert objective == pytest.approx(2 + 5e3 * 2)
    torch.testing.assert_close(weights, torch.full((8,), 0.25, dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory) -> Path:
    """``opt`` that has learnt to say the unwanted answers of ``forget.jsonl``; those of four are in ``retain.jsonl``
    too, so unlearning them alone leads nowhere."""
    folder = tmp_path_factory.mktemp("planted")
    rows = [{"prompt": sentence(k, 4), "rejected": sentence(k + 90, 4)} for k in range(RECORDS)]
    write(folder / "forget.jsonl", rows)
    write(folder / "retain.jsonl", [{"prompt": rows[k]["prompt"], "response": rows[k]["rejected"]} for k in HARD])
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    model = AutoModelForCausalLM.from_pretrained(tiny / "opt", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    style = PromptStyle("Question: {prompt}\nAnswer:")
    texts = [encode_answer(row["prompt"], row["rejected"], tokenizer, style, 128) for row in rows]
    for _ in range(40):
        optimizer.zero_grad()
        token_losses(model, texts, 1)[0].mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    files = ["--train_file", str(folder / "forget.jsonl"), "--retain_file", str(folder / "retain.jsonl")]
    return ["--model", str(folder), *files, "--keep", "0.2", "--learning_rate", "1e-3", *more]


def test_the_search_finds_records_that_are_hard_to_forget_where_one_round_does_not(planted, tmp_path, capsys) -> None:
    lines = (planted / "forget.jsonl").read_text().splitlines()
    chosen = select("worst", tmp_path / "out.jsonl", *flags(planted))
    assert chosen == [lines[at] for at in HARD]
    *rounds, said = [line for line in capsys.readouterr().err.splitlines() if "nats a token" in line]
    assert len(rounds) == 10 and rounds[0].startswith("round 1 of 10: objective ")
    assert "4 of 4 chosen records are new" in rounds[0] and "0 of 4 chosen records are new" in rounds[-1]
    assert said.startswith(f"{tmp_path / 'out.jsonl'}: 4 of 20 records (4 of 20 rows) are the worst case found")
    found, at_random = (float(part.split(" nats")[0].split(" at ")[-1]) for part in said.split(", those of"))
    first = float(rounds[0].split(" at ")[-1])
    assert found < first - 0.3 and found < at_random - 0.3
    single = select("worst", tmp_path / "single.jsonl", *flags(planted, "--rounds", "1"))
    assert len(single) == 4 and set(single) != set(chosen)


@contextlib.contextmanager
def unlearnt(folder: Path, **changes: Any) -> Iterator[tuple[Reader, list[list[Segment]], list[Segment], Unlearning]]:
    """(reader, unwanted answers a record, retain texts, what is under test) of a folder with a model and its data."""
    given = {"model": str(folder), "train_file": [], "output": folder, "learning_rate": 1e-3}
    options = Worst(**given | changes)
    reader = Reader("--model", str(folder), Settings(options.style(), 128, options.batch_size))
    records = read_forget([folder / "forget.jsonl"], alone=True)
    forget = [[text.segment for text in reader.unwanted(one)] for one in records]
    retain = [reader.retain(one).segment for one in read_retain([folder / "retain.jsonl"])]
    with unlearning(reader, forget, retain, options) as losses_after:
        yield reader, forget, retain, losses_after


def test_what_a_method_forgets_least_in_one_round_is_not_all_of_it(planted) -> None:
    """By the rise of the loss, as ``select hardest`` has it, once all records alike were unlearned."""
    everything = torch.ones(RECORDS, dtype=torch.float64)
    with unlearnt(planted) as (reader, forget, _, losses_after):
        after = losses_after(everything)
        texts = [Text(one, "") for answers in forget for one in answers]
        before = reader.nats(texts) / torch.tensor([one.segment.answer_length for one in texts])
    assert len({*hardest(before, after, 0.2)} & {*HARD}) < 4


def test_a_step_is_along_the_sign_of_the_gradient_of_the_weighted_losses(tiny, tmp_path) -> None:
    """Against the definition, one text at a time, on records with several unwanted answers, by weights that differ; and
    whatever the batch size, and again."""
    folder = tmp_path / "opt"
    shutil.copytree(tiny / "opt", folder)
    for name in ("forget", "retain"):
        shutil.copy(tiny / f"{name}.jsonl", folder)
    weights = torch.linspace(0, 1, 23, dtype=torch.float64)
    found = []
    for size in (5, 64):
        with unlearnt(folder, steps=1, batch_size=size) as (_, forget, retain, losses_after):
            found.append(losses_after(weights))
            assert not torch.equal(losses_after(weights.flip(0)), found[-1])  # of which nothing is left
            torch.testing.assert_close(losses_after(weights), found[-1], atol=0, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def mean(texts: Sequence[Segment]) -> Tensor:
        nats = sum(token_losses(model, [text], 1)[0].sum() for text in texts)
        return nats / sum(text.answer_length for text in texts)

    shares = weights / weights.sum()
    (mean(retain) - sum(share * mean(some) for share, some in zip(shares, forget, strict=True))).backward()
    with torch.no_grad():
        before = torch.stack([mean(some) for some in forget])
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad.sign()
        expected = torch.stack([mean(some) for some in forget])
    assert (expected - before).abs().max() > 0.05
    for losses in found:
        torch.testing.assert_close(losses, expected.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("more", [["--rounds", "2"], ["--rounds", "1", "--steps", "2", "--lora_r", "2"]])
def test_a_rerun_says_the_same_and_another_batch_size_chooses_the_same(planted, tmp_path, capsys, more) -> None:
    runs = []
    for at, size in enumerate(("32", "32", "3")):
        chosen = select("worst", tmp_path / f"{at}.jsonl", *flags(planted, *more, "--batch_size", size))
        said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines() if "nats a token" in line]
        runs.append((chosen, said))
    assert runs[0] == runs[1] and len(runs[0][1]) == int(more[1]) + 1
    assert runs[2][0] == runs[0][0]


def test_ranks_that_share_the_weights_find_what_one_process_does(pool, planted, tmp_path, capsys) -> None:
    cases = {"whole": ["--rounds", "2", "--steps", "2"]}
    cases["adapters"] = ["--rounds", "1", "--steps", "2", "--lora_r", "2"]
    for name, more in cases.items():
        select("worst", tmp_path / f"{name}.jsonl", *flags(planted, *more))
    figures = [re.findall(r"[-\d.]+", line) for line in told(capsys.readouterr().err)]
    assert len(figures) == 3 + 2
    lines = [["worst", "--output", tmp_path / f"2-{name}.jsonl", *flags(planted, *cases[name])] for name in cases]
    found = [re.findall(r"[-\d.]+", line) for line in select_sharded(pool, 2, *lines)]
    for name in cases:
        assert (tmp_path / f"2-{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    for one, other in zip(figures, found, strict=True):  # rounding decides the sign of a gradient that is all but 0
        assert [float(number) for number in other] == pytest.approx([float(number) for number in one], abs=0.01)


def test_ranks_that_each_hold_the_model_are_refused(planted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wpn_ds.evaluate.ranks.join_ranks", lambda shared: (0, 2))
    with pytest.raises(UserError, match=r"^select worst: .*give --share_weights"):
        run(["worst", "--output", str(tmp_path / "out.jsonl"), *flags(planted)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--bf16"], r"--bf16: .*give --lora_r"),
        (["--learning_rate", "1e30"], r"--learning_rate: .* not finite"),
        (["--learning_rate", "0"], r"--learning_rate must be"),
        (["--keep", "1.1"], r"--keep must be"),
        (["--retain_file", "/dev/null"], r"--retain_file /dev/null: is a pipe or a device"),
    ],
)
def test_a_mistake_is_refused_in_a_line_and_nothing_is_written(planted, tmp_path, changes, said) -> None:
    with pytest.raises(UserError, match=rf"^{said}"):
        run(["worst", "--output", str(tmp_path / "out.jsonl"), *flags(planted, *changes)])
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_of_no_file_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--retain_columns: of no file: give --retain_file as well"):
        run(["worst", "--model", "x", "--train_file", "y", "--output", "z", "--retain_columns", "prompt=ask"])
