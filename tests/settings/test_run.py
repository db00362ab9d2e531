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
from wpn_ds.objectives.registry import built_in
from wpn_ds.objectives.terms import Terms
from wpn_ds.objectives.wpn import WPN
from wpn_ds.settings.lora import LoraConfig
from wpn_ds.settings.parse import Setting, settings_of
from wpn_ds.settings.run import AWAY, Config, groups, parse_args

ROOT = Path(__file__).parents[2]
DEEPSPEED = ["--deepspeed", "ds_configs/zero3.json"]


def parse(*argv: str, base: dict[str, Any] | None = None) -> Config:
    return parse_args([*DEEPSPEED, *argv], base)


def known(objective: str = "wpn") -> dict[str, Setting]:
    """The settings of a run with that objective."""
    return settings_of(groups(built_in()[objective]))


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
    "redraw_wanted_template": TEMPLATES,
    "chat_date": st.dates().map(str),
    "redraw_ema": st.floats(0, 0.99),
    "redraw_tokens": st.integers(2, 10**6),
    "forgotten_below": st.floats(0.01, 0.99),
    "seed": st.integers(0, 2**32 - 1),
    "num_train_epochs": st.floats(0.01, 1e6),
    "comm_timeout_minutes": st.floats(0.01, 1e6),
    "resume_from_checkpoint": st.none(),
    "early_stopping": st.none(),
    "report_to": st.sampled_from(["none", "tensorboard", "wandb,mlflow"]),
    "retain_bound": st.floats(1, 100),
    "rmu_depth": st.floats(0.01, 0.99),
    "lora_dropout": st.floats(0, 0.99),
    "lora_target": st.lists(st.text(min_size=1), min_size=1, max_size=3),
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
    if not values.get("eval_steps"):
        values.pop("forgotten_below", None)
    if not values.get("redraw_steps"):
        values = {name: value for name, value in values.items() if not name.startswith("redraw_")}
    if values.get("global_batch_size") == 1:
        values.pop("meta_learning_rate", None)
    for other in [name for name in AWAY if values.get(name)][1:]:
        values.pop(other)
    if not values.get("adversary_steps"):
        values.pop("adversary_learning_rate", None)
    if values["objective"] in ("ceu", "pdu", "undial"):  # they compare unwanted tokens to something else
        values.pop("ascent_weight", None)
    if not values.get("lora_r"):
        adapters = {entry.name for entry in dataclasses.fields(LoraConfig)}
        values = {name: value for name, value in values.items() if name not in adapters}
    if values.get("wpn_pooling", "weighted") != "weighted":
        values.pop("wpn_position_power", None)
    own = {name: values[name] for name in ("nll_weight", "preference_weight") if name in values}
    if not Terms.of(built_in()[values["objective"]](**own)).compares_wanted:
        values.pop("wanted_file", None)
    return values


def flat_of(objective: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"objective": st.just(objective)}
        | {name: st.lists(FILES, min_size=1, max_size=3) for name in ("train_file", "retain_file")},
        optional={
            name: RANGES.get(name, values_of(setting.type))
            for name, setting in known(objective).items()
            if not setting.hidden and name not in ("objective", "train_file", "retain_file") and "dataset_" not in name
        },
    ).map(with_effect)


# So that it can be written as a flag, and is no home folder.
FILES = st.text(min_size=1).filter(lambda name: not name.startswith(("-", "~")))
FLAT = st.sampled_from(sorted(built_in())).flatmap(flat_of)


@settings(max_examples=60)
@given(FLAT)
def test_what_to_flat_says_comes_back_unchanged_through_yaml_and_from_flat(values: dict[str, Any]) -> None:
    config = Config.from_flat(values)
    flat = config.to_flat()
    assert {name: flat[name] for name in values} == values
    assert Config.from_flat(yaml.safe_load(yaml.safe_dump(flat))) == config


@settings(max_examples=60)
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


