"""The estimate's formulas against what is measured: tensors' sizes, the peak of real steps, a real DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
)
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from tests.launching import ROOT, environment
from tests.pool import Pool
from tests.tools.peak import Peak
from wpn_ds.errors import UserError
from wpn_ds.models.adapters import attach
from wpn_ds.models.sizes import KNOWN, Architecture, architecture, from_config
from wpn_ds.settings.lora import LoraConfig
from wpn_ds.tools.estimate import command
from wpn_ds.tools.estimate.changes import changes
from wpn_ds.tools.estimate.memory import (
    HEAD_CHUNK,
    NF4_BYTES,
    Job,
    activation_bytes,
    fits,
    head_bytes,
    host_memory,
    memory,
    states_bytes,
    total,
)
from wpn_ds.tools.estimate.network import communication, seconds

GIB = 2**30


def job(model: Architecture | str = "opt-1.3b", **values: Any) -> Job:
    found = KNOWN[model] if isinstance(model, str) else model
    defaults: dict[str, Any] = {
        "nodes": 1,
        "gpus_per_node": 8,
        "zero": {"stage": 3},
        "bf16": True,
        "gradient_checkpointing": False,
        "tokens_per_micro_batch": 4096,
        "max_length": 1024,
        "reference": "none",
        "global_batch_size": 32,
        "tokens_per_example": 512,
    }
    return Job(model=found, **(defaults | values))


# Architectures


def config_of(model: Architecture) -> Any:
    """The published configuration, written down a second time in transformers' terms."""
    if model.name.startswith("opt"):
        return OPTConfig(
            hidden_size=model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            ffn_dim=model.ffn,
            word_embed_proj_dim=512 if model.name == "opt-350m" else model.hidden,
            do_layer_norm_before=model.name != "opt-350m",
        )
    return GPTNeoConfig(
        hidden_size=model.hidden,
        num_layers=model.layers,
        num_heads=model.heads,
        attention_types=[[["global", "local"], model.layers // 2]],
    )


@pytest.mark.parametrize("model", KNOWN.values(), ids=KNOWN)
def test_a_known_model_has_exactly_the_parameters_and_buffers_that_transformers_gives_it(model: Architecture) -> None:
    config = config_of(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert model.parameters == sum(p.numel() for p in built.parameters())
    assert model.buffers == sum(b.numel() * b.element_size() for b in built.buffers())
    assert model.largest == max(p.numel() for p in built.parameters())
    assert from_config(config, model.name) == model


@pytest.mark.parametrize("name", ["opt-6.7b", "facebook/opt-6.7b", "OPT-6.7B"])
def test_a_known_model_is_found_with_and_without_its_owner_in_any_case(name: str) -> None:
    assert architecture(name) is KNOWN["opt-6.7b"]


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=90,
            word_embed_proj_dim=32,
        ),
        OPTConfig(
            hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=90, enable_bias=False
        ),
        GPTNeoConfig(hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], intermediate_size=80),
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=90),
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=90),
    ],
    ids=["opt", "opt-without-biases", "gpt_neo", "llama", "gpt2"],
)
def test_a_folder_with_a_config_has_the_parameters_of_its_model(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    found = architecture(str(tmp_path))
    assert found.parameters == sum(p.numel() for p in built.parameters())
    for target in (["auto"], ["all-linear"]):
        assert found.adapters(4, target) == adapters(config, target)


def adapters(config: Any, target: list[str]) -> int:
    """Parameters of the adapters that training attaches."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
        attach(built, LoraConfig(lora_r=4, lora_target=target), seed=0)
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


@pytest.mark.parametrize("model", ["opt-350m", "opt-1.3b", "gpt-neo-1.3b"])
@pytest.mark.parametrize("target", [["auto"], ["all-linear"], ["q_proj", "k_proj"]], ids="-".join)
def test_a_known_model_gets_exactly_the_adapters_that_training_attaches(model: str, target: list[str]) -> None:
    assert KNOWN[model].adapters(4, target) == adapters(config_of(KNOWN[model]), target)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_alone_have_gradients_optimizer_and_messages(stage: int, bf16: bool) -> None:
    values: dict[str, Any] = {"zero": {"stage": stage}, "bf16": bf16, "reference": "sharded"}
    whole, lora = job(**values), job(**values, adapters=1_000_000)
    assert lora.parameters == whole.parameters + 1_000_000 and lora.trained == 1_000_000
    small = states_bytes(job(dataclasses.replace(whole.model, parameters=1_000_000), **values))
    assert states_bytes(lora) == small | {"weights": states_bytes(lora)["weights"]}
    assert states_bytes(lora)["weights"] >= states_bytes(whole)["weights"] and "reference" not in memory(lora)
    assert total(lora) < total(whole) and sum(communication(lora).values()) <= sum(communication(whole).values())


def test_a_base_in_4_bits_has_the_bytes_that_bitsandbytes_gives_it() -> None:
    layer = torch.nn.Linear(512, 1024, bias=False)
    small = Linear4bit(512, 1024, bias=False, compress_statistics=True, quant_type="nf4")
    small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    state = small.weight.quant_state
    parts = [small.weight.data, state.absmax, state.state2.absmax]
    held = sum(part.numel() * part.element_size() for part in parts)
    assert held == pytest.approx(512 * 1024 * NF4_BYTES, rel=1e-3)


def test_only_linear_layers_are_in_4_bits(capsys: Any) -> None:
    flags = ("--model", "opt-6.7b", "--gpus_per_node", "1", "--lora_r", "16", "--json")
    whole, small = (json.loads(run(*flags, *more, capsys=capsys)[1]) for more in ([], ["--load_in_4bit", "true"]))
    model = KNOWN["opt-6.7b"]
    linears = sum(inputs * outputs * count for _, inputs, outputs, count in model.linears)
    assert linears == 32 * 12 * 4096**2 and small["zero_stage"] == 2 and whole["zero_stage"] == 3
    assert whole["memory"]["weights"] - small["memory"]["weights"] == pytest.approx(linears * (2 - 0.516), rel=1e-3)


# Measured: activations


SEGMENT = 64


def by_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, H, T, D] to [1, T, H, D]: SDPA for each text of a packed row."""
    pieces = zip(*(x.split(SEGMENT, 2) for x in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*piece, is_causal=True, scale=scale).transpose(1, 2) for piece in pieces], 1
    )


