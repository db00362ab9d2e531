"""Runs that train adapters: what they export, how they go on, what an adapter's folder is afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wpn_ds.cli
from tests.engine import runs
from tests.engine.gradient_cases import rounded_to_4_bits
from tests.engine.runs import cached, flags, losses
from wpn_ds.engine import checks
from wpn_ds.errors import UserError
from wpn_ds.evaluate.model import AskedModel
from wpn_ds.models.adapters import WEIGHTS
from wpn_ds.models.load import Source

LORA = ["--lora_r", "4", "--lora_target", "all-linear", "--save_steps", "2"]
TEXT = torch.tensor([[5, 9, 33, 12, 7, 8]])


@pytest.fixture(scope="module")
def train(pool, tiny) -> Callable[..., str]:
    def run(out: Path, *extra: str, ranks: int = 2, code: int = 0, ds: str = "zero3", model: str = "opt") -> str:
        line = flags(tiny, out, *LORA, *extra, ds=ds, model=model)
        return runs.train(pool, line, cached(tiny), ranks=ranks, code=code)

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "out"
    train(out)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WPN_DS_CACHE", str(tmp_path / "cache"))


def same_adapters(one: Path, other: Path) -> bool:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    return lm.eval()(TEXT).logits


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapter(base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT itself makes of the two."""
    return logits(PeftModel.from_pretrained(loaded(base), str(adapter)))