@settings(max_examples=60)
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
        (["--retain_loss", "nil"], ["--retain_loss must be one of kl, nll", "did you mean nll?"]),
        (["--dropout", "1"], ["--dropout must be at least 0 and below 1"]),
        (["--reference_topk", "0"], ["--reference_topk must be at least 1"]),
        (["--reference", "disk"], ["--reference must be one of sharded, cpu, nvme, states, topk"]),
        (["--attention", "flash"], ["--attention must be one of auto, packed, varlen, flex, sdpa, eager"]),
        (["--max_grad_norm", "-1"], ["--max_grad_norm must be at least 0"]),
        (["--prompt_template", "no place"], ["--prompt_template", "{prompt}"]),
        (["--train_file", "a", "--dataset_name", "b"], ["--train_file", "--dataset_name"]),
        (["--retain_file", "a", "--retain_dataset_name", "b"], ["--retain_file and --retain_dataset_name both name"]),
        (["--validation_dataset_split", "test"], ["_split test does nothing without --validation_dataset_name"]),
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


# ---- the objective's own ----


@pytest.mark.parametrize("objective", built_in())
def test_an_objective_has_flags_of_its_own_alone(objective: str, recipe: Any) -> None:
    given = {"beta": 0.3, "preference_weight": 0.3, "gamma": 0.3, "wpn_temperature": 0.3, "nll_weight": 0.3}
    for name, value in given.items():
        path = recipe(f"objective: {objective}\n{name}: {value}\n")
        if name in known(objective):
            assert getattr(parse("--objective", objective, f"--{name}={value}").objective, name) == value
            assert getattr(parse("--config", path).objective, name) == value
            continue
        whose = ", ".join(other for other in built_in() if name in known(other))
        own = ", ".join(f"--{name}" for name in settings_of({objective: built_in()[objective]}))
        said = f"--{name} is a flag of {whose}; --objective {objective} has {own}"
        assert error("--objective", objective, f"--{name}={value}") == said
        assert error("--config", path) == f"{path}:2: {said.removeprefix('--')}"


def test_a_flag_of_another_objective_is_no_better_for_having_its_default() -> None:
    assert "--gamma is a flag of simnpo" in error("--objective", "npo", "--gamma", "0.0")


OLD = (
    "wpn_weight: 1.0\nwpn_pooling: weighted\nwpn_temperature: null\nwpn_targets: auto\ngamma: 0.0\nretain_loss: auto\n"
)
"""Of a file that a run left when every objective's settings were every run's."""


def test_what_an_old_file_says_of_other_objectives_is_passed_over_where_it_says_nothing(recipe: Any) -> None:
    path = recipe(f"objective: npo\nbeta: 0.2\npreference_weight: null\n{OLD}")
    config = parse("--config", path)
    assert config.objective == built_in()["npo"](beta=0.2) and "gamma" not in config.to_flat()
    assert config.explicit == {"objective", "beta", "preference_weight", "retain_loss", "deepspeed"}
    path = recipe(f"objective: npo\n{OLD}wpn_scoring: dot\n")
    assert f"{path}:8: wpn_scoring is a flag of wpn; --objective npo has --" in error("--config", path)
    values = {"objective": "wpn", "beta": None, "preference_weight": None, "gamma": 0.0}
    assert Config.from_flat(values).objective == WPN()
    with pytest.raises(UserError, match=r"^settings: beta is a flag of altpo, .*; --objective wpn has --"):
        Config.from_flat(values | {"beta": 0.1})


@pytest.mark.parametrize("argv", [["--nll_weight", "auto"], ["--retain_loss", "auto"], ["--beta", "auto"]])
def test_auto_leaves_an_objectives_own_setting_to_it(argv: list[str], recipe: Any) -> None:
    assert parse("--objective", "neat", *argv).objective == built_in()["neat"]()
    path = recipe(f"objective: neat\n{argv[0][2:]}: null\n")
    assert parse("--config", path).objective == built_in()["neat"]()


def test_the_objective_is_that_of_the_flag_before_that_of_the_file(recipe: Any) -> None:
    path = recipe("objective: dpo\nbeta: 0.3\n")
    assert parse("--config", path).objective == built_in()["dpo"](beta=0.3)
    assert parse("--config", path, "--objective=npo").objective == built_in()["npo"](beta=0.3)
    assert parse(base={"objective": "npo"}).unlearning.objective == "npo"


