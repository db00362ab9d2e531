from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wpn_ds.cli import main
from wpn_ds.evaluate.training import read_settings
from wpn_ds.models import mixing
from wpn_ds.models.mixing import mixed
from wpn_ds.settings.style import PromptStyle


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> Path:
    """A folder with ``start``, and ``unlearned`` in shards and in bfloat16, with what training leaves beside it."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(tiny / "opt", root / "start")
    model = AutoModelForCausalLM.from_pretrained(tiny / "opt")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(root / "unlearned", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(tiny / "opt").save_pretrained(root / "unlearned")
    (root / "unlearned" / "run.yaml").write_text('prompt_template: "Q {prompt} A"\nmodel_name_or_path: m\n')
    (root / "unlearned" / "metrics.jsonl").write_text("{}\n")
    (root / "unlearned" / "pytorch_model.bin").write_bytes(b"an older export")
    return root


def mix(pair: Path, out: Path, *alphas: str, start: str = "start", unlearned: str = "unlearned") -> int:
    arguments = ["--start", str(pair / start), "--unlearned", str(pair / unlearned), "--output_dir", str(out)]
    return main(["mix", *arguments, "--alpha", *alphas])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_ends_are_the_models_themselves_and_between_them_lies_the_mean_in_the_unlearned_ones_layout(
    pair, tmp_path, capsys
) -> None:
    out = tmp_path / "mixed"
    assert mix(pair, out, "0", "0.5", "1") == 0
    folders = [out / name for name in ("alpha-0", "alpha-0.5", "alpha-1")]
    assert capsys.readouterr().out.split() == list(map(str, folders))
    assert sorted(path.name for path in out.iterdir()) == [folder.name for folder in folders]
    assert len(bits(pair / "unlearned")) > 2, "it has shards"
    assert bits(folders[2]) == bits(pair / "unlearned")
    start, unlearned = weights(pair / "start"), weights(pair / "unlearned")
    none, half = weights(folders[0]), weights(folders[1])
    for name, one in start.items():
        assert torch.equal(none[name], one.bfloat16())
        mean = ((one.double() + unlearned[name].double()) / 2).float().bfloat16()
        assert half[name].dtype == torch.bfloat16
        torch.testing.assert_close(half[name], mean, rtol=0.01, atol=1e-6)
        assert not torch.equal(half[name], none[name]) and not torch.equal(half[name], unlearned[name])


def test_the_start_comes_back_bit_for_bit_where_the_dtypes_agree(pair, tmp_path) -> None:
    assert mix(pair, tmp_path / "back", "0", start="unlearned", unlearned="start") == 0
    half = tmp_path / "half"
    assert mix(pair, half, "0.5", unlearned="start") == 0
    assert bits(half) == bits(pair / "start"), "a model mixed with itself"
    torch.testing.assert_close(
        weights(tmp_path / "back"), {k: w.float() for k, w in weights(pair / "unlearned").items()}
    )


def test_what_describes_the_model_comes_along_and_is_read_by_transformers_and_by_evaluate(pair, tmp_path) -> None:
    out = tmp_path / "mixed"
    assert mix(pair, out, "0.25") == 0
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (pair / "unlearned").iterdir()} - {"metrics.jsonl", "pytorch_model.bin"} | {
        "README.md"
    }
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (out / "config.json").read_bytes() == (pair / "unlearned" / "config.json").read_bytes()
    assert PromptStyle.of(read_settings(out)).template == "Q {prompt} A"
    card = (out / "README.md").read_text()
    assert "W = start + 0.25 (unlearned - start)" in card and "beyond" not in card and str(pair) not in card


def test_beyond_the_two_models_is_allowed_and_said(pair, tmp_path, capsys) -> None:
    assert mix(pair, tmp_path / "out", "-0.5", "1.5") == 0
    assert "--alpha -0.5 1.5: beyond the two models, extrapolated" in capsys.readouterr().err
    assert "extrapolation" in (tmp_path / "out" / "alpha-1.5" / "README.md").read_text()
    start, unlearned = weights(pair / "start"), weights(pair / "unlearned")
    beyond = weights(tmp_path / "out" / "alpha--0.5")
    for name, one in start.items():
        expected = (1.5 * one.double() - 0.5 * unlearned[name].double()).float().bfloat16()
        torch.testing.assert_close(beyond[name], expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("alpha", [-2.0, -0.3, 0.1, 0.5, 0.9, 1.7])
def test_mixing_is_linear_and_computed_in_fp32_whatever_the_storage(alpha) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 1000)
    oracle = one.double() + alpha * (other.double() - one.double())
    torch.testing.assert_close(mixed(one, other, alpha).double(), oracle, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(mixed(one, mixed(one, other, alpha), 0.5), mixed(one, other, alpha / 2))
    torch.testing.assert_close(mixed(one, other, alpha), mixed(other, one, 1 - alpha))
    low = mixed(one.bfloat16(), other.bfloat16(), alpha)
    assert torch.equal(low, mixed(one.bfloat16().float(), other.bfloat16().float(), alpha).bfloat16())
    wide = mixed(one, other.bfloat16(), alpha)
    assert torch.equal(wide, mixed(one, other.bfloat16().float(), alpha).bfloat16()), "the start keeps its precision"
    assert torch.equal(mixed(one, one, alpha), one)
    signed = torch.tensor([-0.0, 0.0, torch.inf])
    assert torch.equal(mixed(one[:3], signed, 1.0).view(torch.int32), signed.view(torch.int32))


def changed(pair: Path, tmp_path: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of ``start`` with some tensors others (None: gone)."""
    folder = shutil.copytree(pair / "start", tmp_path / "changed")
    held = {**weights(folder), **tensors}
    save_file({k: w for k, w in held.items() if w is not None}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.decoder.final_layer_norm.weight"


def refused(capsys, code: int, *said: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if "beyond the two" not in line]
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and all(part in lines[0] for part in said), lines[0]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({NORM: None}, f"lacks, {NORM} first"),
        ({"extra": torch.zeros(2)}, "--start {start} has 1 weights that --unlearned"),
        ({NORM: torch.zeros(5)}, f"{NORM} is 5 in --start"),
        ({NORM: torch.zeros(32, dtype=torch.int8)}, f"{NORM} is torch.int8 in --start"),
        ({NORM: torch.full([32], 1e38)}, f"--alpha -9: {NORM} is no longer finite as torch.bfloat16"),
    ],
)
def test_weights_that_cannot_be_mixed_are_refused_in_one_line_and_leave_nothing(
    pair, tmp_path, capsys, tensors, said
) -> None:
    folder = changed(pair, tmp_path, **tensors)
    refused(capsys, mix(pair, tmp_path / "out", "-9", start=str(folder)), said.format(start=folder))
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_no_weights_come_along_where_both_have_the_same(pair, tmp_path) -> None:
    held = changed(pair, tmp_path, mask=torch.tensor([True, False]), scale=torch.tensor(2.0))
    assert mix(pair, tmp_path / "out", "0.5", start=str(held), unlearned=str(held)) == 0
    assert bits(tmp_path / "out") == bits(held)


