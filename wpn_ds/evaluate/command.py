"""``wpn-ds evaluate``: one model, or a model against its baseline, in one plain process."""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from wpn_ds.config import DataConfig
from wpn_ds.data.records import ForgetRecord, RetainRecord, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.evaluate.harmless import Evaluation, evaluate_model
from wpn_ds.evaluate.report import write_report
from wpn_ds.evaluate.table import format_table
from wpn_ds.models.load import Source, load_model, load_tokenizer

MAX_LENGTH = 2048
"""Tokens of a prompt with its answer at most; a model with fewer positions sets the limit."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wpn-ds evaluate",
        description="Generates and judges answers to training, held-out and attack prompts, measures the perplexity of"
        " retain answers, and writes report.json and report.html. Without files: those that the model was trained on,"
        " if training left its run.yaml beside it, or else the embedded demo set.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="model to evaluate: a folder in Hugging Face format, or a hub name")
    add("--baseline", help="model to compare with, usually the one that training started from")
    add("--output_dir", required=True, type=Path, help="folder for report.json and report.html")
    files = {"train": "prompts that were unlearned", "heldout": "prompts that training never saw", "attack": "attacks"}
    for name, meaning in files.items():
        add(
            f"--{name}_file",
            nargs="+",
            default=[],
            metavar="FILE",
            help=f"JSONL of {meaning}: prompt, chosen, rejected",
        )
    add("--retain_file", nargs="+", default=[], metavar="FILE", help="JSONL of what to keep: prompt, response; or text")
    add("--max_new_tokens", type=_positive, default=48, help="tokens of an answer at most (default 48)")
    add("--batch_size", type=_positive, default=32, help="prompts that are answered at a time (default 32)")
    add(
        "--prompt_template",
        help="text around a prompt, \\n for a line break (default: the one the model was trained on)",
    )
    add("--limit", type=_positive, metavar="N", help="only the first N records of every file")
    add("--bf16", action="store_true", help="load the models in bfloat16 instead of fp32")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Evaluates, prints the before/after table and names the report.

    With no data file at all the four embedded demo files are used; otherwise exactly those that are given.

    Raises:
        UserError: a model or a file is missing or bad, before anything is generated.
    """
    options = _parser().parse_args(argv)
    for flag in ("model", "baseline"):
        if getattr(options, flag):
            _check_place(f"--{flag}", getattr(options, flag))
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {options.output_dir} can't be used ({error.strerror})") from error
    recorded = _recorded(Path(options.model) / "run.yaml")
    template = _template(options, recorded)
    options.bf16 = options.bf16 or bool(recorded.get("bf16"))
    if not any(getattr(options, f"{name}_file") for name in ("train", "heldout", "attack", "retain")):
        if recorded.get("dataset_name"):
            raise UserError(
                f"{options.model} was trained on the data set {recorded['dataset_name']}: name files to evaluate on "
                "with --train_file or --heldout_file"
            )
        options.train_file = recorded.get("train_file") or []
        options.heldout_file = recorded.get("validation_file") or []
        options.retain_file = recorded.get("retain_file") or []
    suites, retain, files = _records(options)
    settings = {
        "model": options.model,
        "baseline": options.baseline,
        "prompt_template": template,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "device": _device().type,
        "limit": options.limit,
        "files": files or "the embedded demo set",
        "seed": 0,
    }
    before = _evaluate("--baseline", options.baseline, "before", suites, retain, template, options)
    after = _evaluate("--model", options.model, "after", suites, retain, template, options)
    assert after is not None
    metrics = Path(options.model) / "metrics.jsonl"
    page = write_report(options.output_dir, before, after, settings=settings, metrics_jsonl=metrics)
    print(format_table(before, after))
    print(f"\n{page}")
    return 0


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_place(flag: str, name: str) -> None:
    """Refuses what can only be a folder and isn't one that holds a model; a hub name shows when it is loaded."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{flag} {name}: the folder has no config.json: give one that holds a model")
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"{flag} {name}: there is no such folder")


def _recorded(path: Path) -> dict[str, Any]:
    """The settings that training left beside the model; empty if it left none."""
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: mend or remove it") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: mend or remove it")
    return settings


def _template(options: argparse.Namespace, recorded: dict[str, Any]) -> str:
    """The flag's, else the one that the model was trained with, else the default."""
    if options.prompt_template is not None:
        template = options.prompt_template.replace("\\n", "\n")
    else:
        template = str(recorded.get("prompt_template", DataConfig().prompt_template))
    if template.count("{prompt}") != 1:
        raise UserError(f"--prompt_template {template!r}: must have one {{prompt}} in it")
    return template


def _records(
    options: argparse.Namespace,
) -> tuple[dict[str, list[ForgetRecord]], list[RetainRecord], dict[str, list[str]]]:
    """(suites, retain records, the files that the user gave for each)."""
    files = {
        name: getattr(options, f"{name}_file")
        for name in ("train", "heldout", "attack", "retain")
        if getattr(options, f"{name}_file")
    }
    if not files:
        folder = resources.files("wpn_ds.demo") / "data"
        demo = {"train": "forget", "heldout": "heldout", "attack": "attack", "retain": "retain"}
        paths = {name: [str(folder / f"{file}.jsonl")] for name, file in demo.items()}
    else:
        paths = files
    retain = read_retain(paths["retain"])[: options.limit] if "retain" in paths else []
    suites = {name: read_forget(paths[name])[: options.limit] for name in paths if name != "retain"}
    if not suites:
        raise UserError(
            "--retain_file alone has no prompts to judge: give --train_file, --heldout_file or --attack_file"
        )
    return suites, retain, files


def _evaluate(
    flag: str,
    name: str | None,
    label: str,
    suites: dict[str, list[ForgetRecord]],
    retain: list[RetainRecord],
    template: str,
    options: argparse.Namespace,
) -> Evaluation | None:
    if name is None:
        return None
    model, tokenizer = load(flag, name, bf16=options.bf16)
    evaluation = evaluate_model(
        model,
        tokenizer,
        suites,
        retain,
        template=template,
        max_length=min(getattr(model.config, "max_position_embeddings", None) or MAX_LENGTH, MAX_LENGTH),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        label=label,
    )
    del model  # before the next one is loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return evaluation


def load(flag: str, name: str, *, bf16: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a folder or the hub, in fp32 or bf16, on the GPU if there is one.

    Raises:
        UserError: it can't be loaded, or its weights and its architecture disagree; names ``flag``.
    """
    source = Source(name, flag)
    tokenizer = load_tokenizer(name, source, flag)
    model = load_model(source, dtype=torch.bfloat16 if bf16 else torch.float32)
    return model.to(_device()).eval(), tokenizer