def test_settings_and_their_objective_are_of_one_name() -> None:
    with pytest.raises(AssertionError, match="is not what unlearning"):
        Config(objective=built_in()["npo"]())


def test_an_unknown_objective_is_one_line_that_names_all(recipe: Any) -> None:
    names = ", ".join(built_in())
    assert error("--objective", "simpo") == (f"--objective must be one of {names}, got 'simpo'; did you mean simnpo?")
    path = recipe("seed: 1\nobjective: wnp\n")
    assert error("--config", path) == f"{path}:2: objective must be one of {names}, got 'wnp'; did you mean wpn?"
    path = recipe("objective: [wpn]\n")
    assert f"{path}:1: objective must be a text" in error("--config", path)


OWN = """
from wpn_ds.objectives.companions import Companions
from wpn_ds.objectives.registry import objective
from wpn_ds.objectives.terms import OnTokens, Role


@objective
class Mine(Companions):
    '''Mine: a term of my own.'''

    steepness: float = 2.0
    '''How steep it is.'''
    mine_weight: float = 1.0
    '''Weight of it.'''

    def terms(self):
        yield OnTokens("mine", self.mine_weight, Role.UNWANTED, ascend=True)
        yield from self.companions()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a user's own objective in it."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_objective_of_ones_own_brings_its_flags(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse("--objective", "mine.py:Mine", "--steepness", "3", "--retain_loss", "kl")
    flat = config.to_flat()
    assert (flat["objective"], flat["steepness"], flat["mine_weight"]) == ("mine.py:Mine", 3.0, 1.0)
    assert Config.from_flat(flat) == dataclasses.replace(config, explicit=frozenset())
    said = error("--objective", "mine.py:Mine", "--mine_weight", "0", "--retain_weight", "0")
    assert (
        said == "--mine_weight, --nll_weight, --retain_weight and --ascent_weight are all 0: nothing would be trained"
    )
    assert "; --objective mine.py:Mine has --steepness, " in error("--objective", "mine.py:Mine", "--gamma", "1")
    with pytest.raises(SystemExit):
        parse("--objective", "mine.py:Mine", "--help")
    helped = " ".join(capsys.readouterr().out.split())
    assert "mine.py:Mine: Mine: a term of my own." in helped
    assert "--steepness FLOAT How steep it is. (default: 2.0)" in helped


def test_a_run_with_an_objective_of_ones_own_is_repeated_from_another_folder(own: Path, monkeypatch) -> None:
    config = parse("--objective", "mine.py:Mine", "--steepness", "3").resolved()
    assert config.places()["objective"] == f"{own / 'mine.py'}:Mine"
    (own / "run.yaml").write_text(config.run_yaml())
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    again = parse_args(["--config", "../run.yaml"])
    assert again.to_flat()["objective"] == f"{own / 'mine.py'}:Mine" and again.to_flat()["steepness"] == 3.0
    assert "objective" not in parse("--objective", "npo").places()


def test_a_value_that_a_setting_of_ones_own_allows_is_no_other_words_for_its_default(own: Path, recipe: Any) -> None:
    text = OWN.replace("steepness: float = 2.0", "steepness: float | None = 2.0")
    text = text.replace("    mine_weight", "    mode: Literal['auto', 'x'] = 'x'\n    mine_weight")
    (own / "mine.py").write_text("from typing import Literal\n" + text)
    path = recipe("objective: mine.py:Mine\nsteepness: null\nmode: auto\nmine_weight: null\n")
    mine: Any = parse("--config", path).objective
    assert (mine.steepness, mine.mode, mine.mine_weight) == (None, "auto", 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("steepness", "seed"), "mine.py:Mine: seed is a flag of training already: take another name"),
        (("float = 2.0", "dict = None"), "mine.py:Mine: steepness is of a type that no flag can have"),
        (
            ("Role.UNWANTED", "Role.WANTED, 'start'"),
            "mine.py:Mine: mine: only retain and unwanted tokens can",
        ),
    ],
)
def test_what_an_objective_of_ones_own_may_not_have_is_one_line(own: Path, change: tuple[str, str], said: str) -> None:
    (own / "mine.py").write_text(OWN.replace(*change))
    assert said in error("--objective", "mine.py:Mine")


def test_an_objective_whose_terms_all_have_the_weight_0_would_train_nothing(own: Path) -> None:
    bare = OWN.replace("Companions", "Objective").replace(".companions", ".terms", 1).replace("mine_weight", "share")
    (own / "mine.py").write_text(bare.replace("yield from self.companions()", "").replace("self.terms()", ""))
    assert error("--objective", "mine.py:Mine", "--share", "0") == (
        "--objective mine.py:Mine: all its terms have the weight 0: nothing would be trained"
    )


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


@pytest.mark.parametrize("objective", ["wpn", "npo", "simnpo"])
def test_help_has_every_flag_of_the_objective_with_its_sentence_and_default_and_no_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"] if objective == "wpn" else ["--help", "--objective", objective])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    positions = [text.index(f"\n{group}:\n") for group in groups(built_in()[objective])]
    assert positions == sorted(positions) and len(positions) == 7
    for name, setting in known(objective).items():
        assert (f"--{name} " in text) is not setting.hidden
        if not setting.hidden:
            assert len(setting.doc.split()) >= 3 and setting.doc.endswith((".", ")."))
            assert setting.doc in text
    assert "--global_batch_size INT" in text and "(default: 32)" in text
    assert "local" not in text.replace("local folder", "")
    foreign = {name for other in built_in() for name in known(other)} - known(objective).keys()
    assert foreign and not any(f"\n  --{name} " in text for name in foreign)
    kind = built_in()[objective]
    assert f"(arXiv {kind.paper}" in text and kind.equation in text
    assert all(other in text[positions[3] :] for other in built_in()), "and how to see those of others"


@pytest.mark.parametrize("objective", built_in())
def test_every_flag_of_an_objective_has_a_sentence(objective: str) -> None:
    for setting in known(objective).values():
        assert len(setting.doc.split()) >= 3 and setting.doc.endswith((".", ")."))


@pytest.mark.parametrize(
    "line",
    [
        "main(['train', '--help'])",
        "main(['train', '--objective', 'npo', '--help'])",
        "main(['objectives'])",
        "parse_args(['--deepspeed', 'x.json', '--objective', 'tnpo']), wpn_ds.settings.deepspeed",
    ],
)
def test_settings_and_help_are_read_without_torch_deepspeed_or_transformers(line: str) -> None:
    code = (
        "import atexit, sys, wpn_ds.settings.deepspeed\n"
        "from wpn_ds.cli import main\n"
        "from wpn_ds.settings.run import parse_args\n"
        "heavy = ('torch', 'deepspeed', 'transformers', 'numpy')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n" + line
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_reference_that_no_term_asks_for_is_no_mistake() -> None:
    """It is a setting of memory, and a grid's rows share one."""
    for name in ("ga", "npo"):
        assert Config.from_flat({"objective": name, "reference": "states"}).unlearning.reference == "states"


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


def test_files_that_came_with_the_package_are_found_where_the_working_folder_has_none(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = ["--config", "launch/recipes/opt-125m.yaml", "--output_dir", "out"]
    assert parse(*named).training.deepspeed == str(ROOT / DEEPSPEED[1])
    (tmp_path / DEEPSPEED[1]).parent.mkdir()
    (tmp_path / DEEPSPEED[1]).touch()
    assert parse(*named).training.deepspeed == DEEPSPEED[1]
    with pytest.raises(UserError, match=r"launch/recipes/none\.yaml: No such file"):
        parse("--config", "launch/recipes/none.yaml")


def test_what_a_run_leaves_for_config_is_found_from_another_folder(tmp_path, monkeypatch) -> None:
    here = tmp_path / "here"
    (here / "models" / "m").mkdir(parents=True)
    (here / DEEPSPEED[1]).parent.mkdir()
    (here / DEEPSPEED[1]).touch()
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
