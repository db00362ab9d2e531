"""Unwanted answers drawn anew in training, and examples that leave it once they are forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from tests.engine import runs
from tests.engine.gradient_cases import make_examples
from tests.engine.redraw_worker import DECAY, STEPS
from tests.engine.runs import cached, flags, losses, metrics, same_weights
from tests.engine.small import CONFIG
from tests.interface import check_metrics, metric_names
from tests.launching import ROOT
from tests.models.families import make
from wpn_ds.data.examples import answer_ids, build_examples
from wpn_ds.data.records import read_forget
from wpn_ds.data.seeds import seed_of
from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import encode_prompt, end_of
from wpn_ds.engine import checkpoint
from wpn_ds.engine.redraw import check_redraw, redraw_requests
from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import World
from wpn_ds.models.generate import Sampling, generate_ids
from wpn_ds.objectives.terms import Role, Terms
from wpn_ds.settings.run import Config, DataConfig
from wpn_ds.settings.style import PromptStyle
from wpn_ds.tools.checkpoint import run as checkpoint_command


@pytest.fixture(scope="module")
def train(pool, tiny) -> Callable[..., str]:
    """Runs the tiny model's training into a folder, with the flags that follow; returns what it says."""

    def run(out: Path, *extra: str, ranks: int = 2, code: int = 0) -> str:
        line = flags(tiny, out, "--probe_prompts", "0", "--lr_scheduler_type", "constant", *extra)
        return runs.train(pool, line, cached(tiny), ranks=ranks, code=code)

    return run


REDRAW = ["--objective", "simnpo", "--redraw_steps", "2", "--redraw_tokens", "8", "--redraw_ema", "0.5"]


@pytest.fixture(scope="module")
def redrawn(train, tmp_path_factory) -> Path:
    """Four steps; answers are drawn before the first and before the third."""
    out = tmp_path_factory.mktemp("redrawn") / "out"
    train(out, *REDRAW, "--max_steps", "4", "--save_steps", "1", "--save_total_limit", "9")
    return out


def drawn(out: Path, step: int) -> dict[int, list[int]]:
    state = checkpoint.read_state(out / f"checkpoint-{step}")
    assert state is not None
    return {i: ids for i, ids in state.parts["feed"]["drawn"]}


def test_the_first_answers_are_those_that_the_starting_model_draws_by_itself(redrawn, tiny) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny / "opt", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    records, first = read_forget([str(tiny / "forget.jsonl")]), drawn(redrawn, 1)
    assert len(first) == 12, "two steps of six examples are ahead"
    for i, ids in first.items():
        prompt = encode_prompt(records[i].prompt, tokenizer, "Question: {prompt}\nAnswer:", 64)
        said = generate_ids(
            lm, tokenizer, [prompt], max_new_tokens=8, batch_size=1, sampling=Sampling([seed_of(42, 1, i)])
        )[0]
        assert ids == ([*said, 2] if len(said) < 8 else said)
    assert first == drawn(redrawn, 2) and first.keys() != drawn(redrawn, 3).keys()


def test_drawn_answers_are_trained_on(redrawn, train, tmp_path) -> None:
    train(tmp_path / "own", "--objective", "simnpo", "--max_steps", "4")
    assert not same_weights(redrawn, tmp_path / "own")
    taken = [m["redraw/taken"] for m in metrics(redrawn) if "redraw/taken" in m]
    assert len(taken) == 2 and min(taken) > 0.5
    check_metrics(metric_names(redrawn / "metrics.jsonl"), "--validation_file", "simnpo", "--redraw_steps")


def test_a_run_with_drawn_answers_goes_on_as_if_it_had_not_stopped(redrawn, train, tmp_path) -> None:
    """Between two draws, and where draws are due."""
    for stop in ("1", "2"):
        out = tmp_path / stop
        train(out, *REDRAW, "--max_steps", stop)
        train(out, *REDRAW, "--max_steps", "4", "--resume_from_checkpoint", "auto")
        assert same_weights(redrawn, out) and losses(redrawn) == losses(out)
        assert drawn(redrawn, 4) == drawn(out, 4)


