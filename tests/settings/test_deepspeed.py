"""A DeepSpeed JSON as people have it becomes the one that the engine starts with."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pool import Pool
from wpn_ds.errors import UserError
from wpn_ds.settings.deepspeed import ResolvedDeepSpeed, bucket_sizes, for_loading, resolve_deepspeed
from wpn_ds.settings.deepspeed_keys import OPTIMIZER_FLAGS
from wpn_ds.settings.run import Config

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
HIDDEN = 64


def make(explicit: dict[str, Any] | None = None, **values: Any) -> Config:
    """A config in which `explicit` came by flags and `values` from a recipe."""
    given_names = explicit or {}
    return Config.from_flat({**values, **given_names}, explicit=given_names)


def resolve(source: Any, config: Config | None = None, **options: Any) -> ResolvedDeepSpeed:
    options = {"world_size": 2, "hidden_size": HIDDEN, "device": "cuda", "total_steps": 100} | options
    return resolve_deepspeed(source, config or make(), **options)


def error(source: Any, config: Config | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(source, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def adamw(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def scheduler(**params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupDecayLR", "params": params}}


# The shipped files


def test_the_six_shipped_files_are_there() -> None:
    assert [path.stem for path in DS_CONFIGS] == ["zero0", "zero1", "zero2", "zero3", "zero3_nvme", "zero3_offload"]


@pytest.fixture(autouse=True)
def nvme_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that zero3_nvme.json asks for."""
    folder = tmp_path / "nvme"
    folder.mkdir()
    monkeypatch.setenv("NVME_PATH", str(folder))
    return folder


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shipped_file_takes_everything_from_the_flags(path: Path, device: str) -> None:
    flags = {
        "learning_rate": 3e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "bf16": True,
        "global_batch_size": 6,
    }
    config = make(flags)
    resolved = resolve(path, config, device=device)
    assert resolved.config == config
    assert resolved.notes == []
    params = {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
    offloaded = path.stem in ("zero3_offload", "zero3_nvme")
    if not offloaded:
        params |= {"torch_adam": True, "fused": True}
    assert resolved.json["optimizer"] == {"type": "AdamW", "params": params}
    assert resolved.json["gradient_clipping"] == 0.5
    assert resolved.json["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert resolved.json["zero_optimization"]["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in resolved.json["zero_optimization"]) is offloaded
    assert "auto" not in json.dumps(resolved.json)


# Reading the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "zero_optimization": {"stage": 3,}\n}', ":2: not JSON"),
        ('{"bf16":\n', ":2: not JSON"),
        ('[\n"x"]', ":1: a DeepSpeed configuration is a JSON object"),
        (
            '{\n"gradient_clipping": 1,\n"gradient_clipping": 2}',
            ":3: gradient_clipping is given twice, first in line 2",
        ),
        (
            '{"zero_optimization": {"stage": 3,\n "offload_param": {"device": "cpu"},\n "stage": 2}}',
            ":3: zero_optimization.stage is given twice, first in line 1",
        ),
        ('{\n\n"zero_optimisation": {}}', ":3: zero_optimisation: unknown key; did you mean zero_optimization?"),
        ('{"zzz": {}}', ":1: zzz: unknown key: DeepSpeed would ignore or refuse it"),
        ('{"elasticity": {}}', ":1: elasticity: can't be used: a run goes on with another number of ranks by itself"),
        (
            '{"zero_optimization": {\n"overlap_com": 1}}',
            ":2: zero_optimization.overlap_com: unknown key; did you mean overlap_comm?",
        ),
        (
            '{"zero_optimization": {"offload_param": {\n"pin_memry": 1}}}',
            ":2: zero_optimization.offload_param.pin_memry: unknown key; did you mean pin_memory?",
        ),
        ('{"timers": {\n"throughput": 1}}', ":2: timers.throughput: must be an object"),
        ('{\n"optimizer": {"type": "AdamW",\n"param": {}}}', ":3: optimizer.param: unknown key; did you mean params?"),
        ('{\n"zero_optimization": true}', ":2: zero_optimization: must be an object"),
        ('{"zero_optimization": {\n"stage": 4}}', ":2: zero_optimization.stage: must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {\n"stage": true}}', ":2: zero_optimization.stage: must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {\n"stage": "3"}}', ":2: zero_optimization.stage: must be 0, 1, 2 or 3"),
        (
            '{"bf16": {"enabled": true},\n"bfloat16": {"enabled": false}}',
            ":2: bfloat16: is another name of bf16, which is given, too: remove one",
        ),
        (
            '{"zero_optimization": {"stage3_max_live_parameters": 1,\n"max_live_parameters": 2}}',
            ":2: zero_optimization.max_live_parameters: is another name of stage3_max_live_parameters",
        ),
        (
            '{"zero_optimization": {"cpu_offload": false,\n"offload_optimizer": {"device": "cpu"}}}',
            ":2: zero_optimization.offload_optimizer: is another name of cpu_offload",
        ),
        ("[" * 100_000, ": brackets in brackets, more than 100"),
        ('{"pipeline":' + "[" * 600 + "]" * 600 + "}", ": brackets in brackets, more than 100"),
        ('{"gradient_clipping":' + "9" * 5000 + "}", ": can't be read: Exceeds the limit (4300"),
        (
            '{\n"gradient_clipping":' + "9" * 400 + "}",
            ":2: gradient_clipping: settings: max_grad_norm must be a number",
        ),
    ],
)
def test_a_mistake_in_the_file_names_file_and_line(write: Any, text: str, message: str) -> None:
    path = write(text)
    assert f"{path}{message}" in error(path)