@pytest.fixture
def packed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **kwargs: Any) -> Any:
        return by_segments(q, k, v, scaling), None

    AttentionInterface.register("estimate_test", attention)
    AttentionMaskInterface.register("estimate_test", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        GPTNeoSelfAttention, "_attn", lambda self, q, k, v, mask=None: (by_segments(q, k, v, 1.0).transpose(1, 2), None)
    )


SMALL = {
    "opt": OPTConfig(
        hidden_size=256, ffn_dim=1024, num_hidden_layers=6, num_attention_heads=4, vocab_size=25_000, dropout=0.0
    ),
    "opt-350m": OPTConfig(
        hidden_size=256, ffn_dim=1024, num_hidden_layers=6, num_attention_heads=4, vocab_size=25_000, dropout=0.0,
        word_embed_proj_dim=128, do_layer_norm_before=False,
    ),
    "gpt_neo": GPTNeoConfig(
        hidden_size=256, num_layers=6, attention_types=[[["global", "local"], 3]], num_heads=4, vocab_size=25_000,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [512, 1024])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", SMALL)
def test_the_activations_of_a_packed_step_peak_within_10_percent_of_the_formula(
    family: str, bf16: bool, checkpointing: bool, tokens: int, packed_attention: None
) -> None:
    config = SMALL[family]
    if family != "gpt_neo":
        config._attn_implementation = "estimate_test"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Its gradient is of the head in the estimate, and comes when activations are gone.
    model.get_input_embeddings().requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    upstream = torch.randn(1, tokens, getattr(config, "word_embed_proj_dim", 256), dtype=model.dtype)
    inputs = {
        "input_ids": torch.randint(0, 1000, (1, tokens)),
        "position_ids": torch.arange(tokens)[None] % SEGMENT,
        "attention_mask": torch.zeros(1, 1, 1, 1),  # counts as prepared: else GPT-Neo's would be [tokens, tokens]
    }
    with Peak([*known, upstream]) as peak:
        model.base_model(**inputs, use_cache=False).last_hidden_state.backward(upstream)
    found = from_config(config, family)
    assumed = job(found, bf16=bf16, gradient_checkpointing=checkpointing, tokens_per_micro_batch=tokens)
    joined = assumed.width * tokens * found.hidden * (1 if checkpointing else found.layers)
    estimated = activation_bytes(assumed) + joined  # as --attention packed keeps it
    assert peak.peak == pytest.approx(estimated, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_peak_of_the_head_is_between_60_and_110_percent_of_the_formula(bf16: bool) -> None:
    """The chunks as they are described, in plain PyTorch."""
    vocab, width, labels = 25_000, 128, 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    hidden, weight = torch.randn(labels, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)
    ids = torch.randint(0, vocab, (labels,))
    with Peak([hidden, weight, ids]) as peak:
        states, of_states, of_weight = hidden + 0, [], torch.zeros(vocab, width)
        for rows, target in zip(states.split(HEAD_CHUNK), ids.split(HEAD_CHUNK), strict=True):
            logits = F.linear(rows, weight).float()
            delta = logits.softmax(-1)
            del logits
            delta[torch.arange(len(target)), target] -= 1
            delta = delta.to(dtype)
            of_states.append(delta @ weight)
            of_weight += delta.T @ rows
        _ = torch.cat(of_states)
    small = dataclasses.replace(KNOWN["opt-125m"], vocab=vocab, embed=width)
    estimated = head_bytes(job(small, bf16=bf16, tokens_per_micro_batch=labels))
    assert 0.6 * estimated < peak.peak < 1.1 * estimated


def test_the_heads_chunk_is_the_trainers() -> None:
    from wpn_ds.models.packed import CHUNK

    assert HEAD_CHUNK == CHUNK


# Measured: a real DeepSpeed


@pytest.fixture(scope="module")
def measured(pool: Pool) -> list[dict[str, Any]]:
    return pool.call(2, "tests.tools.estimate_worker:measured")[0]


def two_ranks(case: dict[str, Any]) -> Job:
    """The worker's job: two micro-batches a rank."""
    return job(
        dataclasses.replace(KNOWN["opt-125m"], parameters=case["parameters"]),
        gpus_per_node=2,
        zero={"stage": case["stage"], **case["zero"]},
        bf16=case["bf16"],
        global_batch_size=4,
        tokens_per_example=4096,
    )


def test_weights_gradients_and_optimizer_are_within_2_percent_of_what_deepspeed_holds(measured: Any) -> None:
    assert {(case["stage"], case["bf16"]) for case in measured} == {(s, b) for s in range(4) for b in (False, True)}
    for case in measured:
        assert case["held"] == pytest.approx(sum(states_bytes(two_ranks(case)).values()), rel=0.02), case


def test_a_steps_communication_is_what_deepspeed_sends(measured: Any) -> None:
    for case in measured:
        twice = {"all_reduce": 2}
        sent = sum(size * twice.get(name, 1) for name, size in case["moved"].items()) / 2  # (N - 1) / N of two ranks
        # What is whole from the forward to the backward pass, where not everything is, depends on the layers' order.
        tolerance = 0.15 if case["zero"] else 0.01
        assert sent == pytest.approx(sum(communication(two_ranks(case)).values()), rel=tolerance), case


# Properties


@pytest.mark.parametrize("model", ["opt-350m", "opt-13b", "gpt-neo-2.7b"])
@pytest.mark.parametrize("bf16", [False, True])
def test_each_stage_each_saving_and_each_gpu_more_needs_no_more_memory(model: str, bf16: bool) -> None:
    sizes = {"reduce_bucket_size": 2**24, "stage3_prefetch_bucket_size": 2**24}
    plain = job(model, bf16=bf16, zero={"stage": 3, **sizes}, reference="sharded")
    held = [sum(states_bytes(dataclasses.replace(plain, zero={"stage": stage})).values()) for stage in range(4)]
    assert held[3] < held[2] < held[1]
    assert bf16 is False or held[1] < held[0]
    for change in (
        {"gradient_checkpointing": True},
        {"tokens_per_micro_batch": 2048},
        {"reference": "states"},
        {"reference": "topk"},
        {"nodes": 2},
        {"zero": {**plain.zero, "offload_optimizer": {"device": "cpu"}}},
        {"zero": {**plain.zero, "offload_param": {"device": "nvme"}}},
    ):
        assert total(dataclasses.replace(plain, **change)) < total(plain), change


def test_what_is_offloaded_is_held_outside_the_gpu_instead() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}
    kept, moved = job(), job(zero=zero)
    states = states_bytes(kept)
    assert memory(kept).keys() - memory(moved).keys() == {"weights", "gradients", "optimizer"}
    assert host_memory(kept) == {}
    assert host_memory(moved) == {
        "cpu": 8 * (states["weights"] + states["gradients"]),
        "nvme": 8 * states["optimizer"],
    }


def test_weights_that_move_are_kept_where_they_lie_each_rank_its_share() -> None:
    offloaded = {"stage": 3, "offload_param": {"device": "cpu"}}
    for zero in ({"stage": 0}, {"stage": 1}, {"stage": 3}, offloaded):
        plain, moved = job(zero=zero, bf16=True), job(zero=zero, bf16=True, moves=1)
        share = 2 * math.ceil(plain.model.parameters / (8 if zero["stage"] else 1))
        here = 0 if zero is offloaded else share
        assert total(moved) - total(plain) == here
        outside = (host_memory(one).get("cpu", 0) for one in (moved, plain))
        assert operator.sub(*outside) == 8 * (share - here)
        assert memory(dataclasses.replace(moved, moves=2))["moved weights"] == here + 2 * share


def test_one_rank_sends_nothing_and_hpz_spares_the_network_between_nodes() -> None:
    assert communication(job(gpus_per_node=1)) == {}
    plain, hpz = (job("opt-30b", nodes=4, zero={"stage": 3, "zero_hpz_partition_size": size}) for size in (1, 8))
    assert seconds(hpz, 2400, 200) < seconds(plain, 2400, 200)
    assert total(hpz) > total(plain)


@pytest.mark.parametrize("gpu", [8, 16, 24, 32])
@pytest.mark.parametrize("stage", [0, 3])
def test_changes_come_in_their_order_each_saves_and_they_end_once_the_job_fits(gpu: int, stage: int) -> None:
    order = ["--bf16", "--gradient_checkpointing", "--tokens_per_micro_batch", "--reference states"]
    order += ["--deepspeed ds_configs/zero3.json", "--deepspeed ds_configs/zero3_offload.json", "--nodes"]
    start = job("opt-6.7b", bf16=False, zero={"stage": stage}, reference="sharded")
    room = gpu * GIB
    found = list(changes(start, room))
    assert found
    places = [next(k for k, name in enumerate(order) if change.what.startswith(name)) for change in found]
    assert places == sorted(set(places))
    totals = [total(start), *(total(change.job) for change in found)]
    assert totals == sorted(totals, reverse=True)
    assert not any(fits(change.job, room) for change in found[:-1])
    assert list(changes(job("opt-125m"), 80 * GIB)) == []


# The command


def run(*arguments: str, capsys: Any) -> tuple[int, str]:
    code = command.run(arguments)
    return code, capsys.readouterr().out


def test_the_command_says_whether_it_fits_by_its_exit_code(capsys: Any) -> None:
    flags = ("--model", "opt-6.7b", "--nodes", "2", "--gpus_per_node", "8")
    code, text = run(*flags, "--gpu_memory", "80", capsys=capsys)
    assert code == 0 and "What to change" not in text
    code, text = run(*flags, "--gpu_memory", "16", capsys=capsys)
    assert code == 1 and text.index("--gradient_checkpointing  ") > text.index("What to change")


def test_json_adds_up_and_has_every_figure_of_the_text(capsys: Any) -> None:
    code, text = run("--model", "gpt-neo-1.3b", "--gpu_memory", "16", "--gpus_per_node", "2", "--json", capsys=capsys)
    content = json.loads(text)
    assert code == 1 and content["fits"] is False
    assert content["total"] == sum(content["memory"].values())
    assert content["parameters"] == KNOWN["gpt-neo-1.3b"].parameters
    assert content["activations"]["plain"] > 5 * content["activations"]["checkpointed"]
    assert content["changes"][-1]["fits"] is True


def test_stage_offload_and_precision_come_from_the_deepspeed_file_and_a_flag_against_it_is_refused(
    tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"bf16": {"enabled": false}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    )
    flags = ("--model", "opt-350m", "--deepspeed", str(path), "--json")
    content = json.loads(run(*flags, capsys=capsys)[1])
    assert content["zero_stage"] == 2 and content["bf16"] is False and "optimizer" not in content["memory"]
    with pytest.raises(UserError, match=r"--bf16 true but .*ds\.json:1: bf16\.enabled is false"):
        run(*flags, "--bf16", capsys=capsys)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_file_is_estimated_where_its_folders_are_not_there(
    path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVME_PATH", raising=False)
    _, text = run("--model", "opt-1.3b", "--deepspeed", str(path), "--json", capsys=capsys)
    content = json.loads(text)
    assert content["zero_stage"] == int(path.stem[4])
    places = {"zero3_offload": {"cpu"}, "zero3_nvme": {"cpu", "nvme"}}.get(path.stem, set())
    assert content["host_memory_per_node"].keys() == places


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "./nowhere"], "--model ./nowhere"),
        (["--model", "opt-1.3b", "--deepspeed", "nowhere.json"], "--deepspeed nowhere.json"),
        (["--model", "opt-1.3b", "--load_in_4bit", "true"], "--load_in_4bit: what is in 4 bits can't be trained"),
        (
            ["--model", "opt-1.3b", "--lora_r", "4", "--load_in_4bit", "true", "--deepspeed", "ds_configs/zero3.json"],
            "--load_in_4bit with --deepspeed ds_configs/zero3.json: ZeRO stage 3 can't shard",
        ),
        (["--model", "opt-1.3b", "--max_length", "8192"], "--tokens_per_micro_batch 4096 is less than one row"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        command.run(flags)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [["--nodes", "0"], ["--gpu_memory", "nan"], ["--bf16", "perhaps"], []])
def test_a_bad_flag_is_named(flags: list[str]) -> None:
    with pytest.raises(
        UserError, match=rf"^{flags[0]} must be .*, got '{flags[1]}'$" if flags else "^--model is missing"
    ):
        command.run([*flags, "--model", "opt-1.3b"] if flags else [])


def test_a_known_model_is_answered_without_torch_transformers_or_deepspeed() -> None:
    code = (
        "import sys; from wpn_ds import cli; cli.main(['estimate', '--model', 'opt-66b']);"
        "sys.exit(bool({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0 and "opt-66b" in run.stdout, run.stderr