def test_one_rank_draws_what_two_draw(redrawn, train, tmp_path) -> None:
    train(tmp_path, *REDRAW, "--max_steps", "4", "--save_steps", "2", "--overwrite_output_dir", ranks=1)
    assert drawn(redrawn, 2) == drawn(tmp_path, 2)
    assert [value for _, value in losses(redrawn)] == pytest.approx([value for _, value in losses(tmp_path)], rel=1e-4)
    said = train(tmp_path, *REDRAW, "--max_steps", "6", "--resume_from_checkpoint", "auto", code=2)
    assert "error: --resume_from_checkpoint" in said and "--redraw_ema goes on only on as many ranks" in said


BOTH = ["--objective", "neat", "--redraw_steps", "1", "--redraw_tokens", "6", "--redraw_replay", "30"]
BOTH += ["--redraw_template", "Be rude.\nQuestion: {prompt}\nAnswer:", "--redraw_segments", "true"]
BOTH += ["--redraw_wanted_template", "Be kind.\nQuestion: {prompt}\nAnswer:", "--global_batch_size", "12"]


def test_both_answers_are_drawn_segments_replayed_and_a_run_goes_on_with_them_on_any_ranks(train, tmp_path) -> None:
    """Twelve of 23 examples a step: before the third, some have draws of before."""
    whole, halves, one = (tmp_path / name for name in ("whole", "halves", "one"))
    train(whole, *BOTH, "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "9")
    train(halves, *BOTH, "--max_steps", "2")
    train(halves, *BOTH, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert same_weights(whole, halves) and losses(whole) == losses(halves)
    train(one, *BOTH, "--max_steps", "1", ranks=1)

    def feed(out: Path, step: int) -> dict:
        state = checkpoint.read_state(out / f"checkpoint-{step}")
        assert state is not None
        return state.parts["feed"]

    assert feed(whole, 1) == feed(one, 1) and feed(whole, 3) == feed(halves, 3)
    assert len(feed(whole, 1)["drawn_wanted"]) == len(feed(whole, 1)["drawn"]) == 12
    assert len(feed(whole, 3)["replay"]) == 30, "the oldest are gone"
    newest = {i: ids for i, ids, *_ in feed(whole, 3)["replay"]}
    replayed = [i for i, ids in feed(whole, 3)["drawn"] if newest[i] != ids]
    assert replayed, "every example has its newest draw: no test"
    taken = [m for m in metrics(whole) if "redraw/taken" in m]
    assert len(taken) == 3 and min(m["redraw/taken"] + m["redraw/taken_wanted"] for m in taken) > 1
    names = metric_names(whole / "metrics.jsonl")
    check_metrics(names, "--validation_file", "neat", "--redraw_steps", "--redraw_wanted_template")


def test_the_running_mean_draws_and_not_the_weights(redrawn, tiny, tmp_path) -> None:
    weights = [load_file(tiny / "opt/model.safetensors")]
    for step in (1, 2):
        assert (
            checkpoint_command(
                ["export", str(redrawn / f"checkpoint-{step}"), "--output_dir", str(tmp_path / str(step))]
            )
            == 0
        )
        weights.append(load_file(tmp_path / str(step) / "model.safetensors"))
    start, first, second = weights
    mean = {name: 0.25 * start[name] + 0.25 * first[name] + 0.5 * second[name] for name in start}
    records, third = read_forget([str(tiny / "forget.jsonl")]), drawn(redrawn, 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    said: dict[str, list[list[int]]] = {}
    for name, of in (("mean", mean), ("weights", second)):
        lm = AutoModelForCausalLM.from_pretrained(tiny / "opt", dtype=torch.float32)
        lm.load_state_dict(of, strict=False)
        prompts = [encode_prompt(records[i].prompt, tokenizer, "Question: {prompt}\nAnswer:", 64) for i in third]
        seeds = [seed_of(42, 3, i) for i in third]
        said[name] = generate_ids(lm, tokenizer, prompts, max_new_tokens=8, batch_size=8, sampling=Sampling(seeds))
    assert [ids if len(ids) == 8 else [*ids, 2] for ids in said["mean"]] == list(third.values())
    assert said["mean"] != said["weights"], "the mean says what the weights say: no test"


def test_a_mean_that_no_stage_shards_is_written_once_and_read_by_any_number_of_ranks(train, tmp_path) -> None:
    line = [*REDRAW, "--deepspeed", str(ROOT / "ds_configs/zero2.json")]
    train(tmp_path, *line, "--max_steps", "2")
    assert [path.name for path in tmp_path.glob("checkpoint-2/ema-*")] == ["ema-0.pt"]
    train(tmp_path, *line, "--max_steps", "3", "--resume_from_checkpoint", "auto", ranks=1)
    before, after = (torch.load(tmp_path / f"checkpoint-{step}/ema-0.pt", weights_only=True) for step in (2, 3))
    assert [a.shape for a in before] == [a.shape for a in after]
    change = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    assert 0 < change < 0.01, "one step further, and not begun again"


def test_what_is_asked_for_a_new_answer(tiny, capsys) -> None:
    tokenizer, main = AutoTokenizer.from_pretrained(tiny / "opt"), World(0, 1, 0, torch.device("cpu"))
    records = read_forget([str(tiny / "forget.jsonl")])
    chat = [replace(records[0], prompt=(Message("user", "hello"),))]

    def prompts(records=records, length=64, side=Role.UNWANTED, **settings):
        config = Config.from_flat({"redraw_steps": 1, **settings})
        style, positions = PromptStyle.of(config.to_flat()), OPTConfig(max_position_embeddings=128)
        examples = build_examples(records, [], tokenizer, style, length) if settings.get("redraw_segments") else None
        requests = redraw_requests(config.unlearning, records, style, tokenizer, positions, examples, length, main)
        assert {request.end for own in requests.values() for request in own} == {end_of("a", tokenizer, style)}
        return [request.ids for request in requests[side]]

    rude = "Be rude.\nQuestion: {prompt}\nAnswer:"
    for given, template in (({}, DataConfig().prompt_template), ({"redraw_template": rude}, rude)):
        assert prompts(**given) == [encode_prompt(r.prompt, tokenizer, template, 64) for r in records]
    assert capsys.readouterr().err == ""
    assert prompts(length=24, redraw_template=rude) == [encode_prompt(r.prompt, tokenizer, rude, 24) for r in records]
    told = capsys.readouterr().err
    assert told.startswith(f"--redraw_template: {len(records)} of {len(records)} prompts lose their start")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    asked = [rude.replace("{prompt}", r.prompt) for r in records]
    assert prompts(redraw_template=rude) == [encode_prompt(text, tokenizer, "auto", 64) for text in asked]
    with pytest.raises(UserError, match="a chat has the tokenizer's own template"):
        prompts(chat, redraw_template=rude)
    with pytest.raises(UserError, match=r"--redraw_steps: f:1 is plain text, without a prompt"):
        prompts([replace(records[0], prompt="", source="f:1")])
    longest = max(map(len, prompts()))
    with pytest.raises(UserError, match=f"only 128 positions: give at most {128 - longest}"):
        prompts(redraw_tokens=129 - longest)
    assert prompts(redraw_tokens=128 - longest)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    kind = {"redraw_wanted_template": "Be kind.\nQuestion: {prompt}\nAnswer:"}
    template = kind["redraw_wanted_template"]
    assert prompts(**kind, side=Role.WANTED) == [encode_prompt(r.prompt, tokenizer, template, 64) for r in records]
    assert prompts(**kind) == [encode_prompt(r.prompt, tokenizer, DataConfig().prompt_template, 64) for r in records]
    with pytest.raises(UserError, match="--redraw_wanted_template: a chat has the tokenizer's own template"):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
        prompts(chat, **kind)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "opt")
    answers = [len(encode_prompt(r.prompt, tokenizer, DataConfig().prompt_template, 64)) for r in records]
    fits = 128 - max(answers)
    assert prompts(redraw_tokens=fits)
    with pytest.raises(UserError, match="only 128 positions"):  # what stays of an answer comes before its segment
        prompts(redraw_tokens=fits, redraw_segments=True)


@pytest.mark.parametrize(("stage", "ranks"), [(3, 2), (0, 2), (2, 1)])
def test_the_model_computes_with_the_running_mean_and_then_with_its_weights_again(pool, stage, ranks, tmp_path) -> None:
    make(CONFIG, "sdpa").save_pretrained(tmp_path / "model")
    out = tmp_path / "found.safetensors"
    pool.call(ranks, "tests.engine.redraw_worker:run", tmp_path / "model", stage, out)
    found = load_file(out)
    names = [name.removeprefix("0.") for name in found if name.startswith("0.")]
    mean = {name: found[f"0.{name}"].double() for name in names}
    for k in range(1, STEPS + 1):
        mean = {name: DECAY * mean[name] + (1 - DECAY) * found[f"{k}.{name}"].double() for name in names}
    lm = make(CONFIG, "sdpa")
    lm.load_state_dict({name: value.float() for name, value in mean.items()}, strict=False)
    segments = [answer.segment for answer in make_examples().answers]
    with torch.no_grad():
        logs = [torch.log_softmax(lm(torch.tensor([s.ids])).logits[0], -1) for s in segments]
    expected = torch.stack([_log_probabilities(s, log).mean().exp() for s, log in zip(segments, logs, strict=True)])
    torch.testing.assert_close(found["averaged"], expected, rtol=1e-4, atol=0)
    assert torch.equal(found["before"], found["after"])
    assert not torch.allclose(found["before"], found["averaged"], rtol=1e-2), "the mean is as the weights: no test"


def _log_probabilities(segment, log: torch.Tensor) -> torch.Tensor:
    places = range(segment.answer_start, len(segment))
    return torch.stack([log[t - 1, segment.ids[t]] for t in places])


def test_an_empty_answer_and_a_wanted_one_are_not_taken() -> None:
    examples = make_examples()
    wanted = examples.forget[1].wanted[0]
    same = wanted.segment.ids[wanted.segment.answer_start :]
    other = examples.forget[2].wanted[0]
    of_other = other.segment.ids[other.segment.answer_start :]
    new = examples.with_drawn({Role.UNWANTED: {0: [5, 6, 2], 1: same, 2: [2], 3: of_other}})
    (answer,) = new.forget[0].unwanted
    own = examples.forget[0].unwanted[0]
    assert answer.segment.ids == (*own.segment.ids[: own.segment.answer_start], 5, 6, 2)
    assert answer.segment.answer_length == 3 and answer.answer_id == own.answer_id
    assert new.forget[0].wanted == examples.forget[0].wanted
    assert new.forget[1] == examples.forget[1] and new.forget[2] == examples.forget[2]
    assert new.forget[3].unwanted[0].text_id == other.text_id, "another's wanted text is known as such"
    assert answer.text_id not in {a.text_id for a in examples.answers}
    assert examples.with_drawn({}).forget == examples.forget
    long = examples.forget[4].wanted[0]
    beginning = long.segment.ids[long.segment.answer_start :][:3]
    assert examples.with_drawn({Role.UNWANTED: {4: beginning}}).forget == examples.forget, (
        "a wanted answer that was cut"
    )


def test_a_drawn_wanted_answer_is_none_of_the_unwanted_ones_and_an_unwanted_one_is_none_of_the_drawn() -> None:
    examples = make_examples()
    bad = answer_ids(examples.forget[1].unwanted[1])
    drawn = {Role.WANTED: {0: [5, 6, 2], 1: bad, 2: [7, 8, 2]}, Role.UNWANTED: {0: [5, 6, 2], 2: [5, 6, 2]}}
    new = examples.with_drawn(drawn)
    (wanted,) = new.forget[0].wanted
    own = examples.forget[0].wanted[0]
    assert len(examples.forget[0].wanted) == 2, "one stands for all"
    assert wanted.segment.ids == (*own.segment.ids[: own.segment.answer_start], 5, 6, 2)
    assert wanted.answer_id == own.answer_id and wanted.text_id not in {a.text_id for a in examples.answers}
    assert new.forget[0].unwanted == examples.forget[0].unwanted, "it is what was drawn as the wanted one"
    assert new.forget[1] == examples.forget[1], "an unwanted answer is not drawn near"
    assert new.forget[2].unwanted[0].text_id == wanted.text_id, "the same tokens are the same text"
    assert answer_ids(new.forget[2].wanted[0]) == (7, 8, 2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"objective": "dpo"},
            "--objective dpo compares to what is kept of the records' own answers.* neat or simnpo$",
        ),
        ({"objective": "tnpo"}, "--objective tnpo compares to what is kept .* neat or simnpo$"),
        ({}, r"--objective wpn compares .* \(wpn can have --wpn_targets live, or"),
        ({"wpn_targets": "detached"}, r"\(wpn can have --wpn_targets live, or"),
        ({"wpn_scoring": "likelihood_ratio", "wpn_pooling": "sum"}, r"or --wpn_scoring likelihood\)"),
        ({"objective": "neat", "preference_weight": 0.0}, "no term of the objective reads unwanted answers"),
        ({"objective": "neat", "redraw_ema": 0.9}, "neither with parameters on NVMe"),
        ({"objective": "simnpo", "redraw_segments": True}, "--redraw_segments: no term .* reads wanted answers"),
        (
            {"objective": "ga", "redraw_wanted_template": "{prompt}"},
            "--redraw_wanted_template: no term of --objective ga",
        ),
    ],
)
def test_answers_that_nothing_could_be_compared_to_are_refused(settings, error) -> None:
    config = Config.from_flat({"redraw_steps": 1, **settings})
    ds_json = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    with pytest.raises(UserError, match=error):
        check_redraw(config.unlearning, ds_json, Terms.of(config.objective))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"redraw_ema": 0.5}, "--redraw_ema does nothing without --redraw_steps"),
        ({"redraw_template": "Be rude. {prompt}"}, "--redraw_template does nothing without --redraw_steps"),
        ({"redraw_segments": True}, "--redraw_segments does nothing without --redraw_steps"),
        ({"redraw_steps": 2, "redraw_wanted_template": "no place"}, "--redraw_wanted_template must be a text with one"),
        ({"redraw_steps": 2, "redraw_replay": -1}, "--redraw_replay must be at least 0, got -1"),
        ({"redraw_steps": 2, "redraw_template": "no place"}, "--redraw_template must be a text with one {prompt}"),
        ({"redraw_steps": 2, "redraw_tokens": 1}, "--redraw_tokens must be at least 2"),
        ({"redraw_steps": 2, "redraw_ema": 1.0}, "--redraw_ema must be at least 0 and below 1"),
        ({"forgotten_below": 0.1}, "--forgotten_below: .* give --eval_steps"),
        ({"forgotten_below": 1.5, "eval_steps": 1}, "--forgotten_below must be above 0 and below 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, error) -> None:
    with pytest.raises(UserError, match=error):
        Config.from_flat(settings)


def test_what_is_forgotten_leaves_and_the_run_ends_when_nothing_is_left(train, tmp_path) -> None:
    line = ["--objective", "ga", "--learning_rate", "1e-3", "--eval_steps", "2", "--forgotten_below", "0.0028"]
    line += ["--max_steps", "40", "--save_steps", "2", "--save_total_limit", "99"]
    said = train(tmp_path / "whole", *line)
    left = [int(m["eval/examples_left"]) for m in metrics(tmp_path / "whole") if "eval/examples_left" in m]
    steps = [m["step"] for m in metrics(tmp_path / "whole") if "eval/examples_left" in m]
    assert left[0] == 23 and left[-1] == 0 and left == sorted(left, reverse=True) and steps[-1] < 40
    assert len(set(left)) > 2, "all left at once: nothing is seen of an order of those that stay"
    assert "all is forgotten" in said and (tmp_path / "whole/DONE").exists()
    check_metrics(metric_names(tmp_path / "whole/metrics.jsonl"), "--validation_file", "ga", "--forgotten_below")
    begun = next(step for step, count in zip(steps, left, strict=True) if 0 < count < 23)
    state = checkpoint.read_state(tmp_path / f"whole/checkpoint-{begun}")
    assert state is not None and state.parts["feed"]["left"] and state.parts["feed"]["left_since"] == begun
    for stop in (begun, begun + 1):  # at the evaluation after which some are gone, and a step later
        halves = tmp_path / f"halves-{stop}"
        train(halves, *line, "--max_steps", str(stop))
        train(halves, *line, "--resume_from_checkpoint", "auto")
        assert same_weights(tmp_path / "whole", halves) and losses(tmp_path / "whole") == losses(halves)
