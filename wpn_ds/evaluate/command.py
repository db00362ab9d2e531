"""``wpn-ds evaluate``: one model, or a model against its baseline, on as many ranks as a launcher starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import JUDGE_HELP
from wpn_ds.evaluate.suites import GROUPS, QUICK_LIMIT
from wpn_ds.evaluate.tofu.data import DEFAULT_SPLIT
from wpn_ds.settings.parse import Count, Flag, Positive, Share, Whole, option, parse
from wpn_ds.settings.style import StyleFlags

JUDGES = ("reference", "phrases", "resemblance")
"""Without ``--judge``."""
_SUITES = (
    f"quick (every suite, at most {QUICK_LIMIT} prompts each), full (all of them), or names, with commas: "
    f"{', '.join(GROUPS)}, or a suite in these."
)
_CLASSIFIERS = "hf:NAME[,clean=LABEL] (default label: clean), local:DIR (what it was trained to call harmful: garbled)."


def _data_dir() -> Path | None:
    folder = os.environ.get("WPN_DS_DATA")
    return Path(folder).expanduser() if folder else None


@dataclass(frozen=True)
class FileFlags:
    """Files: data files, folders or patterns, as for training; without any, the data that the model was trained on, if
    training left its run.yaml beside it, or else the embedded demo set."""

    train_file: list[str] = option([])
    """Prompts that were unlearned: prompt, chosen, rejected."""
    heldout_file: list[str] = option([])
    """Prompts that training never saw: prompt, chosen, rejected."""
    attack_file: list[str] = option([])
    """Attacks of your own: prompt, chosen, rejected."""
    retain_file: list[str] = option([])
    """What to keep: prompt, response; or text."""
    columns: str | None = None
    """Columns of these files that are called otherwise, ours=theirs: prompt=question,chosen=good,rejected=bad."""
    retain_columns: str | None = None
    """The same of --retain_file."""
    benign_file: list[str] = option([])
    """Prompts that look harmful and aren't, for over-refusal: prompt."""
    open_file: list[str] = option([])
    """Beginnings of texts, for toxicity: prompt."""
    data_dir: Path | None = field(default_factory=_data_dir)
    """Folder with published prompt sets and benchmarks, found by their file names (default: $WPN_DS_DATA)."""


@dataclass(frozen=True)
class AskingFlags:
    """Asking: how answers are drawn, and how many."""

    max_new_tokens: Count | None = None
    """Tokens of an answer at most (default: 48, and 200 in the suite tofu)."""
    batch_size: Count = 32
    """Prompts that are answered at a time."""
    bf16: bool | None = None
    """Load the models in bfloat16 instead of fp32 (default: as it was trained)."""
    share_weights: Flag = False
    """Share a model's weights out over the ranks (ZeRO-3): for one that no device holds; slower where one does."""
    limit: Count | None = option(None, metavar="N")
    """At most N prompts of every suite, and N items of every benchmark."""
    samples: Count = 4
    """Sampled answers a prompt in the suite diversity."""
    temperature: Positive = 1.0
    """Of the sampled answers."""
    top_p: Share = 1.0
    """Of the sampled answers."""
    seed: int = 0
    """Of what is drawn: prompts, templates, samples, lessons."""


@dataclass(frozen=True, kw_only=True)
class AskedFlags(FileFlags, StyleFlags, AskingFlags):
    """What prompts are asked of a model takes: their files, how they are written, and how they are answered."""


@dataclass(frozen=True)
class UtilityFlags:
    """Utility and relearning: what the model still can do, and how soon it says the unwanted again."""

    utility: str | None = None
    """Benchmarks, dialogue, all (these two), extended (MMLU, GSM8K, IFEval), wmdp, or names, those of
    lm-evaluation-harness too (default: all)."""
    relearn_steps: list[Count] = option([2, 5, 10, 20], metavar="N")
    """After how many fine-tuning steps on unwanted answers to ask again."""
    relearn_learning_rate: Positive = 1e-4
    """Of these steps."""
    relearn_lora_r: Whole = 0
    """Rank of adapters that learn in place of the weights, which takes less memory; 0: the weights learn, in fp32."""


@dataclass(frozen=True)
class TofuFlags:
    """TOFU: what was unlearned of made-up authors, and what else was lost."""

    tofu_dir: Path | None = None
    """Folder with TOFU's published files (forget10_perturbed.json, ...); asks its suite."""
    tofu_split: str = option(DEFAULT_SPLIT, metavar="NAME")
    """What was to be forgotten."""
    tofu_retain_log: Path | None = option(None, metavar="FILE")
    """tofu.json of this command on a model that never saw the forget set, for forget quality and CI."""
    fluency: str | None = option(None, metavar="CLASSIFIER", more=_CLASSIFIERS)
    """Of fluent text, for FU and CI:"""

    def __post_init__(self) -> None:
        for flag in ("tofu_retain_log", "fluency"):
            if self.tofu_dir is None and getattr(self, flag) is not None:
                raise UserError(f"--{flag} {getattr(self, flag)}: is for the suite tofu: give --tofu_dir")


@dataclass(frozen=True)
class RecallFlags:
    """MUSE and RWKU: what a model says of texts that it was to forget, and of others."""

    muse_dir: Path | None = None
    """Folder of one corpus of MUSE (News or Books), with verbmem, knowmem and privleak; asks its suite."""
    muse_retain_log: Path | None = option(None, metavar="FILE")
    """muse.json of this command on a model that never saw the forget set, for PrivLeak."""
    rwku_dir: Path | None = None
    """Folder with RWKU's forget_level1.json, ..., neighbor_level2.json; asks its suite."""

    def __post_init__(self) -> None:
        if self.muse_dir is None and self.muse_retain_log is not None:
            raise UserError(f"--muse_retain_log {self.muse_retain_log}: is for the suite muse: give --muse_dir")


@dataclass(frozen=True, kw_only=True)
class Options(AskedFlags, UtilityFlags, TofuFlags, RecallFlags):
    """Asks the prompts of every suite, judges the answers, measures what the model still can do, and writes report.json
    and report.html. A call that was stopped goes on where it was; other judges cost no new answers. On several GPUs:
    deepspeed launch/evaluate.py, with the same flags."""

    model: str = option()
    """Model to evaluate: a folder in Hugging Face format, or a hub name."""
    baseline: str | None = None
    """Model to compare with, usually the one that training started from; auto: that one, as the run.yaml that training
    left beside --model names it."""
    output_dir: Path = option()
    """Folder for report.json, report.html and the answers."""
    suite: str = option("quick", more=_SUITES)
    """What is asked:"""
    judge: list[str] = option([], metavar="JUDGE", more=f"{JUDGE_HELP} (default: {', '.join(JUDGES)}).")

    def __post_init__(self) -> None:
        StyleFlags.__post_init__(self)
        TofuFlags.__post_init__(self)
        RecallFlags.__post_init__(self)


def run(argv: Sequence[str] | None = None) -> int:
    """Evaluates, prints the before/after table and names the report."""
    options = parse(Options, argv, "wpn-ds evaluate")
    from wpn_ds.evaluate.evaluation import evaluate

    return evaluate(options)
