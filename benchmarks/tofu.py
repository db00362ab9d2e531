"""``python -m benchmarks.tofu --tofu_dir DIR --alternates FILE``: objectives on TOFU's facts, at a size for a CPU.

Plants a small OPT with the facts of TOFU (``full.json``) and, as what unlearning aims at, one with those that are to be
kept alone (``retain90.json``), unlearns ``forget10`` by each objective in as many steps of as many questions (AltPO and
WPN read the five alternates of each), evaluates all, and prints one table. A stopped call goes on where it was.
The figures say how the objectives compare on a model of a few million parameters that knows little else; they are not
those of the papers, whose models are a thousand times larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from wpn_ds.errors import UserError
from wpn_ds.evaluate.command import run as evaluate
from wpn_ds.jobs.local import command_line, launch, say
from wpn_ds.settings.run import DONE
from wpn_ds.system.tables import markdown
from wpn_ds.tools.ablate.grid import flags
from wpn_ds.tools.plant import run as run_plant

#: In the table's order. All have the retain term but GA.
OBJECTIVES = ("ga", "graddiff", "npo", "simnpo", "idkdpo", "altpo", "wpn")
BUDGET = {
    "max_length": 256,
    "tokens_per_micro_batch": 2048,
    "global_batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "save_steps": 0,
    "probe_prompts": 0,
}
WITH_ALTERNATES = ("altpo", "wpn")
ZERO = Path("ds_configs/zero0.json")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.tofu", description=__doc__.partition("\n\n")[2])
    add = made.add_argument
    add("--tofu_dir", type=Path, required=True, help="folder with TOFU's published files")
    add("--alternates", required=True, metavar="FILE", help="alternates for forget10: question, answer, sub_answer")
    add("--fluency", required=True, metavar="CLASSIFIER", help="of fluent text, as wpn-ds evaluate takes it")
    add("--output_dir", type=Path, default=Path("runs/tofu"))
    add("--plant_epochs", type=int, default=20, help="passes over the facts (default 20)")
    add("--steps", type=int, default=125, help="optimizer steps of every objective (default 125: ten passes)")
    add("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME", help="only these objectives")
    add("--limit", type=int, help="questions of each set at most (default: all)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    out, facts = options.output_dir, options.tofu_dir
    full, kept = out / "full", out / "retain90"
    epochs = ["--epochs", str(options.plant_epochs)]
    run_plant(["--output_dir", str(full), "--train_file", str(facts / "full.json"), *epochs])
    same = ["--tokenizer_name", str(full)]
    run_plant(["--output_dir", str(kept), "--train_file", str(facts / "retain90.json"), *same, *epochs])
    figures = {"(retain90 alone)": measured(kept, options, None)}
    log = kept / "tofu" / "tofu.json"
    figures["(before)"] = measured(full, options, log)
    for name in options.only:
        run = out / name
        if not (run / DONE).exists():
            say(f"unlearn: {name}")
            code = launch(command_line(settings(name, full, run, options), 1))
            if code:
                raise UserError(f"{name} ended with exit code {code}")
        figures[name] = measured(run, options, log) | {"tokens_per_second": tokens_per_second(run)}
        (out / "table.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


def settings(name: str, model: Path, run: Path, options: argparse.Namespace) -> list[str]:
    """Training's flags."""
    forget = options.alternates if name in WITH_ALTERNATES else str(options.tofu_dir / "forget10.json")
    given = BUDGET | {
        "deepspeed": str(ZERO),
        "model_name_or_path": str(model),
        "train_file": forget,
        "retain_file": str(options.tofu_dir / "retain90.json"),
        "output_dir": str(run),
        "resume_from_checkpoint": "auto",
        "objective": name,
        "max_steps": options.steps,
    }
    return flags(given)


def measured(model: Path, options: argparse.Namespace, log: Path | None) -> dict[str, Any]:
    """The figures of ``wpn-ds evaluate``'s suite ``tofu``."""
    folder = model / "tofu"
    if not (folder / "report.json").exists():
        say(f"evaluate: {model}")
        asked = ["--model", str(model), "--suite", "tofu", "--tofu_dir", str(options.tofu_dir), "--fluency"]
        asked += [options.fluency, "--output_dir", str(folder), "--max_new_tokens", "64"]
        asked += ["--tofu_retain_log", str(log)] if log else []
        evaluate(asked + (["--limit", str(options.limit)] if options.limit else []))
    return json.loads((folder / "report.json").read_text())["tofu"]


def tokens_per_second(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return fmean(line["speed/tokens_per_second"] for line in lines if "speed/tokens_per_second" in line)


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a model, in Markdown."""
    head = ["model", "FQ (p)", "MU", "FU", "CI (p)", "forget: probability", "ROUGE-L", "n", "tokens/s"]
    rows = [head]
    for name, of in figures.items():
        forget = of["sets"]["forget"]
        cells = [name, _p(of["forget_quality"]), f"{of['model_utility']:.3f}", _number(of["forget_utility"])]
        cells += [_p(of["cleanness_indistinguishability"]), f"{forget['probability']:.3f}"]
        cells += [f"{forget['rouge_l_recall']:.3f}", str(forget["n"])]
        cells += [f"{of['tokens_per_second']:,.0f}" if "tokens_per_second" in of else ""]
        rows.append(cells)
    return markdown(rows)


def _p(test: Mapping[str, float] | None) -> str:
    return "" if test is None else f"{test['p']:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