def test_a_missing_file_a_folder_and_bytes_are_named_with_the_flag(tmp_path: Path) -> None:
    assert error(tmp_path / "no.json") == f"--deepspeed {tmp_path / 'no.json'}: No such file or directory"
    assert error(tmp_path) == f"--deepspeed {tmp_path}: Is a directory"
    (tmp_path / "x.json").write_bytes(b'{"a\xff": 1}')
    assert "not UTF-8 at byte 3" in error(tmp_path / "x.json")


def test_the_old_name_of_bf16_alone_or_beside_null_is_as_good_as_the_new_one() -> None:
    for content in ({"bfloat16": {"enabled": True}}, {"bf16": None, "bfloat16": {"enabled": True}}):
        assert resolve(content).json["bf16"]["enabled"] is True
        assert "bfloat16" not in resolve(content).json


def test_the_same_key_in_two_sections_or_two_list_entries_is_no_duplicate(write: Any) -> None:
    text = json.dumps(
        {
            "zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
            "pipeline": {"passes": [{"a": 1}, {"a": ',]}"a": {'}], "a": 2},
        }
    )
    assert resolve(write(text)).json["pipeline"] == json.loads(text)["pipeline"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60)
@given(JSON.filter(lambda value: "auto" not in json.dumps(value)), st.sampled_from([None, 1]), st.booleans())
def test_values_that_are_not_ours_pass_untouched_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory, value: Any, indent: Any, escape: bool
) -> None:
    content = {"comms_logger": {"prof_ops": value}, "pipeline": {"y": value}, "autotuning": {"z": {"enabled": value}}}
    path = tmp_path_factory.mktemp("json") / "ds.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=escape), encoding="utf-8")
    resolved = resolve(path)
    assert {key: resolved.json[key] for key in content} == content


def test_the_callers_dictionary_is_left_as_it_is() -> None:
    content = {"zero_optimization": {"reduce_bucket_size": "auto"}, **adamw(lr="auto")}
    before = copy.deepcopy(content)
    resolve(content)
    assert content == before


# "auto"


def test_autos_are_filled() -> None:
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        **scheduler(warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto", total_num_steps="auto"),
    }
    resolved = resolve(content, make(learning_rate=2e-5, warmup_steps=10))
    assert resolved.json["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 12 * HIDDEN * HIDDEN,
        "stage3_prefetch_bucket_size": 12 * HIDDEN * HIDDEN,
        "stage3_param_persistence_threshold": 10 * HIDDEN,
    }
    assert resolved.json["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 2e-5,
        "warmup_num_steps": 10,
        "total_num_steps": 100,
    }
    assert resolved.json["fp16"]["enabled"] is resolved.json["bf16"]["enabled"] is False


