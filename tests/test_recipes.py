"""The recipes of launch/recipes are runs that only lack their data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from wpn_ds.objectives.registry import built_in
from wpn_ds.settings.run import UnlearningConfig, parse_args

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
OBJECTIVES = sorted((ROOT / "launch" / "recipes" / "objectives").glob("*.yaml"))
MODELS = ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b")
MODELS += ("gpt-neo-125m", "gpt-neo-1.3b", "gpt-neo-2.7b")


def test_there_is_one_recipe_a_model() -> None:
    assert {path.stem for path in RECIPES} == set(MODELS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_with_data_and_a_folder_is_a_complete_run_of_its_model(path: Path) -> None:
    argv = ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), "--config", str(path)]
    config = parse_args([*argv, "--train_file", "forget.jsonl", "--retain_file", "keep.jsonl", "--output_dir", "out"])
    name = config.model.model_name_or_path
    assert name is not None and name.lower().endswith(f"/{path.stem}")
    assert config.model.bf16 == config.model.gradient_checkpointing == (not path.stem.endswith(("125m", "350m")))
    # What a recipe says may not be overruled in silence, so it counts as given by the user.
    assert {"model_name_or_path", "learning_rate", "tokens_per_micro_batch"} <= config.explicit


def test_every_objective_but_the_default_has_a_recipe_that_says_what_its_paper_has() -> None:
    assert {path.stem for path in OBJECTIVES} == built_in().keys() - {"wpn"}


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_an_objectives_recipe_has_the_settings_that_are_its_defaults(path: Path) -> None:
    argv = ["--deepspeed", "ds_configs/zero0.json", "--config", str(path), "--output_dir", "out"]
    recipe = parse_args(argv)
    assert bool(recipe.unlearning.redraw_steps) == (path.stem == "neat"), "NEAT's negatives are the model's own"
    around = dataclasses.replace(recipe.unlearning, redraw_steps=0, redraw_template=None)
    assert around == UnlearningConfig(objective=path.stem)
    assert recipe.objective == built_in()[path.stem]()


@pytest.mark.parametrize("path", [*RECIPES, *OBJECTIVES], ids=lambda path: path.stem)
def test_a_recipe_names_no_file_of_its_author(path: Path) -> None:
    argv = ["--deepspeed", "ds_configs/zero3.json", "--config", str(path), "--output_dir", "out"]
    config = parse_args(argv)
    assert config.data.embedded and config.data.retain_file == config.data.validation_file == []