def test_the_export_is_an_adapter_that_peft_puts_onto_its_base(unbroken, tiny):
    about = json.loads((unbroken / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tiny / "opt") and about["r"] == 4 and about["inference_mode"]
    assert not (unbroken / "config.json").exists() and (unbroken / "DONE").exists()
    weights = load_file(unbroken / WEIGHTS)
    assert all(weight.numel() for weight in weights.values()), "under ZeRO-3 a weight is gathered before it is saved"
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert (with_adapter(tiny / "opt", unbroken) - logits(loaded(tiny / "opt"))).abs().max() > 1e-3
    AutoTokenizer.from_pretrained(unbroken)


def test_the_base_is_in_no_checkpoint_and_the_optimizer_knows_the_adapters_alone(unbroken):
    adapters = sum(weight.numel() for weight in load_file(unbroken / WEIGHTS).values())
    for path in (unbroken / "checkpoint-6" / "state").glob("*.pt"):
        told = torch.load(path, weights_only=False)
        if path.name.endswith("optim_states.pt"):
            groups = told["optimizer_state_dict"]["fp32_flat_groups"]
            assert sum(group.numel() for group in groups) == pytest.approx(adapters / 2, rel=0.05)
        else:
            assert all("lora_" in name for shapes in told["param_shapes"] for name in shapes)
            assert not any(
                torch.is_tensor(w) and w.numel() and "lora_" not in name for name, w in told["module"].items()
            )


def test_a_run_goes_on_bit_for_bit(train, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "DONE").unlink()
    assert "checkpoint-4 after step 4" in train(out, "--resume_from_checkpoint", "auto")
    assert losses(out) == losses(unbroken) and same_adapters(out, unbroken)


@pytest.mark.parametrize("ds", ["zero0", "zero1"])
def test_a_frozen_head_is_in_no_checkpoint_by_its_second_name_either(train, tmp_path, ds):
    train(tmp_path / "out", "--max_steps", "2", ranks=1, ds=ds)
    states = [*(tmp_path / "out" / "checkpoint-2" / "state").glob("*model_states.pt")]
    names = [name for path in states for name in torch.load(path, weights_only=False)["module"]]
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize("ds", ["zero0", "zero3"])
def test_a_run_goes_on_with_another_number_of_ranks(train, tmp_path, ds):
    whole, out, quiet = tmp_path / "whole", tmp_path / "out", ["--adam_epsilon", "1e-3"]
    train(whole, *quiet, ranks=1, ds=ds)
    train(out, *quiet, ranks=2, ds=ds)
    (out / "DONE").unlink()
    shutil.rmtree(out / "checkpoint-6")
    assert "checkpoint-4 after step 4" in train(out, *quiet, "--resume_from_checkpoint", "auto", ranks=1, ds=ds)
    for (_, one), (_, two) in zip(losses(out), losses(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    a, b = load_file(out / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in b)


def test_the_frozen_base_is_the_reference_whatever_says_so(train, unbroken, tmp_path):
    """The losses of a run that has the starting model in its tables are those of one that asks its own base."""
    for kind in ("states", "cpu"):
        out = tmp_path / kind
        train(out, "--reference", kind)
        for (_, one), (_, two) in zip(losses(out), losses(unbroken), strict=True):
            assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("model", ["opt", "gpt_neo"])
def test_merged_it_is_a_plain_model_with_the_same_logits(train, tiny, tmp_path, model):
    alone, merged = tmp_path / "alone", tmp_path / "merged"
    train(alone, "--max_steps", "2", model=model)
    train(merged, "--max_steps", "2", "--lora_merge", model=model)
    assert not (merged / "adapter_config.json").exists()
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert load_file(merged / "model.safetensors").keys() == load_file(tiny / model / "model.safetensors").keys()
    expected = with_adapter(tiny / model, alone)
    assert torch.allclose(logits(loaded(merged)), expected, atol=1e-5)
    for merge, made in ((True, tmp_path / "m"), (False, tmp_path / "a")):
        argv = ["checkpoint", "export", str(alone / "checkpoint-2"), "--output_dir", str(made)]
        assert wpn_ds.cli.main([*argv, "--lora_merge", str(merge).lower()]) == 0
    assert same_adapters(tmp_path / "a", alone)
    assert torch.allclose(logits(loaded(tmp_path / "m")), expected, atol=1e-5)


def test_a_base_in_4_bits_goes_on_bit_for_bit_and_is_merged_as_it_was_trained_on(train, tiny, tmp_path):
    whole, out, made, four_bits = tmp_path / "whole", tmp_path / "out", tmp_path / "made", ["--load_in_4bit", "true"]
    said = train(whole, *four_bits, ds="zero2")
    adapters = sum(weight.numel() for weight in load_file(whole / WEIGHTS).values())
    assert f"{loaded(tiny / 'opt').num_parameters() + adapters:,} parameters, {adapters:,} of them in" in said
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "DONE").unlink()
    assert "checkpoint-4 after step 4" in train(out, *four_bits, "--resume_from_checkpoint", "auto", ds="zero2")
    assert losses(out) == losses(whole) and same_adapters(out, whole)
    argv = ["checkpoint", "export", str(out / "checkpoint-6"), "--output_dir", str(made), "--lora_merge", "true"]
    assert wpn_ds.cli.main(argv) == 0
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    base = loaded(tiny / "opt")
    rounded_to_4_bits(base, tiny / "opt")
    expected = logits(PeftModel.from_pretrained(base, str(whole)))
    assert torch.allclose(logits(loaded(made)), expected, atol=1e-5)
    assert (expected - with_adapter(tiny / "opt", whole)).abs().max() > 1e-3, "4 bits changed nothing"


@pytest.mark.parametrize(
    ("ds", "installed", "told"),
    [
        ("zero3", True, r"--load_in_4bit with --deepspeed \S+zero3\.json: ZeRO stage 3 can't shard weights of 4 bits"),
        ("zero2", False, r"--load_in_4bit: needs bitsandbytes: pip install 'wpn-ds\[4bit\]'"),
    ],
)
def test_a_base_in_4_bits_that_cannot_be_had_is_refused(ds, installed, told, monkeypatch):
    if not installed:
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
    stage = {"zero_optimization": {"stage": int(ds[4:])}}
    with pytest.raises(UserError, match=told):
        checks.check_four_bits(stage, f"ds_configs/{ds}.json")


def test_an_adapter_s_folder_is_asked_as_the_model_that_it_makes(unbroken, tiny, tmp_path):
    for _ in range(2):  # the second time from the cache
        asked = AskedModel(Source(str(unbroken), "--model"), bf16=False)
        lm, tokenizer = asked.load()
        assert torch.allclose(logits(lm), with_adapter(tiny / "opt", unbroken), atol=1e-5)
        assert asked.name == str(unbroken) and tokenizer.eos_token_id is not None
    assert len(list((tmp_path / "cache" / "merged").iterdir())) == 1


def test_training_starts_from_an_adapter_s_folder(pool, train, unbroken, tiny, tmp_path):
    env, out = cached(tiny) | {"WPN_DS_CACHE": str(tmp_path / "cache")}, tmp_path / "whole"
    line = flags(tiny, out, "--max_steps", "1", "--model_name_or_path", str(unbroken))
    runs.train(pool, line, env)
    assert (out / "model.safetensors").is_file()
    line = flags(tiny, tmp_path / "again", *LORA, "--max_steps", "1", "--model_name_or_path", str(unbroken))
    told = runs.train(pool, line, env, code=2)
    assert "--lora_merge" in told and "Traceback" not in told


# ---- mistakes ----


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--lora_r", "4", "--lora_target", "q_prj"], "--lora_target q_prj: Target modules"),
        (["--lora_r", "-1"], "--lora_r must be at least 0"),
        (["--lora_alpha", "8"], "--lora_alpha: there are no adapters without their rank: give --lora_r"),
    ],
)
def test_a_mistake_is_one_line(pool, tiny, tmp_path, extra, told):
    said = runs.train(pool, flags(tiny, tmp_path / "out", *extra), cached(tiny), ranks=1, code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert told in line and "Traceback" not in said


def changed(adapter: Path, to: Path, **values: object) -> Path:
    shutil.copytree(adapter, to, ignore=shutil.ignore_patterns("checkpoint-*"))
    about = json.loads((to / "adapter_config.json").read_text()) | values
    (to / "adapter_config.json").write_text(json.dumps(about))
    return to


def other_weights(tiny: Path, adapter: Path, to: Path) -> Path:
    made = changed(adapter, to)
    weights = load_file(made / WEIGHTS)
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.77")] = weights.pop(name)
    save_file(weights, made / WEIGHTS)
    return made


def of_prompts(tiny: Path, adapter: Path, to: Path) -> Path:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(loaded(tiny / "opt"), config).save_pretrained(to)
    return to


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda tiny, a, to: changed(a, to, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda tiny, a, to: changed(a, to, base_model_name_or_path="/nowhere/b"), "its base model /nowhere/b"),
        (lambda tiny, a, to: changed(a, to, base_model_name_or_path=str(tiny / "gpt_neo")), "doesn't fit its base"),
        (other_weights, "don't fit its base model"),
        (of_prompts, "can't be merged"),
    ],
)
def test_an_adapter_that_makes_no_model_is_refused(unbroken, tiny, tmp_path, make, told):
    with pytest.raises(UserError, match=told) as refused:
        AskedModel(Source(str(make(tiny, unbroken, tmp_path / "made")), "--model"), bf16=False)
    assert str(refused.value).startswith("--model ") and "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").glob("merged/*/config.json"))


def test_an_adapter_of_another_tool_keeps_the_modules_that_it_saved(tiny, tmp_path):
    """modules_to_save are whole layers in place of the base's."""
    lm = get_peft_model(loaded(tiny / "opt"), PeftLora(r=2, target_modules=["v_proj"], modules_to_save=["fc1"]))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, lm.parameters()):
            parameter.normal_(std=0.1)
    lm.save_pretrained(tmp_path / "made")
    made, _ = AskedModel(Source(str(tmp_path / "made"), "--model"), bf16=False).load()
    assert torch.allclose(logits(made), logits(lm), atol=1e-5)