@pytest.mark.parametrize("world_size", [1, 8, 64, 512])
@pytest.mark.parametrize("hidden", [64, 768, 1024, 2048, 4096, 9216])
def test_a_bucket_is_long_enough_for_the_wire_and_no_longer_than_a_layer(hidden: int, world_size: int) -> None:
    sizes = bucket_sizes(hidden, world_size)
    layer = 12 * hidden**2
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        assert sizes[key] <= layer
        assert sizes[key] == layer or sizes[key] / world_size >= 2**18
        assert sizes[key] == layer or sizes[key] >= 2**24
        assert sizes[key] % 2 == 0  # DeepSpeed asserts it of the all-gather bucket
        if "prefetch" not in key:
            assert 2 * sizes[key] <= 2**28  # bytes in bf16, up to 512 ranks
    # The next layer comes while one is computed, where DeepSpeed may hold both.
    assert (sizes["stage3_prefetch_bucket_size"] == layer) is (2 * layer <= 10**9 or hidden <= 1024)
    # Biases and norms stay whole, matrices don't.
    assert 4 * hidden <= sizes["stage3_param_persistence_threshold"] < hidden**2


def test_a_size_that_the_file_gives_is_kept() -> None:
    content = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}}
    resolved = resolve(content).json["zero_optimization"]
    assert resolved["reduce_bucket_size"] == 7
    assert resolved["stage3_prefetch_bucket_size"] == bucket_sizes(HIDDEN, 2)["stage3_prefetch_bucket_size"]


# NVMe


def nvme(path: Any, part: str = "offload_param", **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, part: {"device": "nvme", "nvme_path": path, **more}}}


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_the_nvme_folder_may_be_an_environment_variable(part: str, nvme_path: Path) -> None:
    resolved = resolve(nvme("$NVME_PATH", part)).json["zero_optimization"][part]
    assert resolved == {"device": "nvme", "nvme_path": str(nvme_path)}
    (nvme_path / "7").mkdir()
    resolved = resolve(nvme("${NVME_PATH}/7", part)).json["zero_optimization"][part]
    assert resolved["nvme_path"] == str(nvme_path / "7")


@pytest.mark.parametrize("part", ["offload_param", "offload_optimizer"])
def test_an_nvme_folder_that_is_not_there_is_named_with_file_and_line(
    part: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f":1: zero_optimization.{part}.nvme_path: "
    for said in (None, "", 3):
        path = write(json.dumps(nvme(said, part)))
        assert error(path).startswith(f"{path}:1: zero_optimization.{part}.nvme_path: must be a folder")
    assert where + "/no/such is no folder that can be written to" in error(write(json.dumps(nvme("/no/such", part))))
    monkeypatch.delenv("NVME_PATH")
    path = write(json.dumps(nvme("$NVME_PATH/x", part)))
    assert where + "$NVME_PATH/x is not set" in error(path)
    # An estimate is made where the disk is not.
    assert resolve(path, device=None).json["zero_optimization"][part]["nvme_path"] == "$NVME_PATH/x"


@pytest.mark.parametrize(("hidden", "world_size"), [(64, 1), (4096, 1), (4096, 3), (9216, 16)])
def test_nvme_buffers_hold_a_ranks_part_of_the_embedding(hidden: int, world_size: int) -> None:
    resolved = resolve(nvme("$NVME_PATH", buffer_size="auto"), hidden_size=hidden, world_size=world_size)
    assert resolved.json["zero_optimization"]["offload_param"]["buffer_size"] * world_size >= 256_000 * hidden
    kept = resolve(nvme("$NVME_PATH", buffer_size=5), hidden_size=hidden)
    assert kept.json["zero_optimization"]["offload_param"]["buffer_size"] == 5


def test_deepspeed_trains_from_nvme_as_from_memory(pool: Pool, nvme_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io can't be built here (it needs libaio and its header, libaio-dev)")
    one, other = (
        pool.call(1, "tests.settings.nvme_worker:losses", str(path), env={"NVME_PATH": str(nvme_path)})
        for path in DS_CONFIGS
        if path.stem in ("zero3_nvme", "zero3_offload")
    )
    assert one == other
    assert list(nvme_path.rglob("*.swp")), "nothing went to the disk"


def test_no_warm_up_is_one_step_for_deepspeed_which_refuses_none() -> None:
    assert resolve(scheduler(warmup_num_steps="auto")).json["scheduler"]["params"]["warmup_num_steps"] == 1


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"zero_optimization": {"overlap_comm": "auto"}}, "zero_optimization.overlap_comm"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"compile": {"passes": [1, "auto"]}}, "compile.passes.1"),
        ({"zero_optimization": {"offload_param": {"device": "auto"}}}, "zero_optimization.offload_param.device"),
        (scheduler(warmup_type="auto"), "scheduler.params.warmup_type"),
    ],
)
def test_an_auto_that_nothing_fills_is_named_by_its_path(content: dict[str, Any], path: str) -> None:
    assert f'{path}: "auto" has no meaning here' in error(content)


