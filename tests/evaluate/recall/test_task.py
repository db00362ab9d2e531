"""``wpn-ds evaluate --suite muse,rwku``: from answers and log-likelihoods to figures, ranks and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.evaluate.recall.conftest import write_muse, write_rwku
from tests.interface import check_report
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.command import run
from wpn_ds.evaluate.recall.data import read_muse, read_rwku
from wpn_ds.evaluate.recall.task import Membership, RecallAnswers, RecallTask, until
from wpn_ds.evaluate.report.command import run as report
from wpn_ds.evaluate.results import Recall
from wpn_ds.judging.membership import privleak

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")


def figures_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["recall"]


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> list[str]:
    base = tmp_path_factory.mktemp("sets")
    return ["--muse_dir", str(write_muse(base / "news")), "--rwku_dir", str(write_rwku(base / "All"))]


@pytest.fixture(scope="module")
def models(roomy, tokenizer, tmp_path_factory) -> tuple[str, str]:
    """A model, and another as if it had never seen some texts."""
    base = tmp_path_factory.mktemp("models")
    for name in ("after", "retain"):
        roomy.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
        with torch.no_grad():
            roomy.get_input_embeddings().weight += torch.randn_like(roomy.get_input_embeddings().weight)
    return str(base / "after"), str(base / "retain")


@pytest.fixture(scope="module")
def evaluated(models, dirs, tmp_path_factory) -> tuple[Path, Path]:
    """The retain-only model's evaluation, and the other's held against it and compared with it."""
    base = tmp_path_factory.mktemp("evaluated")
    common = ["--suite", "muse,rwku", *dirs, "--batch_size", "2"]
    assert run(["--model", models[1], *common, "--output_dir", str(base / "retain")]) == 0
    log = ["--muse_retain_log", str(base / "retain" / "muse.json"), "--baseline", models[1]]
    assert run(["--model", models[0], *common, *log, "--output_dir", str(base / "after")]) == 0
    return base / "retain", base / "after"


def test_every_set_has_its_rouge_with_n_and_interval_and_a_change_against_the_baseline(evaluated, capsys) -> None:
    retain, after = map(figures_of, evaluated)
    assert list(after["rouge"]) == [
        *("muse/verbmem", "muse/knowmem_forget", "muse/knowmem_retain"),
        *(f"rwku/forget_level{k}" for k in (1, 2, 3)),
        *(f"rwku/neighbor_level{k}" for k in (1, 2)),
    ]
    for name, one in after["rouge"].items():
        assert one["low"] <= one["value"] <= one["high"] and one["n"] == len(one["scores"]) in (3, 4), name
    assert after["rouge"]["muse/knowmem_retain"]["group"] == "kept" == after["rouge"]["rwku/neighbor_level1"]["group"]
    assert retain["privleak"] is None and after["privleak"]["n"] == after["auc"]["n"] == 9
    assert after["privleak"]["value"] == pytest.approx(privleak(after["auc"]["value"], retain["auc"]["value"]))
    check_report(json.loads((evaluated[1] / "report.json").read_text(encoding="utf-8")))
    assert report([str(evaluated[1])]) == 0
    shown, page = capsys.readouterr().out, (evaluated[1] / "report.html").read_text()
    for title in ("muse/verbmem, ROUGE-L, %", "rwku/neighbor_level2, ROUGE-L, %", "PrivLeak, %"):
        assert title in shown and title in page
    assert "verbmem/forget.json (sha256 " in page


def test_runs_of_a_sequence_stand_side_by_side(evaluated, tmp_path, capsys) -> None:
    assert report([*map(str, evaluated), "--output_dir", str(tmp_path)]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("muse/knowmem_retain")]
    assert line.count("[") == 2 and "muse/knowmem_retain" in (tmp_path / "compare.html").read_text().lower()


def test_a_model_held_against_itself_leaks_nothing(evaluated, models, dirs, tmp_path) -> None:
    log = ["--muse_retain_log", str(evaluated[0] / "muse.json")]
    assert run(["--model", models[1], "--suite", "muse", *dirs, *log, "--output_dir", str(tmp_path)]) == 0
    leak = figures_of(tmp_path)["privleak"]
    assert (leak["value"], leak["low"], leak["high"]) == pytest.approx((0, 0, 0))


def test_a_retain_only_model_that_knows_every_text_gives_no_privleak(dirs, tokenizer) -> None:
    data = read_muse(Path(dirs[1]))
    knowing = Membership("m", {}, (0.0,) * 5, (-1.0,) * 4)
    asked = {length: Asking(max_new_tokens=length) for length in (32, 128)}
    made = RecallAnswers(RecallTask(data, knowing), asked, tokenizer)
    results = {unit.key: ([0.0] if "privleak" in unit.name else [""]) * unit.size for unit in made.units}
    found = made.figures(results, "m")
    assert found.privleak is None and found.auc is not None and found.auc.value == 0.5
    assert Recall.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_min_k_is_that_of_a_plain_forward_pass(evaluated, models, dirs, tokenizer) -> None:
    model, texts = AutoModelForCausalLM.from_pretrained(models[1]).eval(), read_muse(Path(dirs[1])).texts
    log = json.loads((evaluated[0] / "muse.json").read_text())
    for kind, of in texts.items():
        for text, found in zip(of, log[kind], strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                log_probs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            lowest = log_probs.sort().values[: int(0.4 * len(log_probs))]
            assert found == pytest.approx(lowest.mean().item(), rel=1e-4)


def answers(task: RecallTask, tokenizer, said: str) -> dict[str, list[float]]:
    """The scores of every item if the model said ``said`` to all."""
    asked = {length: Asking(max_new_tokens=length) for length in (30, 32, 128)}
    made = RecallAnswers(task, asked, tokenizer)
    results: dict[str, Any] = {unit.key: [0.0 if "privleak" in unit.name else said] * unit.size for unit in made.units}
    return {name: list(one.scores) for name, one in made.figures(results, "m").rouge.items()}


def test_rouge_is_that_of_the_rouge_score_package_of_the_answer_up_to_its_end(dirs, tokenizer) -> None:
    said = " King of water 1, with a cloth and water.\n\nQuestion: water 0"
    score = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score
    muse, rwku = read_muse(Path(dirs[1])), read_rwku(Path(dirs[3]))
    found = answers(RecallTask(muse), tokenizer, said) | answers(RecallTask(rwku), tokenizer, said)
    first = said.strip().split("\n")[0]
    for record, got in zip(muse.sets["muse/knowmem_forget"].records, found["muse/knowmem_forget"], strict=True):
        assert got > 0 and got == pytest.approx(score(record.chosen[0], first)["rougeL"].fmeasure)
    assert found["rwku/forget_level2"] == [1.0] * 3, "recall of King"
    verbatim = muse.sets["muse/verbmem"].records[0].chosen[0]
    known = tokenizer.decode(tokenizer(verbatim, add_special_tokens=False).input_ids[:128])
    assert len(known) < len(verbatim)
    assert found["muse/verbmem"][0] == pytest.approx(score(known, said)["rougeL"].fmeasure)
    assert answers(RecallTask(muse), tokenizer, known)["muse/verbmem"][0] == 1


def test_an_answer_ends_before_the_first_of_its_ends() -> None:
    assert until("\n a b\nQuestion: c\n\nd", ("\n\n", "\nQuestion")) == "a b" and until(" a", ()) == "a"


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        (
            None,
            ["--muse_retain_log", "{log}", "--limit", "2"],
            "is of other texts: evaluate the retain-only model with",
        ),
        ({"forget": "x"}, ["--muse_retain_log", "{log}"], r"is no muse\.json: evaluate the retain-only model with"),
        ({"holdout": [0.0]}, ["--muse_retain_log", "{log}"], "is of other texts"),
    ],
)
def test_a_log_of_another_kind_is_refused_in_one_line(change, flags, says, evaluated, models, dirs, tmp_path) -> None:
    log = tmp_path / "log.json"
    log.write_text(json.dumps({**json.loads((evaluated[0] / "muse.json").read_text()), **(change or {})}))
    line = ["--model", models[0], "--suite", "muse", *dirs, *(flag.format(log=log) for flag in flags)]
    with pytest.raises(UserError, match=says) as caught:
        run([*line, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


def test_what_is_named_must_be_given(models, folders, dirs, tmp_path) -> None:
    with pytest.raises(UserError, match="--suite muse: no --muse_dir: name the folder of one corpus of MUSE"):
        run(["--model", models[0], "--suite", "muse", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--muse_retain_log x: is for the suite muse: give --muse_dir"):
        run(["--model", models[0], "--muse_retain_log", "x", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"tokens of an answer 128: .* has only 96 positions"):
        run(["--model", str(folders / "opt"), "--suite", "muse", *dirs, "--output_dir", str(tmp_path)])
