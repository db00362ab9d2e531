"""Flags, YAML and defaults become one checked Config."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wpn_ds.errors import UserError
from wpn_ds.settings.run import Config, ObjectiveConfig, _groups, _settings, parse_args

DEEPSPEED = ["--deepspeed", "ds_configs/zero3.json"]


def parse(*argv: str, base: dict[str, Any] | None = None) -> Config:
    return parse_args([*DEEPSPEED, *argv], base)


def error(*argv: str, base: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv, base=base)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


TEMPLATES = st.text().filter(lambda text: "{prompt}" not in text).map(lambda text: text + "{prompt}")

# Valid values of every setting; what holds between settings is kept by the narrow ranges.
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "dropout": st.floats(0, 0.99),
    "adam_beta1": st.floats(0, 0.99),
    "adam_beta2": st.floats(0, 0.99),
    "max_length": st.integers(4, 512),
    "tokens_per_micro_batch": st.integers(1024, 10**9),
    "prompt_template": TEMPLATES,
    "redraw_template": TEMPLATES,
    "chat_date": st.dates().map(str),
    "redraw_ema": st.floats(0, 0.99),
    "redraw_tokens": st.integers(2, 10**6),
    "forgotten_below": st.floats(0.01, 0.99),
    "seed": st.integers(0, 2**32 - 1),
    "num_train_epochs": st.floats(0.01, 1e6),
    "comm_timeout_minutes": st.floats(0.01, 1e6),
    "resume_from_checkpoint": st.none(),
    "early_stopping": st.none(),
    "retain_bound": st.floats(1, 100),
    "wpn_weight": st.floats(0.5, 100),
    "wpn_scoring": st.sampled_from(["cosine", "dot"]),
    "wpn_negatives": st.sampled_from(["auto", "step", "own"]),
    "wpn_pooling": st.sampled_from(["weighted", "mean", "last"]),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return st.none() | values_of(typing.get_args(kind)[0])
    return {
        bool: st.booleans(),
        int: st.integers(1, 10**20),
        float: st.floats(1e-12, 1e12),
        str: st.text(min_size=1),
        list[str]: st.lists(st.text(min_size=1), max_size=3),
    }[kind]


def with_effect(values: dict[str, Any]) -> dict[str, Any]:
    deciding = ("objective", "redraw_steps")
    objective = ObjectiveConfig(**{name: values[name] for name in deciding if name in values})
    if not values.get("eval_steps"):
        values.pop("forgotten_below", None)
    values = {name: value for name, value in values.items() if not objective.without_effect(name)}
    weights = {name: values[name] for name in ("nll_weight", "preference_weight") if name in values}
    if not dataclasses.replace(objective, **weights).reads_wanted:
        values.pop("wanted_file", None)
    return values


FILES = st.text(min_size=1).filter(lambda name: not name.startswith("-"))  # so that it can be written as a flag
FLAT = st.fixed_dictionaries(
    {name: st.lists(FILES, min_size=1, max_size=3) for name in ("train_file", "retain_file")},
    optional={
        name: RANGES.get(name, values_of(setting.type))
        for name, setting in _settings().items()
        if not setting.hidden and name not in ("train_file", "retain_file", "dataset_name")
    },
).map(with_effect)


@settings(max_examples=60, deadline=None)
@given(FLAT)
def test_what_to_flat_says_comes_back_unchanged_through_yaml_and_from_flat(values: dict[str, Any]) -> None:
    config = Config.from_flat(values)
    flat = config.to_flat()
    assert {name: flat[name] for name in values} == values
    assert Config.from_flat(yaml.safe_load(yaml.safe_dump(flat))) == config


@settings(max_examples=60, deadline=None)
@given(FLAT)
def test_a_run_yaml_given_as_config_makes_the_same_resolved_run(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    config = Config.from_flat({"output_dir": "out", "deepspeed": "d.json"} | values)
    if config.training.deepspeed is None or config.training.output_dir is None:
        return
    config = config.resolved()
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_flat()), encoding="utf-8")
    again = parse_args(["--config", str(path)])
    assert again.resolved().to_flat() == config.to_flat()
    assert again.explicit == set(config.to_flat())


@settings(max_examples=60, deadline=None)
@given(FLAT)
def test_a_flag_says_the_same_as_the_yaml_value(values: dict[str, Any]) -> None:
    # A dash in front, an empty list and a None can't be written as a flag; \n in a flag is a line break.
    skip = ("-", "prompt_template")
    argv = []
    expected = {}
    for name, value in values.items():
        texts = value if isinstance(value, list) else [str(value)]
        if value is None or not texts or name == skip[1] or any(text.startswith(skip[0]) for text in texts):
            continue
        argv += [f"--{name}", *texts]
        expected[name] = value
    needed = {"deepspeed": "d.json", "output_dir": "out"} | expected
    config = parse_args([*argv, *(f"--{name}={needed[name]}" for name in needed if name not in expected)])
    assert config == dataclasses.replace(Config.from_flat(needed), explicit=frozenset(needed))


def test_flags_win_over_the_file_the_file_over_the_recipe_the_recipe_over_defaults(recipe: Any) -> None:
    path = recipe("seed: 2\nmax_length: 20\n")
    config = parse("--config", path, "--seed", "3", base={"seed": 1, "max_length": 10, "warmup_steps": 5})
    assert (config.training.seed, config.data.max_length, config.training.warmup_steps) == (3, 20, 5)
    assert config.training.learning_rate == 1e-5
    assert config.explicit == {"seed", "max_length", "deepspeed"}


def test_numbers_that_yaml_reads_as_text_are_numbers(recipe: Any) -> None:
    assert isinstance(yaml.safe_load("1e-5"), str)
    config = parse("--config", recipe("learning_rate: 1e-5\nmax_steps: 1e3\nseed: 12345678901234567891\n"))
    assert config.training.learning_rate == 1e-5
    assert config.training.max_steps == 1000
    assert config.training.seed == 12345678901234567891


@pytest.mark.parametrize(
    ("argv", "value"), [(["--packing", "false"], False), (["--packing=True"], True), (["--packing"], True), ([], True)]
)
def test_a_boolean_is_a_bare_flag_or_takes_a_word(argv: list[str], value: bool) -> None:
    assert parse(*argv).data.packing is value


def test_lists_take_several_values_and_repeated_flags_add_up(recipe: Any) -> None:
    argv = ["--train_file", "a", "b", "--train_file", "c", "--output_dir", "o"]
    assert parse(*argv).data.train_file == ["a", "b", "c"]
    assert parse("--config", recipe("train_file: a.jsonl\n")).data.train_file == ["a.jsonl"]


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_the_launchers_local_rank_is_read_and_kept_out_of_the_run_file(flag: str) -> None:
    config = parse(flag)
    assert config.training.local_rank == 1
    assert config.replace(seed=7).training.local_rank == 1
    assert "local_rank" not in config.to_flat()
    assert "local_rank" not in config.explicit


def test_a_backslash_n_in_a_template_flag_is_a_line_break() -> None:
    assert parse("--prompt_template", r"Q: {prompt}\nA:").data.prompt_template == "Q: {prompt}\nA:"


STOP = ["--early_stopping", "harmless>=0.9", "--eval_steps", "5"]


def test_early_stopping_names_a_rate() -> None:
    assert parse(*STOP).logging.harmless_enough == 0.9
    assert parse(*STOP, "--early_stopping", "harmless>=1").logging.harmless_enough == 1
    assert parse("--eval_steps", "5").logging.harmless_enough is None


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learnig_rate", "1"], ["--learnig_rate", "did you mean --learning_rate?"]),
        (["--learning-rate=1"], ["unknown flag --learning-rate;", "did you mean --learning_rate?"]),
        (["--learn", "1"], ["unknown flag --learn"]),
        (["--xyzzy"], ["unknown flag --xyzzy", "--help"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--seed", "x"], ["--seed must be a whole number, got 'x'"]),
        (["--seed", "1.5"], ["--seed must be a whole number"]),
        (["--seed"], ["--seed", "expected one argument"]),
        (["--learning_rate", "nan"], ["--learning_rate must be a number"]),
        (["--learning_rate", "0"], ["--learning_rate must be greater than 0"]),
        (["--packing", "maybe"], ["--packing must be true or false, got 'maybe'"]),
        (["--retain_loss", "nil"], ["--retain_loss must be one of auto, kl, nll", "did you mean nll?"]),
        (["--dropout", "1"], ["--dropout must be at least 0 and below 1"]),
        (["--reference_topk", "0"], ["--reference_topk must be at least 1"]),
        (["--reference", "disk"], ["--reference must be one of sharded, cpu, nvme, states, topk"]),
        (["--attention", "flash"], ["--attention must be one of auto, packed, varlen, flex, sdpa, eager"]),
        (["--max_grad_norm", "-1"], ["--max_grad_norm must be at least 0"]),
        (["--prompt_template", "no place"], ["--prompt_template", "{prompt}"]),
        (["--train_file", "a", "--dataset_name", "b"], ["--train_file", "--dataset_name"]),
        (["--max_length", "8192"], ["--tokens_per_micro_batch 4096", "--max_length 8192"]),
        (["--model_name_or_path", "facebook/opt-125m"], ["--output_dir is missing"]),
        (["--train_file", "a", "--retain_batch_size", "4"], ["--retain_batch_size 4", "--retain_file"]),
        (["--train_file", "a", "--wpn_weight", "0", "--nll_weight", "0"], ["retain", "--retain_file"]),
        (["--objective", "npo", "--wanted_file", "a"], ["--wanted_file: --objective npo has no wanted answers"]),
        (["--objective", "npo", "--beta", "0"], ["--beta must be greater than 0"]),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "auto"], ["--overwrite_output_dir", "--resume_from"]),
        (["--early_stopping", "harmless"], ["--early_stopping", "'harmless>=0.95'", "quotation marks", "'harmless'"]),
        (["--early_stopping", "harmless>=95"], ["--early_stopping", "up to 1, ", "'harmless>=95'"]),
        (["--early_stopping", "harmless>=0"], ["--early_stopping", "above 0"]),
        (["--early_stopping", "harmless >= 0.9"], ["--early_stopping must be like"]),
        (["--early_stopping", "harmless>=0.9"], ["--early_stopping harmless>=0.9", "--eval_steps"]),
        ([*STOP, "--probe_prompts", "0"], ["--early_stopping harmless>=0.9", "--probe_prompts"]),
        ([*STOP, "--train_file", "a"], ["--early_stopping", "--retain_file"]),
        (["--retain_bound", "0.9"], ["--retain_bound must be at least 1"]),
        (["--config", "missing.yaml"], ["--config missing.yaml: No such file"]),
        (["--config", "."], ["--config .: Is a directory"]),
        (["--deepspeed"], ["--deepspeed: expected one argument", "ds_configs/zero3.json"]),
    ],
)
def test_a_mistaken_flag_is_one_line_that_names_it(argv: list[str], parts: list[str]) -> None:
    message = error(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nlearnig_rate: 1\n", [":2: learnig_rate is not a setting", "did you mean learning_rate?"]),
        ("local_rank: 1\n", [":1: local_rank is not a setting"]),
        ("\nseed: [1]\n", [":2: seed must be a whole number, got [1]"]),
        ("seed: true\n", [":1: seed must be a whole number, got True"]),
        ("seed: null\n", [":1: seed must be a whole number, got None"]),
        ("packing: 3\n", [":1: packing must be true or false"]),
        ("model_revision: 12345\n", [":1: model_revision must be a text, got 12345: put it in quotation marks"]),
        ("train_file: {a: b}\n", [":1: train_file must be a list of texts"]),
        ("wpn_pooling: [mean]\n", [":1: wpn_pooling must be one of weighted, mean, last"]),
        ("seed: 1\nseed: 2\n", [":2: seed is given twice, first in line 1"]),
        ("seed: 1\n  x: [\n", [":2: not YAML"]),
        ("seed: \x07\n", ["not YAML"]),
        ('seed: "\\U00110000"', ["not YAML"]),
        ("model_revision: v1\nchat_date: 2026-13-45", [":2: chat_date: not a value of YAML: month must be"]),
        ("seed: !!int x", [":1: seed: not a value of YAML"]),
        ('seed: !!float ""', [":1: seed: not a value of YAML"]),
        ("[" * 100_000, ["brackets in brackets"]),
        ("seed: " + "[" * 5000 + "]" * 5000, ["brackets in brackets"]),
        ("- seed\n", ["name: value"]),
    ],
)
def test_a_mistake_in_the_yaml_file_names_file_line_and_key(recipe: Any, text: str, parts: list[str]) -> None:
    path = recipe(text)
    message = error("--config", path)
    assert path in message
    assert all(part in message for part in parts), message


def test_a_yaml_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"output_dir: caf\xe9\n")
    assert f"{path}: not UTF-8 at byte 15" in error("--config", str(path))


def test_an_empty_yaml_file_changes_nothing(recipe: Any) -> None:
    assert parse("--config", recipe("# nothing\n")) == parse()


def test_deepspeed_is_required_and_the_error_names_a_file() -> None:
    with pytest.raises(UserError, match=r"--deepspeed is missing: .*ds_configs/zero3\.json"):
        parse_args([])


@pytest.mark.parametrize("scoring", ["cosine", "dot", "likelihood", "likelihood_ratio"])
@pytest.mark.parametrize("targets", ["auto", "reference", "detached", "live"])
@pytest.mark.parametrize("negatives", ["auto", "step", "own", "bank"])
def test_exactly_the_combinations_that_make_sense_resolve(scoring: Any, targets: Any, negatives: Any) -> None:
    likelihood = scoring in ("likelihood", "likelihood_ratio")
    if likelihood:
        sensible = targets in ("auto", "live") and negatives in ("auto", "own")
    else:
        sensible = negatives != "bank" or targets in ("auto", "reference")
    if not sensible:
        with pytest.raises(UserError, match=r"^--wpn_\w+ \w+ \w+ (with )?--wpn_"):
            ObjectiveConfig(wpn_scoring=scoring, wpn_targets=targets, wpn_negatives=negatives)
        return
    resolved = ObjectiveConfig(wpn_scoring=scoring, wpn_targets=targets, wpn_negatives=negatives).resolved()
    auto = ("live", "own") if likelihood else ("reference", "step")
    assert resolved.wpn_targets == (auto[0] if targets == "auto" else targets)
    assert resolved.wpn_negatives == (auto[1] if negatives == "auto" else negatives)
    assert resolved.wpn_temperature == (0.05 if scoring == "cosine" else 1.0)
    assert resolved.resolved() == resolved


@pytest.mark.parametrize("scoring", ["cosine", "dot", "likelihood", "likelihood_ratio"])
def test_a_sum_is_for_likelihoods(scoring: Any) -> None:
    if scoring.startswith("likelihood"):
        assert ObjectiveConfig(wpn_scoring=scoring, wpn_pooling="sum").resolved().wpn_pooling == "sum"
        return
    with pytest.raises(UserError, match=r"^--wpn_pooling sum is for likelihoods"):
        ObjectiveConfig(wpn_scoring=scoring, wpn_pooling="sum")


@pytest.mark.parametrize("name", ["wpn_weight", "nll_weight", "retain_weight", "ascent_weight"])
def test_weights_may_be_0_but_not_all_and_none_below(name: str) -> None:
    others = dict.fromkeys(["wpn_weight", "nll_weight", "retain_weight", "ascent_weight"], 0.0)
    assert ObjectiveConfig(**{**others, name: 1.0})
    with pytest.raises(UserError, match="are all 0"):
        ObjectiveConfig(**others)
    with pytest.raises(UserError, match=f"--{name} must be at least 0"):
        ObjectiveConfig(**{name: -1.0})


@pytest.mark.parametrize("objective", typing.get_args(_settings()["objective"].type))
def test_every_objective_has_a_term_to_train_and_settings_of_its_own_alone(objective: str) -> None:
    config = ObjectiveConfig(objective=objective)
    resolved = config.resolved()
    assert any(value > 0 for name, value in resolved.own_weights().items() if name != "retain_weight")
    assert resolved.retain_loss in ("kl", "nll")
    assert resolved.resolved() == resolved
    given = {"beta": 0.3, "preference_weight": 0.3, "gamma": 0.3, "wpn_temperature": 0.3, "nll_weight": 0.3}
    for name, value in given.items():
        one = {"output_dir": "out", "train_file": ["a"], "objective": objective, name: value}
        if config.without_effect(name):
            with pytest.raises(UserError, match=f"^--{name} does nothing under --objective {objective}: leave it out"):
                Config.from_flat(one)
        else:
            assert getattr(Config.from_flat(one).resolved().objective, name) == value


def test_a_papers_settings_are_the_defaults_of_its_objective() -> None:
    simnpo = ObjectiveConfig(objective="simnpo").resolved()
    assert (simnpo.beta, simnpo.gamma, simnpo.preference_weight, simnpo.retain_weight) == (4.5, 0.0, 0.125, 1.0)
    llmu = ObjectiveConfig(objective="llmu").resolved()
    assert (llmu.ascent_weight, llmu.nll_weight, llmu.retain_weight, llmu.retain_loss) == (0.5, 1.0, 1.0, "kl")
    altpo = ObjectiveConfig(objective="altpo").resolved()
    assert (altpo.beta, altpo.nll_weight, altpo.retain_weight, altpo.retain_loss) == (0.1, 0.0, 1.0, "nll")
    assert ObjectiveConfig(objective="ga").resolved().retain_weight == 0


def test_a_temperature_is_kept_when_given_and_positive() -> None:
    assert ObjectiveConfig(wpn_temperature=0.5).resolved().wpn_temperature == 0.5
    with pytest.raises(UserError, match="--wpn_temperature must be greater than 0"):
        ObjectiveConfig(wpn_temperature=0.0)


def test_the_demo_resolves_to_its_own_folder_and_a_model_of_ones_own_to_output_dir() -> None:
    demo = parse().resolved()
    assert demo.training.output_dir == "runs/demo/unlearned"
    assert demo.logging.logging_dir == str(Path("runs/demo/unlearned/runs"))
    own = parse("--model_name_or_path", "m", "--output_dir", "out", "--logging_dir", "logs").resolved()
    assert (own.training.output_dir, own.logging.logging_dir) == ("out", "logs")
    assert own.resolved() == own


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        ([], 32),
        (["--train_file", "f"], 0),
        (["--train_file", "f", "--retain_file", "r", "--global_batch_size", "8"], 8),
        (["--retain_batch_size", "5"], 5),
        (["--retain_batch_size", "0"], 0),
    ],
)
def test_the_retain_batch_is_as_large_as_the_other_one_unless_there_is_nothing_to_retain(
    argv: list[str], size: int
) -> None:
    assert parse(*argv).resolved().training.retain_batch_size == size


def test_replace_checks_again_and_keeps_what_was_explicit() -> None:
    config = parse("--seed", "1").replace(learning_rate=2e-5)
    assert (config.training.seed, config.training.learning_rate) == (1, 2e-5)
    assert config.explicit == {"seed", "deepspeed"}
    with pytest.raises(UserError, match="--learning_rate must be greater than 0"):
        config.replace(learning_rate=0)
    with pytest.raises(UserError, match="sed is not a setting; did you mean seed"):
        config.replace(sed=0)


def test_help_has_every_flag_with_its_sentence_and_default_in_five_groups(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n{group}:\n") for group in _groups()]
    assert positions == sorted(positions) and len(positions) == 5
    for name, setting in _settings().items():
        assert (f"--{name} " in text) is not setting.hidden
        if not setting.hidden:
            assert len(setting.doc.split()) >= 3 and setting.doc.endswith((".", ")."))
            assert setting.doc in text
    assert "--global_batch_size INT" in text and "(default: 32)" in text
    assert "local" not in text.replace("local folder", "")


def test_no_two_groups_share_a_name() -> None:
    names = [entry.name for kind in _groups().values() for entry in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_settings_are_read_without_torch_deepspeed_or_transformers() -> None:
    code = (
        "import sys, wpn_ds.settings.run, wpn_ds.settings.deepspeed\n"
        "wpn_ds.settings.run.parse_args(['--deepspeed', 'x.json'])\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_reference_that_no_term_asks_for_is_no_mistake() -> None:
    """It is a setting of memory, and a grid's rows share one."""
    for name in ("ga", "npo"):
        assert Config.from_flat({"objective": name, "reference": "states"}).objective.reference == "states"