def test_an_auto_that_is_deepspeeds_own_word_stays() -> None:
    content = {
        "data_types": {"keep_in_fp32_modules": "auto"},
        "pipeline": {"stages": "auto"},
        "hybrid_engine": {"enabled": False, "max_out_tokens": "auto"},
    }
    assert content.items() <= resolve(content).json.items()


def test_total_steps_may_come_later_and_only_they_wait() -> None:
    content = {"train_batch_size": 48, **scheduler(total_num_steps="auto", warmup_num_steps="auto")}
    early = resolve(content, total_steps=None)
    assert early.json["scheduler"]["params"]["total_num_steps"] == "auto"
    assert early.config.training.global_batch_size == 48
    late = resolve(content, early.config)
    assert late.json["scheduler"]["params"]["total_num_steps"] == 100
    assert late.config == early.config


# Flags against the file

# (what the file holds, the key's path in it, the flag, the file's value as the flag's, another value)
OWNED: list[tuple[dict[str, Any], str, str, Any, Any]] = [
    (adamw(lr=3e-5), "optimizer.params.lr", "learning_rate", 3e-5, 2e-5),
    (adamw(eps=1e-6), "optimizer.params.eps", "adam_epsilon", 1e-6, 1e-7),
    (adamw(weight_decay=0.1), "optimizer.params.weight_decay", "weight_decay", 0.1, 0.2),
    (adamw(betas=[0.8, 0.95]), "optimizer.params.betas", "adam_beta1", 0.8, 0.85),
    (adamw(betas=[0.8, 0.95]), "optimizer.params.betas", "adam_beta2", 0.95, 0.99),
    ({"gradient_clipping": 0.3}, "gradient_clipping", "max_grad_norm", 0.3, 0.0),
    ({"bf16": {"enabled": True}}, "bf16.enabled", "bf16", True, False),
    ({"bfloat16": {"enabled": True}}, "bf16.enabled", "bf16", True, False),
    ({"train_batch_size": 16}, "train_batch_size", "global_batch_size", 16, 8),
    (scheduler(warmup_num_steps=7), "scheduler.params.warmup_num_steps", "warmup_steps", 7, 0),
    (scheduler(warmup_max_lr=3e-5), "scheduler.params.warmup_max_lr", "learning_rate", 3e-5, 2e-5),
]
IDS = [f"{path}-{flag}" for _, path, flag, _, _ in OWNED]


def value_at(content: dict[str, Any], path: list[str]) -> Any:
    node: Any = content
    for key in path:
        node = node[key]
    return node


