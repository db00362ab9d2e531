"""What a run reads before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Gemma3Config, OPTConfig

from wpn_ds.data.embedded import embedded_file
from wpn_ds.engine.checks import check as check_settings
from wpn_ds.engine.corpus import read_records
from wpn_ds.errors import UserError
from wpn_ds.objectives.terms import Terms
from wpn_ds.settings.run import Config


def test_weight_decay_leaves_alone_what_no_text_trains(world) -> None:
    def check(lm_config, **settings) -> None:
        config = Config.from_flat({"train_file": ["f"], "output_dir": "out", **settings}).resolved()
        ds_json = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
        check_settings(config, ds_json, Terms.of(config.objective, retain=False), lm_config, world)

    check(OPTConfig(), weight_decay=0.1)
    check(Gemma3Config())
    with pytest.raises(UserError, match=r"--weight_decay 0\.1: gemma3 models have parts .*pass --weight_decay 0"):
        check(Gemma3Config(), weight_decay=0.1)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str]]:
    rows = {
        "train_file": [{"prompt": f"p{k}", "rejected": "bad"} for k in range(40)],
        "retain_file": [{"prompt": f"q{k}", "response": f"kept {k}"} for k in range(5)],
        "validation_file": [{"prompt": f"v{k}", "chosen": "own", "rejected": "bad"} for k in range(3)],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: [str(tmp_path / name)] for name in rows}


def wanted(objective: str, **settings) -> set[str]:
    forget, *_ = read_records(Config.from_flat({"objective": objective, "output_dir": "out", **settings}))
    assert [record.prompt for record in forget] == [f"p{k}" for k in range(40)]
    return {text for record in forget for text in record.chosen}


@pytest.mark.parametrize("objective", ["ga", "npo", "tnpo"])
def test_an_objective_without_wanted_answers_needs_none(objective, files) -> None:
    assert wanted(objective, **files) == set()


@pytest.mark.parametrize("objective", ["wpn", "dpo", "altpo", "pmpo"])
def test_one_with_wanted_answers_says_which_record_has_none(objective, files) -> None:
    with pytest.raises(UserError, match=r'train_file:1: field "chosen": is missing'):
        wanted(objective, **files)
    assert wanted(objective, **files, wanted_file=files["retain_file"]) == {f"kept {k}" for k in range(5)}


def test_llmu_and_idkdpo_draw_the_answers_that_make_them_what_they_are(files) -> None:
    assert wanted("llmu", **files) == {f"kept {k}" for k in range(5)}
    ways = embedded_file("dont_know", "txt").read_text().splitlines()
    assert len(wanted("idkdpo", **files)) > 5 and wanted("idkdpo", **files) <= set(ways)
    assert len(set(ways)) == len(ways) == 20
    del files["retain_file"]
    with pytest.raises(
        UserError, match="--objective llmu draws its wanted answers from retain data: add --retain_file"
    ):
        wanted("llmu", **files)


def test_held_out_prompts_keep_the_wanted_answers_that_they_have(files) -> None:
    config = Config.from_flat({"objective": "idkdpo", "output_dir": "out", **files})
    *_, validation, asked = read_records(config)
    assert {record.chosen for record in validation} == {("own",)} and asked == validation
    files["validation_file"] = files["train_file"]
    config = Config.from_flat({"objective": "idkdpo", "output_dir": "out", **files})
    *_, validation, asked = read_records(config)
    assert all(record.chosen for record in validation) and asked == validation


def test_the_probe_holds_answers_against_the_records_own_wanted_ones(files, tmp_path) -> None:
    own = [{"prompt": f"p{k}", "chosen": "own", "rejected": "bad"} for k in range(40)]
    (tmp_path / "own").write_text("".join(json.dumps(line) + "\n" for line in own))
    files = {"train_file": [str(tmp_path / "own")], "retain_file": files["retain_file"]}
    forget, *_, asked = read_records(Config.from_flat({"objective": "llmu", "output_dir": "out", **files}))
    assert {record.chosen for record in asked} == {("own",)} and ("own",) not in {r.chosen for r in forget}
