"""The most that a run holds at a time against what ``wpn-ds estimate`` says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from tests.conftest import sentence
from tests.engine.runs import cached
from tests.pool import Pool
from wpn_ds.tools.estimate import command as estimate

SIZE = ["--tokens_per_micro_batch", "512", "--max_length", "256", "--global_batch_size", "2"]
SHORT = ["--max_steps", "2", "--probe_prompts", "0", "--peak_tflops", "0.1", "--bf16", "false"]


@pytest.fixture(scope="module")
def opt_125m(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shape with weights at random, and texts that fill a row to its last token."""
    folder = tmp_path_factory.mktemp("opt-125m")
    OPTForCausalLM(OPTConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "opt").save_pretrained(folder)
    pairs = [{"prompt": ask, "chosen": "so it is", "rejected": "go away"} for ask in ("why", "how")]
    for name, rows in (("train", pairs), ("retain", [{"text": sentence(k, 400)} for k in range(2)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("ds", ["zero3"])
@pytest.mark.parametrize("lora", [[], ["--lora_r", "16", "--lora_target", "all-linear"]], ids=["whole", "lora"])
def test_a_run_of_125_million_parameters_peaks_within_5_percent_of_the_estimate(
    pool: Pool, tiny: Path, opt_125m: Path, ds: str, lora: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file = f"ds_configs/{ds}.json"
    data = [f"--{name}_file={opt_125m}/{name}.jsonl" for name in ("train", "retain")]
    line = ["--deepspeed", json_file, "--model_name_or_path", str(opt_125m), *data, *SIZE, *SHORT]
    line += ["--retain_batch_size", "2", "--reference", "sharded", *lora, "--output_dir", str(tmp_path / "out")]
    (peak,) = pool.call(1, "tests.tools.peak:of_steps", *line, env=cached(tiny))
    shape = ["--model", str(opt_125m), "--deepspeed", json_file, "--gpus_per_node", "1", "--bf16", "false"]
    estimate.run([*shape, *SIZE, *lora, "--json"])
    estimated = json.loads(capsys.readouterr().out)
    assert peak == pytest.approx(estimated["total"], rel=0.05), estimated["memory"]
