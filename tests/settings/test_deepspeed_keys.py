"""The table has every key that DeepSpeed reads."""

from __future__ import annotations

from typing import Any

import pytest

from wpn_ds.settings.deepspeed_keys import FREE, KEPT, OURS, TABLE, Only, entry_of, meaning


def models() -> list[tuple[str, Any]]:
    """(section, DeepSpeed's own description of it)."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return [
        ("bf16", DeepSpeedBF16Config),
        ("bfloat16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("compile", CompileConfig),
        ("comms_logger", CommsLoggerConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
        ("tensorboard", TensorBoardConfig),
        ("wandb", WandbConfig),
        ("csv_monitor", CSVConfig),
        ("comet", CometConfig),
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.leaf_module", DeepSpeedZeroLeafModuleConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ]


def test_a_section_has_the_keys_that_deepspeed_has_by_either_name() -> None:
    for section, model in models():
        table = entry_of(tuple(section.split(".")))
        assert isinstance(table, dict)
        theirs = {name for key, about in model.model_fields.items() for name in (key, about.alias) if name}
        gone = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
        assert table.keys() - gone == theirs, section


def test_two_names_of_a_key_mean_the_same_and_no_others_do() -> None:
    for section, model in models():
        meant: dict[str, set[str]] = {}
        for key, about in model.model_fields.items():
            extra = about.json_schema_extra or {}
            newer = extra.get("new_param", key) if extra.get("set_new_param", True) else key
            meant.setdefault(newer, set()).update(name for name in (key, about.alias) if name)
        for names in meant.values():
            assert len({meaning(name) for name in names}) == 1, section
        assert len({meaning(next(iter(names))) for names in meant.values()}) == len(meant), section
    assert meaning("bfloat16") == meaning("bf16") != meaning("fp16")


def test_every_other_key_at_the_top_is_one_that_deepspeed_names() -> None:
    from deepspeed.runtime import config, constants

    removed = config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | config._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert all(entry_of((key,)) or entry_of(("zero_optimization", key)) for key in removed)
    inside = {"params", "type", "enabled", "seed", "global_rank", "data_parallel_group", "ddp_bf16"}
    for name, default in vars(constants).items():
        key = getattr(constants, name.removesuffix("_DEFAULT"), None)
        if name.endswith("_DEFAULT") and isinstance(key, str) and key == key.lower() and key not in inside:
            assert key in str(TABLE), (name, default)


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ("train_batch_size", OURS),
        ("zero_optimization.sub_group_size", KEPT),
        ("compile.passes.1", KEPT),
        ("pipeline.stages", FREE),
        ("hybrid_engine.max_out_tokens", FREE),
        ("zero_optimization.nothing", None),
        ("nothing.at.all", None),
    ],
)
def test_an_entry_is_that_of_the_nearest_key_above(path: str, entry: Any) -> None:
    assert entry_of(tuple(path.split("."))) is entry


def test_every_refusal_has_a_reason() -> None:
    def entries(table: dict[str, Any]) -> Any:
        for entry in table.values():
            yield from entries(entry) if isinstance(entry, dict) else [entry]

    only = [entry for entry in entries(TABLE) if isinstance(entry, Only)]
    assert len(only) > 40 and all(entry.why for entry in only)