@pytest.mark.parametrize(("content", "path", "flag", "value", "other"), OWNED, ids=IDS)
def test_a_value_of_the_file_is_adopted_where_no_flag_speaks(
    content: dict[str, Any], path: str, flag: str, value: Any, other: Any
) -> None:
    config = make(**{flag: other})
    resolved = resolve(content, config)
    assert resolved.config.to_flat()[flag] == value
    assert resolved.config.explicit == config.explicit
    if path != "train_batch_size":
        expected = [0.8, 0.95] if path.endswith("betas") else value
        assert value_at(resolved.json, path.split(".")) == expected
    assert resolve(content, resolved.config) == resolved


@pytest.mark.parametrize(("content", "path", "flag", "value", "other"), OWNED, ids=IDS)
def test_an_equal_flag_is_fine_and_another_one_is_refused_with_both_values(
    write: Any, content: dict[str, Any], path: str, flag: str, value: Any, other: Any
) -> None:
    assert resolve(content, make({flag: value})).config.to_flat()[flag] == value
    file = write(json.dumps(content))
    message = error(file, make({flag: other}))
    assert message.startswith(
        f"--{flag} {json.dumps(other)} but {file}:1: {path} is {json.dumps(value)}: make them equal"
    )
    assert '"auto"' in message


@pytest.mark.parametrize(("content", "path", "flag", "value", "other"), OWNED, ids=IDS)
def test_a_value_of_another_kind_is_refused(
    content: dict[str, Any], path: str, flag: str, value: Any, other: Any
) -> None:
    *parents, last = path.split(".")
    for wrong in ("3e-5", [], {"a": 1}, float("inf")):
        broken = copy.deepcopy({"bf16" if key == "bfloat16" else key: entry for key, entry in content.items()})
        value_at(broken, parents)[last] = wrong
        assert path in error(broken)


def test_a_value_that_the_flag_would_refuse_names_file_and_flag() -> None:
    message = error(adamw(lr=-1))
    assert "optimizer.params.lr" in message and "--learning_rate must be greater than 0" in message
    assert "train_batch_size: must be a whole number above 0" in error({"train_batch_size": 0})


def test_two_values_for_one_flag_are_refused() -> None:
    message = error({**adamw(lr=3e-5), **scheduler(warmup_max_lr=1e-4)})
    assert "optimizer.params.lr is 3e-05" in message
    assert "scheduler.params.warmup_max_lr is 0.0001" in message
    assert "--learning_rate" in message
    # also where the first one equals the default
    assert "--learning_rate" in error({**adamw(lr=make().training.learning_rate), **scheduler(warmup_max_lr=1e-4)})


def test_a_value_adopted_late_fills_an_auto_that_stands_before_it() -> None:
    resolved = resolve({**adamw(lr="auto"), **scheduler(warmup_max_lr=1e-4)})
    assert resolved.json["optimizer"]["params"]["lr"] == 1e-4


# Batches, clipping, precision


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 4])
def test_rows_and_accumulation_are_always_the_engines(stage: int, world_size: int) -> None:
    content = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "zero_optimization": {"stage": stage},
    }
    resolved = resolve(content, world_size=world_size)
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [resolved.json[key] for key in batches] == [world_size, 1, 1]
    assert len(resolved.notes) == 2
    assert all("is not used: wpn_ds sizes micro-batches by --tokens_per_micro_batch" in note for note in resolved.notes)
    assert resolve(dict.fromkeys(batches, "auto"), world_size=world_size).notes == []
    assert [resolve({}, world_size=world_size).json[key] for key in batches] == [world_size, 1, 1]


@pytest.mark.parametrize("norm", [0.0, 0.7, 1.0])
def test_clipping_is_always_written_down(norm: float) -> None:
    assert resolve({}, make(max_grad_norm=norm)).json["gradient_clipping"] == norm