# ---- places ----


def test_a_tilde_is_the_home_folder_in_flags_and_in_yaml(recipe: Any, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = recipe("train_file: [~/a.jsonl, b.jsonl]\nvalidation_file: ~/v.jsonl\nmodel_name_or_path: ~/m\n")
    given = ["--output_dir=~/out", "--tokenizer_name", "~/t", "--resume_from_checkpoint=~/out/checkpoint-1"]
    flat = parse("--config", path, *given).to_flat()
    assert flat["train_file"] == ["/home/me/a.jsonl", "b.jsonl"] and flat["validation_file"] == ["/home/me/v.jsonl"]
    assert flat["model_name_or_path"] == "/home/me/m" and flat["output_dir"] == "/home/me/out"
    assert flat["tokenizer_name"] == "/home/me/t" and flat["resume_from_checkpoint"] == "/home/me/out/checkpoint-1"
    assert flat["dataset_name"] is None and parse("--prompt_template", "~/{prompt}", "--output_dir", "o").data
    config = parse_args(["--deepspeed=~/z.json", "--output_dir=o", "--prompt_template=~/{prompt}"])
    assert config.training.deepspeed == "/home/me/z.json" and config.data.prompt_template == "~/{prompt}"


def test_what_a_run_leaves_for_config_is_found_from_another_folder(tmp_path, monkeypatch) -> None:
    here = tmp_path / "here"
    (here / "models" / "m").mkdir(parents=True)
    monkeypatch.chdir(here)
    given = ["--tokenizer_name", "hub/name", "--train_file", "a.jsonl", "../b.jsonl"]
    config = parse(
        "--model_name_or_path", "models/m", *given, "--output_dir", "out", "--overwrite_output_dir"
    ).resolved()
    (here / "run.yaml").write_text(config.run_yaml())
    monkeypatch.chdir(tmp_path)
    again = parse_args(["--config", "here/run.yaml"]).to_flat()
    assert again["train_file"] == [str(here / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert again["model_name_or_path"] == str(here / "models/m") and again["output_dir"] == str(here / "out")
    assert again["deepspeed"] == str(here / DEEPSPEED[1]) and again["tokenizer_name"] == "hub/name"
    assert again["logging_dir"] is None and again["overwrite_output_dir"] is False
    comments = [line for line in (here / "run.yaml").read_text().splitlines() if line.startswith("#")]
    assert "# as typed: model_name_or_path: models/m" in comments and "# as typed: - ../b.jsonl" in comments
