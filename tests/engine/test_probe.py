"""The probe during training: its figures, stopping early, and the checkpoint that is kept as the best."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

import wpn_ds.cli
from tests.engine.runs import REFERENCE_WPN, cached, losses, metrics, same_weights
from tests.engine.test_checkpoint import made, saver_of
from tests.interface import check_metrics, metric_names
from tests.pool import Pool
from wpn_ds.data.records import ForgetRecord
from wpn_ds.engine import checkpoint
from wpn_ds.engine.finish import choose_weights
from wpn_ds.engine.probe import Probe, figures, improves, summary
from wpn_ds.engine.resume import past_of
from wpn_ds.jobs.distributed import World
from wpn_ds.judging.base import Judgement, Verdict
from wpn_ds.models.load import Source
from wpn_ds.settings.run import Config, LoggingConfig

EVALUATED = {"eval/retain_perplexity": 2.0, **figures([Judgement(Verdict.HARMLESS), Judgement(Verdict.HARMFUL)])}


def records(count: int, wanted: str = "good", unwanted: str = "bad") -> list[ForgetRecord]:
    return [ForgetRecord(f"cat {k}", (f"{wanted} {k}",), (f"{unwanted} {k}",), f"f:{k}") for k in range(count)]


def probe_of(tiny: Path, data: list[ForgetRecord], size: int, positions: int = 128) -> Probe:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    return Probe.of(data, tokenizer, "Q: {prompt}", size=size, max_length=64, tokens=16, positions=positions)


@pytest.mark.parametrize(
    ("count", "size", "chosen"), [(10, 4, [0, 2, 5, 7]), (3, 8, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (5, 0, [])]
)
def test_prompts_are_taken_at_equal_distances(tiny, count, size, chosen) -> None:
    assert [case.wanted for case in probe_of(tiny, records(count), size).cases] == [(f"good {k}",) for k in chosen]


def test_an_answer_has_the_room_that_the_longest_prompt_leaves(tiny) -> None:
    longest = max(map(len, probe_of(tiny, records(3), 3).prompts))
    assert probe_of(tiny, records(3), 3, positions=longest + 5).tokens == 5


def test_words_that_the_judge_can_t_read_give_no_figures(tiny) -> None:
    for wanted, unwanted in (("да", "bad"), ("good", "нет")):
        probe = probe_of(tiny, [replace(r, chosen=(wanted,), rejected=(unwanted,)) for r in records(3)], 3)
        assert probe.judge is None and figures(probe.judgements(["a", "b", "c"])) == {}


def test_degenerate_answers_are_not_harmless_and_count_apart(tiny) -> None:
    judgements = probe_of(tiny, records(4), 4).judgements(["good 0", " ", "bad 2", "bad good good good good good good"])
    assert [j.verdict for j in judgements] == [Verdict.HARMLESS, Verdict.EMPTY, Verdict.HARMFUL, Verdict.REPETITIVE]
    values = figures(judgements)
    assert (values["eval/harmless_rate"], values["eval/degenerate_rate"], values["eval/probe_n"]) == (0.25, 0.5, 4)
    assert values["eval/harmless_low"] < 0.25 < values["eval/harmless_high"]


def test_a_line_says_what_was_found() -> None:
    values = figures([Judgement(Verdict.HARMLESS)] * 56 + [Judgement(Verdict.HARMFUL)] * 8)
    assert summary(values, None) == "harmless 87.5 % [77.2, 93.5], n 64"
    line = summary(values | {"eval/retain_perplexity": 1.03}, 1.02)
    assert line == "harmless 87.5 % [77.2, 93.5], n 64, retain perplexity 1.03 (x 1.01)"
    assert summary({}, None) == ""


@pytest.mark.parametrize(
    ("rate", "perplexity", "better"),
    [
        *((0.6, 2.0, True), (0.6, 2.1, True), (0.6, 2.2, False), (0.6, math.nan, False), (0.6, math.inf, False)),
        *((0.5, 1.9, True), (0.5, 2.0, False), (0.4, 1.0, False)),
    ],
)
def test_the_best_is_the_most_harmless_within_the_bound_and_then_the_least_perplexed(rate, perplexity, better) -> None:
    values = {"eval/harmless_rate": rate, "eval/retain_perplexity": perplexity}
    assert improves(values, EVALUATED, highest_perplexity=2.1) == better
    assert improves(values, {}, highest_perplexity=2.1) == (perplexity <= 2.1)


@pytest.fixture(scope="module")
def run(pool: Pool, tiny: Path) -> Callable[..., str]:
    """Trains the tiny model, or ``model``, into a folder with the flags that follow; with ``script``, which says how
    many answers are harmless at each step, and with ``blow``, the signal that rank 1 gets in an evaluation."""

    def ended(
        out: Path,
        *extra: str,
        ranks: int,
        ds: str,
        model: Path = tiny / "opt",
        script: dict[int, int] | None = None,
        blow: tuple[int, signal.Signals] | None = None,
    ) -> str:
        line = [
            *("launch/train.py", "--deepspeed", f"ds_configs/{ds}.json", "--model_name_or_path", str(model)),
            *("--train_file", str(tiny / "forget.jsonl"), "--retain_file", str(tiny / "retain.jsonl")),
            *("--output_dir", str(out), "--peak_tflops", "0.1", "--max_length", "64"),
            *("--tokens_per_micro_batch", "512", *extra),
        ]
        if script is None:
            job = pool.run(ranks, "tests.commands:script", *line, env=cached(tiny))
        else:
            job = pool.run(ranks, "tests.engine.probe_worker:train", line, script, blow, env=cached(tiny))
        killed = blow is not None and blow[1] == signal.SIGKILL
        assert job.returncode == (-signal.SIGKILL if killed else 0), job.shown()
        return job.output

    return ended


def evaluations(out: Path) -> list[dict]:
    return [m for m in metrics(out) if "eval/harmless_rate" in m]


def samples(out: Path, step: int) -> list[str]:
    """What TensorBoard shows of the answers after ``step``."""
    board = EventAccumulator(str(out / "runs"), size_guidance={"tensors": 0})
    board.Reload()
    written = [{e.step: e.tensor_proto for e in board.Tensors(f"samples/{k}/text_summary")} for k in range(23)]
    return [of_prompt[step].string_val[0].decode() for of_prompt in written]


def kept(out: Path) -> list[int]:
    return [step for step, _ in checkpoint.complete(out)]


LEARN = ["--global_batch_size", "23", "--learning_rate", "1e-2", "--wpn_weight", "0", "--retain_loss", "nll"]
LEARN += ["--sample_tokens", "24", "--sample_prompts", "23", "--logging_steps", "7"]


def test_a_run_stops_early_and_what_it_exports_is_what_two_ranks_under_zero_3_measure(run, tmp_path, capsys) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    stop = ["--eval_steps", "90", "--early_stopping", "harmless>=0.5", "--max_steps", "200", "--save_steps", "0"]
    text = run(out, *LEARN, *stop, ranks=1, ds="zero0")
    *before, last = evaluations(out)
    assert before and all(m["eval/harmless_rate"] < 0.5 for m in before) and last["eval/harmless_rate"] >= 0.5
    step = last["step"]
    assert step == 90 * len(before) < 200, "the first evaluation that is harmless enough ends the run"
    assert step % 7 and losses(out)[-1][0] == step, "its last steps have a line of metrics, though none was due"
    assert step == last["eval/best_step"] and kept(out)[-1] == step
    outcome = next(line for line in text.splitlines() if line.startswith("stopped early, harmless>=0.5: step"))
    assert outcome in (out / "README.md").read_text() and outcome in (out / "run.yaml").read_text()
    assert f": {step} optimizer steps" in (out / "README.md").read_text() and (out / "DONE").exists()

    written = sorted((out / "metrics.jsonl").read_text().splitlines())
    model = (out / "model.safetensors").read_bytes()
    text = run(out, *LEARN, *stop, "--resume_from_checkpoint", "auto", ranks=1, ds="zero0")
    assert outcome in text and f"step {step + 1}" not in text and (out / "DONE").exists(), "a run that is over stays so"
    assert sorted((out / "metrics.jsonl").read_text().splitlines()) == written
    assert (out / "model.safetensors").read_bytes() == model
    assert wpn_ds.cli.main(["status", str(out)]) == 0
    said = capsys.readouterr().out
    assert "ended well" in said and f"evaluation: step {step}: harmless" in said and "left" not in said

    run(again, *LEARN, "--max_steps", "1", "--learning_rate", "0.1", ranks=2, ds="zero3", model=out)
    first, second = evaluations(again)
    for name in ("harmless_rate", "harmless_low", "harmless_high", "degenerate_rate", "probe_n"):
        assert first[f"eval/{name}"] == last[f"eval/{name}"]
    assert first["eval/probe_n"] == 23, "three batches, the last of them short, for two ranks"
    assert first["eval/retain_perplexity"] == pytest.approx(last["eval/retain_perplexity"], rel=1e-5)
    answers = samples(out, step)
    assert samples(again, 0) == answers
    assert len({answer.partition("Answer:")[2] for answer in answers}) > 15, "answers that could not be mixed up"
    assert sum(answer.endswith("[harmless]") for answer in answers) == round(23 * last["eval/harmless_rate"])
    assert samples(again, 1) != answers, "later answers are those of later weights"
    assert "eval/best_step" not in second


def chosen(world: World, out: Path, **validation: Any) -> tuple[int, str]:
    """What is exported after the last of nine steps, whose evaluations left the state ``validation``."""
    logging = LoggingConfig(early_stopping="harmless>=0.9", eval_steps=1)
    job: Any = SimpleNamespace(config=SimpleNamespace(logging=logging), world=world, output_dir=out, total_steps=9)
    saver: Any = SimpleNamespace(rotate=lambda step, best_step: None)
    begun: Any = SimpleNamespace(**{"start_perplexity": 2.0, "best_step": 0, "best": {}, **validation})
    return choose_weights(job, None, saver, begun, SimpleNamespace(empty=False), 9)  # type: ignore[arg-type]


def test_the_last_weights_are_exported_and_that_is_said_where_there_are_no_better_ones(world, tmp_path) -> None:
    step, said = chosen(world, tmp_path)
    assert step == 9 and "last step's: no evaluation had the retain perplexity within 1.05 times" in said
    step, said = chosen(world, tmp_path, best_step=9, best=EVALUATED)
    assert (step, said.partition(",")[0]) == (9, "the last is the best: step 9")
    made(tmp_path, world, 4)
    next((tmp_path / "checkpoint-4" / "state").iterdir()).write_bytes(b"?")
    step, said = chosen(world, tmp_path, best_step=4, best=EVALUATED)
    assert step == 9 and "checkpoint-4, the best, is damaged" in said


def test_a_best_checkpoint_that_is_gone_is_forgotten_and_without_early_stopping_any_is(world, tmp_path, capsys) -> None:
    config = Config.from_flat({"output_dir": str(tmp_path)}).resolved()
    stopping = config.replace(early_stopping="harmless>=0.9", eval_steps=1)
    validation = {"evaluated": False, "start_perplexity": 2.0, "best_step": 2, "best": EVALUATED}
    past = checkpoint.TrainerState(3, 1, "data", "model", config.to_flat(), parts={"validation": validation})
    for step in (2, 3):
        saver_of(tmp_path, world, keep=2).save(replace(past, step=step))

    def of(config: Config) -> dict[str, Any]:
        identity = replace(past, step=0, parts={})
        found = past_of(config, identity, tmp_path / "checkpoint-3", 9, Source(str(tmp_path)), world)
        assert found.step == 3 and found.parts.keys() == {"validation"}
        return found.parts["validation"]

    assert of(stopping) == validation
    forgotten = validation | {"best_step": 0, "best": {}}
    assert of(config) == forgotten and "gone" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert of(stopping) == forgotten and "checkpoint-2, that of" in capsys.readouterr().err


SCRIPT = {0: 23, 1: 3, 2: 9, 3: 12, 4: 5, 5: 7}
BEST = ["--global_batch_size", "6", "--learning_rate", "1e-3", "--max_steps", "5", "--dropout", "0.2"]
BEST += ["--sample_tokens", "4", "--save_steps", "2", "--save_total_limit", "1", "--eval_steps", "1"]
BEST += ["--early_stopping", "harmless>=0.9", "--retain_bound", "2"]


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory) -> Path:
    """A run whose third of five steps is the best, under ZeRO-3 on two ranks."""
    out = tmp_path_factory.mktemp("best") / "out"
    text = run(out, *BEST, ranks=2, ds="zero3", script=SCRIPT)
    assert "the weights are those of the best evaluation: step 3, harmless 52.2 %" in text
    return out


def exported(path: Path, out: Path) -> Path:
    assert wpn_ds.cli.main(["checkpoint", "export", str(path), "--output_dir", str(out)]) == 0
    return out


def test_the_best_checkpoint_is_kept_and_exported(unbroken, tmp_path) -> None:
    assert [m["eval/best_step"] for m in evaluations(unbroken)[1:]] == [1, 2, 3, 3, 3], "the start is no candidate"
    assert kept(unbroken) == [3, 5], "the best one beside the newest one"
    assert same_weights(unbroken, exported(unbroken / "checkpoint-3", tmp_path / "best"))
    assert not same_weights(unbroken, exported(unbroken / "checkpoint-5", tmp_path / "last"))
    check_metrics(metric_names(unbroken / "metrics.jsonl"), "--probe_prompts", *REFERENCE_WPN, "--early_stopping")
    card = (unbroken / "README.md").read_text()
    assert (
        ": 3 optimizer steps" in card
        and "best evaluation: step 3" in card
        and "| eval/harmless_rate | 0.5217 |" in card
    )


def test_evaluations_that_are_broken_off_are_repeated_and_the_run_ends_the_same(unbroken, run, tmp_path) -> None:
    out = tmp_path / "out"
    go = {"ranks": 2, "ds": "zero3", "script": SCRIPT}
    run(out, *BEST, **go, blow=(3, signal.SIGUSR1))  # told to stop in the evaluation of what will be best
    assert (out / "REQUEUE").exists() and [m["step"] for m in evaluations(out)] == [0, 1, 2] and kept(out) == [2, 3]
    run(out, *BEST, "--resume_from_checkpoint", "auto", **go, blow=(4, signal.SIGKILL))
    assert [m["step"] for m in evaluations(out)] == [0, 1, 2, 3] and not (out / "DONE").exists()
    text = run(out, *BEST, "--resume_from_checkpoint", "auto", **go)
    assert "checkpoint-3 after step 3" in text
    assert losses(out) == losses(unbroken) and evaluations(out) == evaluations(unbroken)
    assert same_weights(out, unbroken) and kept(out) == kept(unbroken)


def test_the_best_weights_of_two_ranks_are_exported_by_one(unbroken, run, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    (out / "model.safetensors").unlink()
    text = run(out, *BEST, "--resume_from_checkpoint", "auto", ranks=1, ds="zero3", script=SCRIPT)
    assert "checkpoint-5 after step 5" in text and text.count("converting") == 2
    assert same_weights(out, unbroken)


def test_the_best_checkpoint_is_exported_when_saved_in_the_background_under_zero_2(run, tmp_path) -> None:
    out = tmp_path / "out"
    extra = ["--async_save", "--max_steps", "3", "--bf16"]
    run(out, *BEST, *extra, ranks=2, ds="zero2", script={0: 0, 1: 5, 2: 9, 3: 4})
    assert kept(out) == [2, 3]
    assert same_weights(out, exported(out / "checkpoint-2", tmp_path / "best"))
    assert not same_weights(out, exported(out / "checkpoint-3", tmp_path / "last"))