def test_what_is_no_model_or_no_pair_is_refused_in_one_line(pair, tiny, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    refused(capsys, mix(pair, out, "1", start="none"), "--start", "there is no such folder")
    refused(capsys, mix(pair, out, "1", unlearned=str(tiny / "gpt_neo")), 'model_type is "opt" and "gpt_neo"')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(capsys, mix(pair, out, "1", unlearned=str(adapter)), "--unlearned", "an adapter (PEFT)")
    pickled = shutil.copytree(pair / "start", tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(capsys, mix(pair, out, "1", start=str(pickled)), "--start", "no safetensors there")
    cut = shutil.copytree(pair / "start", tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-7])
    refused(capsys, mix(pair, out, "1", start=str(cut)), "model.safetensors is damaged")
    refused(capsys, mix(pair, out, "0.5", "0.50"), "--alpha 0.5 0.5: one is given twice")
    refused(capsys, mix(pair, out, "inf"), "--alpha must be a number, got 'inf'")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(capsys, mix(pair, out, "0.5"), "is not empty: name a new folder")


def test_a_kill_in_the_middle_leaves_no_half_a_model(pair, tmp_path, monkeypatch) -> None:
    written: list[str] = []

    def stopped(key, *rest):
        written.append(key)
        if len(written) == 40:
            raise KeyboardInterrupt
        return checked(key, *rest)

    checked = mixing._checked
    monkeypatch.setattr(mixing, "_checked", stopped)
    assert mix(pair, tmp_path / "out", "0.25", "0.5", "0.75") == 130
    assert list(tmp_path.iterdir()) == []


def test_neither_model_is_ever_in_memory_as_a_whole(pair, tmp_path, monkeypatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def counted(one, other, alpha):
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None]
        most = max(most, len(alive))
        made = plain(one, other, alpha)
        alive.extend(map(weakref.ref, (one, other, made)))
        return made

    plain = mixing.mixed
    monkeypatch.setattr(mixing, "mixed", counted)
    assert mix(pair, tmp_path / "out", "0.5") == 0
    assert len(json.loads((pair / "unlearned" / "model.safetensors.index.json").read_text())["weight_map"]) > 20
    assert most <= 1, "the tensor that is written goes when the next one is made"