def test_bf16_is_switched_on_by_the_flag_alone_and_stays_out_without_it() -> None:
    assert resolve({}, make(bf16=True)).json["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert resolve({"bf16": {"check_grad_overflow": True}}, make(bf16=True)).json["bf16"]["enabled"] is True
    assert "bf16" not in resolve({}).json
    assert "bfloat16" not in resolve({"bfloat16": {"enabled": True}}).json


def test_fp16_is_refused_with_the_way_out() -> None:
    assert "--bf16" in error({"fp16": {"enabled": True}})
    assert resolve({"fp16": {"enabled": False}}).json["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    "key", ["zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights"]
)
def test_zero_plus_plus_may_not_round_and_may_keep_second_shards(key: str) -> None:
    assert f"zero_optimization.{key}: must be false or left out" in error(
        {"zero_optimization": {"stage": 3, key: True}}
    )
    kept = {"stage": 3, key: False, "zero_hpz_partition_size": 2}
    assert resolve({"zero_optimization": kept}).json["zero_optimization"] == kept


def at(path: str, value: Any) -> dict[str, Any]:
    """A file with `value` at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gradient_allreduce_op", "sum"),
        ("managed_gradient_accumulation", False),
        ("communication_data_type", "fp16"),
        ("communication_data_type", "bf16"),
        ("seq_parallel_communication_data_type", "bf16"),
        ("data_types.grad_accum_dtype", "bf16"),
        ("data_types.param_dtype", "bf16"),
        ("data_types.keep_in_fp32_modules", []),
        ("prescale_gradients", True),
        ("gradient_predivide_factor", 2.0),
        ("sparse_gradients", True),
        ("weight_quantization", {"quantized_initialization": {}}),
        ("hybrid_engine.enabled", True),
        ("bf16.check_grad_overflow", False),
        ("bf16.bf16_master_weights_and_grads", True),
        ("torch_autocast.enabled", True),
        ("amp", {"enabled": False}),
        ("data_efficiency.enabled", True),
        ("data_efficiency.data_routing.random_ltd.enabled", True),
        ("curriculum_learning", {}),
        ("progressive_layer_drop", {}),
        ("compression_training", {}),
        ("eigenvalue", {"enabled": True}),
        ("compile.deepcompile", True),
        ("optimizer.params.maximize", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.offload_optimizer.super_offload", True),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.mics_shard_size", 2),
        ("zero_optimization.zeropp_loco_param", {}),
        ("zero_optimization.compute_grad_norm", False),
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.load_from_fp32_weights", False),
        ("tensor_parallel.autotp_size", 2),
        ("expert_parallel.enabled", True),
        ("autotuning.enabled", True),
        ("checkpoint.load_universal", True),
        ("checkpoint.use_node_local_storage", True),
        ("checkpoint.writer", {"type": "FAST"}),
        ("nebula", {}),
        ("datastates_ckpt", {}),
    ],
)
def test_what_would_change_a_result_without_a_word_is_refused_with_the_reason(path: str, value: Any) -> None:
    message = error(at("optimizer.type", "AdamW") | at(path, value))
    assert re.search(rf": {re.escape(path)}: (must be \S+ or left out|can't be used): \w.{{15}}", message), message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("communication_data_type", "fp32"),
        ("data_types.grad_accum_dtype", "fp32"),
        ("hybrid_engine", {"enabled": False, "max_out_tokens": 7}),
        ("zero_optimization.sub_group_size", 10**6),
        ("optimizer.params.amsgrad", True),
        ("gradient_predivide_factor", 1),
        ("timers.throughput.synchronized", False),
    ],
)
def test_what_changes_nothing_is_kept(path: str, value: Any) -> None:
    content: dict[str, Any] = at(path, value)
    content.setdefault("optimizer", {})["type"] = "AdamW"
    assert value_at(resolve(content).json, path.split(".")) == value


def test_null_is_as_good_as_left_out() -> None:
    content = {"bf16": {"check_grad_overflow": None}, "data_types": {"grad_accum_dtype": None}}
    zero = {"zero_optimization": {"stage": 3, "zenflow": None}}
    resolved = resolve(content | zero, make(bf16=True)).json
    assert resolved["bf16"]["check_grad_overflow"] is True and resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "zenflow" not in resolved["zero_optimization"]


def test_stage_0_has_one_line_for_a_sum_that_deepspeed_cannot_make() -> None:
    content = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert "data_types.grad_accum_dtype: ZeRO stage 0 can't sum bf16 gradients in fp32" in error(
        content, make(bf16=True)
    )
    for stage in (1, 2, 3):
        resolve(content | {"zero_optimization": {"stage": stage}}, make(bf16=True))
    resolve(content)


def test_activation_checkpointing_passes_with_a_note() -> None:
    resolved = resolve({"activation_checkpointing": {"partition_activations": True}})
    assert resolved.json["activation_checkpointing"] == {"partition_activations": True}
    assert len(resolved.notes) == 1 and "--gradient_checkpointing" in resolved.notes[0]


def test_for_loading_lacks_the_batch_size_and_nothing_else() -> None:
    full = resolve({"zero_optimization": {"stage": 3}}).json
    loading = for_loading(full)
    assert {**loading, "train_batch_size": full["train_batch_size"]} == full
    assert "train_batch_size" not in loading
    loading["zero_optimization"]["stage"] = 0
    assert full["zero_optimization"]["stage"] == 3


# Optimizers


@pytest.mark.parametrize(
    "content", [{}, {"optimizer": {"type": "adamw"}}, {"optimizer": {"type": "Adam", "params": None}}]
)
def test_adamw_is_complete_from_the_flags_even_where_the_file_is_silent(content: dict[str, Any]) -> None:
    params = resolve(content, make(learning_rate=2e-5, weight_decay=0.3)).json["optimizer"]["params"]
    torchs = {"torch_adam": True, "fused": True}
    assert params == {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.3} | torchs


@pytest.mark.parametrize(
    ("device", "zero", "expected"),
    [
        ("cuda", {"stage": 3}, True),
        ("cuda", {"stage": 3, "offload_optimizer": {"device": "cpu"}}, None),
        ("cpu", {"stage": 3}, True),
        ("cpu", {}, True),
        ("cpu", {"stage": 3, "offload_param": {"device": "cpu"}}, True),
        ("cpu", {"stage": 3, "offload_optimizer": None}, True),
        ("cpu", {"stage": 3, "offload_optimizer": {"device": "none"}}, True),
        ("cpu", {"stage": 3, "offload_optimizer": {"device": "cpu"}}, None),
        ("cpu", {"stage": 2, "cpu_offload": True}, None),
    ],
)
def test_adamw_is_torchs_without_offload(device: str, zero: dict[str, Any], expected: Any) -> None:
    resolved = resolve({"zero_optimization": zero}, device=device)
    assert resolved.json["optimizer"]["params"].get("torch_adam") is expected
    assert resolved.json["zero_optimization"] == zero
    assert "zero_allow_untested_optimizer" not in resolved.json


def test_a_file_that_says_torch_adam_itself_is_obeyed() -> None:
    assert resolve(adamw(torch_adam=False), device="cpu").json["optimizer"]["params"]["torch_adam"] is False
    for device in ("cpu", "cuda"):
        assert resolve(adamw(torch_adam=True), device=device).json["optimizer"]["params"]["fused"] is True
        assert "fused" not in resolve(adamw(torch_adam=False), device=device).json["optimizer"]["params"]


def test_torchs_adamw_is_fused_only_where_the_file_does_not_want_foreach() -> None:
    assert "fused" not in resolve(adamw(foreach=True), device="cpu").json["optimizer"]["params"]
    assert resolve(adamw(foreach=False), device="cpu").json["optimizer"]["params"]["fused"] is True
    assert resolve(adamw(capturable=True), device="cpu").json["optimizer"]["params"]["fused"] is True


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_FLAGS if not name.startswith("Adam")] + ["Adamax"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_other_optimizers_get_lr_and_decay_and_the_permission_that_deepspeed_wants(name: str, offloaded: bool) -> None:
    content: dict[str, Any] = {
        "optimizer": {"type": name, "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu" if offloaded else "none"}},
    }
    resolved = resolve(content, make(learning_rate=0.5, weight_decay=0.25), device="cpu")
    expected = {"lr": 0.5, "weight_decay": 0.25} if "weight_decay" in OPTIMIZER_FLAGS[name] else {"lr": 0.5}
    assert resolved.json["optimizer"] == {"type": name, "params": expected}
    untested = name not in ("Lion", "Adagrad")
    assert resolved.json.get("zero_allow_untested_optimizer", False) is untested
    assert resolved.json.get("zero_force_ds_cpu_optimizer", True) is not (untested and offloaded)


def test_the_parameters_that_have_flags_are_those_of_torch() -> None:
    import inspect

    import torch

    ours = ("lr", "betas", "eps", "weight_decay")
    cannot = {"Optimizer", "LBFGS", "SparseAdam", "Muon", "Adafactor"}
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass):
        if name not in cannot and issubclass(kind, torch.optim.Optimizer):
            assert OPTIMIZER_FLAGS[name] == {key for key in inspect.signature(kind).parameters if key in ours}, name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "AdmW"}, "did you mean AdamW?"),
        ({"type": "sgd"}, "did you mean SGD?"),
        ({"type": "LBFGS"}, "optimizer.type: must be one of AdamW,"),
        ({"params": {}}, "optimizer.type: must be one of AdamW,"),
        ({"type": "SGD", "params": {"betas": "auto"}}, "optimizer.params.betas: SGD has no betas: remove it"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1}}, "gradient_clipping"),
        ({"type": "AdamW", "params": {"betas": [0.9]}}, "optimizer.params.betas: must be two numbers"),
        ({"type": "AdamW", "params": [1]}, "optimizer.params: must be an object"),
        ({"type": "SGD", "params": {"fused": True, "foreach": True}}, "foreach: can't be true where fused is: remove"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(section: dict[str, Any], message: str) -> None:
    assert message in error({"optimizer": section})


def test_what_records_an_update_on_a_gpu_is_refused_where_the_update_is_on_a_cpu() -> None:
    content: dict[str, Any] = {"optimizer": {"type": "RAdam", "params": {"capturable": True}}}
    assert "optimizer.params.capturable: is for an update on a GPU: remove it" in error(content, device="cpu")
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert "optimizer.params.capturable" in error(content | offload, device="cuda")
    assert resolve(content, device="cuda").json["optimizer"]["params"]["capturable"] is True


# Schedulers


def test_a_scheduler_in_the_file_becomes_the_setting_deepspeed() -> None:
    config = resolve(scheduler()).config
    assert config.training.lr_scheduler_type == "deepspeed"
    assert resolve(scheduler(), make({"lr_scheduler_type": "deepspeed"})).config == make(
        {"lr_scheduler_type": "deepspeed"}
    )


def test_a_scheduler_in_the_file_against_the_flag_is_refused_and_so_is_the_flag_without_one() -> None:
    message = error(scheduler(), make({"lr_scheduler_type": "cosine"}))
    assert "--lr_scheduler_type cosine" in message and "scheduler.type is WarmupDecayLR" in message
    assert "has no scheduler" in error({}, make({"lr_scheduler_type": "deepspeed"}))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("WarmupLR", {"warmup_max_lr", "warmup_num_steps"}),
        ("WarmupDecayLR", {"warmup_max_lr", "warmup_num_steps", "total_num_steps"}),
        ("WarmupCosineLR", {"warmup_num_steps", "total_num_steps"}),
        ("OneCycle", set()),
    ],
)
def test_a_scheduler_never_runs_on_deepspeeds_own_learning_rate_and_steps(name: str, keys: set[str]) -> None:
    params = resolve({"scheduler": {"type": name}}).json["scheduler"]["params"]
    assert set(params) == keys
    assert "auto" not in params.values()


def test_a_scheduler_that_ends_at_another_step_than_the_run_is_noted() -> None:
    resolved = resolve(scheduler(total_num_steps=70))
    assert resolved.json["scheduler"]["params"]["total_num_steps"] == 70
    assert len(resolved.notes) == 1 and "is 70, but the run has 100 steps" in resolved.notes[0]


def test_a_resolved_file_can_be_resolved_again() -> None:
    for path in DS_CONFIGS:
        resolve(resolve(path, make(bf16=True)).json, make(bf16=True, global_batch_size=2))
