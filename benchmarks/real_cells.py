"""The cells of ``python -m benchmarks.real``: data, training, and what is measured, all by the product's own commands.

A result holds figures alone. Of every suite it has the verdicts as a string, one character a prompt in an order that
all models share, and of every benchmark the items: so models are compared pair by pair, long after the answers are
gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import AutoTokenizer

from benchmarks.real_plan import (
    ALPHA,
    DAMAGE,
    ORIGINAL,
    START,
    Cell,
    Sizes,
    chosen_rate,
    equal_damage,
    family,
    settings_of,
)
from benchmarks.setting import FORGET
from wpn_ds.cli import main as wpn_ds
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.examples import build_examples
from wpn_ds.data.layout import ORDER_FORMAT, retain_seed, step_indices
from wpn_ds.data.records import ForgetRecord, merged_by_prompt, prompt_text, read_forget, read_retain
from wpn_ds.errors import UserError
from wpn_ds.evaluate.command import run as evaluate
from wpn_ds.evaluate.judges.command import run as run_judge
from wpn_ds.evaluate.judges.labelled import read_labelled
from wpn_ds.evaluate.report.files import REPORT_JSON
from wpn_ds.evaluate.results import Evaluation, Suite
from wpn_ds.evaluate.suites import ATTACK_PREFIX, GROUPS, PREFILLED
from wpn_ds.jobs.local import TRAIN, command_line, launch, say
from wpn_ds.judging.base import Verdict
from wpn_ds.judging.statistics import Rate
from wpn_ds.settings.run import DONE
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import sha256, write_atomically
from wpn_ds.tools.ablate.grid import flags
from wpn_ds.tools.ablate.runs import STOPPED

ZERO = {1: Path("ds_configs/zero0.json"), 2: Path("ds_configs/zero3.json")}
"""By ranks; more are as two."""
HELD_OUT = FORGET["pku"].replace("train", "dev")
LABELLED = "jailbreakeval/Safe-RLHFmini.csv"
INSTRUCTIONS = "llama_factory_demo/data/alpaca_en_demo.json"
LONGEST = 60
"""Words of an instruction's answer; longer ones would be cut in training."""

UNSEEN = {
    "pku": ("heldout", "advbench", "harmbench", "malicious_instruct", "forbidden_questions", "aart"),
    "rude": ("heldout", "attack"),
}
"""Suites of prompts of which nothing was trained on, by twin."""

ATTACKED = tuple(name for name in GROUPS["attacks"] if name not in PREFILLED)

_MARKS = {Verdict.HARMLESS: "1", Verdict.HARMFUL: "0", Verdict.UNUSABLE: "?"}
"""A verdict's character; "-" is a degenerate answer."""

T = TypeVar("T")
Results = Mapping[str, Mapping[str, Any]]
"""Of the cells that are done, by name."""


@dataclass(frozen=True)
class Bench:
    """Where and how cells are run.

    Attributes:
        model: the pretrained model's folder. data: the published files. work: weights, answers, logs.
        batch_size, ranks, tokens: prompts at a time; processes of a training, and tokens of their micro-batches.
        bf16: the number format.
    """

    model: Path
    data: Path
    work: Path
    sizes: Sizes
    batch_size: int = 32
    ranks: int = 1
    tokens: int = 4096
    bf16: bool = False

    def file(self, twin: str, name: str) -> str:
        return str(self.work / "data" / twin / f"{name}.jsonl")


def run_cell(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    """The cell's figures.

    Raises:
        UserError: what it needs isn't there, or a command failed.
    """
    kinds: dict[str, Callable[[Cell, Bench, Results], dict[str, Any]]] = {
        "judge": _judge,
        "start": _start,
        "choose": _choose,
        "search": _choose,
        "unlearn": _unlearn,
        "ask": _ask,
        "know": _know,
        "relearn": _relearn,
        "mix": _mix,
    }
    return kinds[cell.kind](cell, bench, results)


# ---- data ----


def require_data(data: Path) -> None:
    """
    Raises:
        UserError: a file isn't below the folder; names it.
    """
    for name in (FORGET["pku"], HELD_OUT, LABELLED, INSTRUCTIONS):
        if not (data / name).is_file():
            raise UserError(f"{name} isn't below {data}: name the folder that has it with --data")


def write_data(bench: Bench) -> None:
    """The files of every twin, into the work folder. Validation and held-out prompts are in nothing that is trained,
    the judges included; the rude twin is made of the very prompts that are unlearned, PKU's of others."""
    sizes = bench.sizes
    known, heldout = _both(bench.data / FORGET["pku"]), _both(bench.data / HELD_OUT)
    start, forget, validation, spare = _parts(known, sizes.start, sizes.forget, sizes.validation)
    unseen = {_words(record) for record in (*validation, *spare, *heldout)}
    judged = _answers((*start, *forget))[: sizes.judged]
    judged += _labelled(bench.data / LABELLED, unseen)[: sizes.judged]
    _write_twin(bench, "pku", start, forget, validation, heldout, judged)
    if "rude" in sizes.twins:
        manners, asked, attacks = map(_embedded, ("forget", "heldout", "attack"))
        chooses, others = _parts(asked, sizes.validation)
        _write_twin(bench, "rude", manners, manners, chooses, others, [*_answers(manners), *_facts()])
        _write(bench.file("rude", "attack"), map(_row, attacks))
    rows = json.loads((bench.data / INSTRUCTIONS).read_text(encoding="utf-8"))
    texts = [
        {"prompt": f"{row['instruction']}\n{row['input']}".strip(), "response": row["output"]}
        for row in rows
        if 2 < len(row["output"].split()) <= LONGEST
    ]
    once = {_words(text["prompt"]): text for text in texts}
    retain, kept, _ = _parts(_shuffled(once.values()), sizes.retain, sizes.kept)
    for twin in sizes.twins:
        _write(bench.file(twin, "retain"), retain)
        _write(bench.file(twin, "kept"), kept)


def _write_twin(
    bench: Bench,
    twin: str,
    start: Sequence[ForgetRecord],
    forget: Sequence[ForgetRecord],
    validation: Sequence[ForgetRecord],
    heldout: Sequence[ForgetRecord],
    judged: Sequence[Mapping[str, Any]],
) -> None:
    swapped = [dataclasses.replace(record, chosen=record.rejected, rejected=record.chosen) for record in start]
    files = {"start": swapped, "forget": forget, "validation": validation, "heldout": heldout}
    for name, records in files.items():
        _write(bench.file(twin, name), map(_row, records))
    _write(bench.file(twin, "judged"), judged)


def _row(record: ForgetRecord) -> dict[str, Any]:
    """With one answer of each kind, so that prompts, pairs and examples are the same number."""
    return {"prompt": record.prompt, "chosen": record.chosen[0], "rejected": record.rejected[0]}


def _answers(records: Iterable[ForgetRecord]) -> list[dict[str, Any]]:
    """Each record's first wanted and unwanted answer, labelled."""
    return [
        {"prompt": record.prompt, "response": answer, "harmful": harmful}
        for record in records
        for answer, harmful in ((record.chosen[0], False), (record.rejected[0], True))
    ]


def _facts() -> list[dict[str, Any]]:
    """The embedded retain answers, labelled: without plain ones a judge takes whatever isn't polite for harmful."""
    facts = read_retain([embedded_file(name) for name in ("retain", "more/retain")])
    return [{"prompt": fact.prompt, "response": fact.response, "harmful": False} for fact in facts]


def _labelled(path: Path, left_out: set[str]) -> list[dict[str, Any]]:
    """The first labelled answer to each question that isn't left out."""
    first = {_words(one.prompt): one for one in reversed(read_labelled([path]))}
    return [
        {"prompt": one.prompt, "response": one.answer, "harmful": one.harmful}
        for question, one in _shuffled(first.items())
        if question not in left_out
    ]


def _both(*paths: Path) -> list[ForgetRecord]:
    """The records by prompt, in a random order, but those of which every answer is labelled both ways."""
    return [record for record in _shuffled(merged_by_prompt(read_forget(paths))) if record.chosen and record.rejected]


def _embedded(name: str) -> list[ForgetRecord]:
    return _both(embedded_file(name), embedded_file(f"more/{name}"))


def _words(prompt: Any) -> str:
    """What makes two questions the same: their words."""
    text = prompt_text(prompt.prompt) if isinstance(prompt, ForgetRecord) else str(prompt)
    return " ".join(re.findall(r"\w+", text.casefold()))


def _shuffled(items: Iterable[T]) -> list[T]:
    found = list(items)
    return random.Random(0).sample(found, len(found))


def _parts(items: Sequence[T], *sizes: int) -> list[Sequence[T]]:
    """So many each, and the rest."""
    ends = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    return [items[low:high] for low, high in zip(ends, [*ends[1:], None], strict=True)]


def _write(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- weights ----


def _budget(bench: Bench, twin: str) -> dict[str, Any]:
    """Training's settings that all methods share."""
    sizes = bench.sizes
    return {
        "deepspeed": str(ZERO[min(bench.ranks, 2)]),
        "retain_file": bench.file(twin, "retain"),
        "max_length": sizes.max_length,
        "global_batch_size": sizes.global_batch_size,
        "retain_batch_size": sizes.retain_batch_size,
        "tokens_per_micro_batch": bench.tokens,
        "warmup_steps": 2,
        "save_steps": 0,
        "probe_prompts": 0,
        "bf16": bench.bf16,
    }


def _start_weights(bench: Bench, twin: str, results: Results) -> tuple[Path, dict[str, Any]]:
    """(folder of the harmful twin, what its training recorded): the likelihood of the unwanted answers."""
    folder = bench.work / "weights" / twin / START
    own = {
        "model_name_or_path": str(bench.model),
        "train_file": bench.file(twin, "start"),
        "num_train_epochs": bench.sizes.start_epochs,
        "wpn_weight": 0.0,
        "retain_loss": "nll",
        "retain_weight": 0.3,
        "learning_rate": 2e-4,
        "seed": 0,
    }
    return folder, _trained(folder, _budget(bench, twin) | own, results.get(f"start/{twin}"), bench)


def _weights(
    bench: Bench, twin: str, method: str, rate: float, seed: int, results: Results
) -> tuple[Path, dict[str, Any]]:
    """(folder of the unlearned twin, what its training recorded)."""
    folder = bench.work / "weights" / twin / method / f"{rate:g}-{seed}"
    made_by = f"choose/{twin}/{method}/{rate:g}" if seed == 0 else f"unlearn/{twin}/{method}/{seed}"
    own = {
        "train_file": bench.file(twin, "forget"),
        "max_steps": bench.sizes.updates[twin],
        "retain_loss": "kl",
        "reference": "states",
        "learning_rate": rate,
        "seed": seed,
    }
    if not (folder / _RECORD).exists():
        own["model_name_or_path"] = str(_start_weights(bench, twin, results)[0])
    return folder, _trained(folder, _budget(bench, twin) | own | settings_of(method), results.get(made_by), bench)


def _trained(
    folder: Path, settings: Mapping[str, Any], known: Mapping[str, Any] | None, bench: Bench
) -> dict[str, Any]:
    """What the training of ``folder`` recorded; trains if its weights aren't there, and says so if ``known``, the
    cell's result, had others.

    Raises:
        UserError: the run failed.
    """
    record = folder / _RECORD
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"train: {folder.relative_to(bench.work)}")
        given = flags({**settings, "output_dir": str(folder)})
        alone = ["python", TRAIN, *given]
        log = folder.with_name(f"{folder.name}.log")
        log.unlink(missing_ok=True)
        code = launch(alone if bench.ranks == 1 else command_line(given, bench.ranks), log)
        if code not in (0, STOPPED) or (code == 0 and not (folder / DONE).exists()):
            raise UserError(f"training ended with exit code {code}: {log} has its words")
        folder.mkdir(exist_ok=True)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        found = {"stopped": "gradient not finite"} if code else _record(folder)
        write_atomically(record, json.dumps(found))
        if known and known["training"].get("weights") != found.get("weights"):
            say(f"{folder.relative_to(bench.work)} was trained again, and its weights are not those that were measured")
    return json.loads(record.read_text())  # type: ignore[no-any-return]


_RECORD = "record.json"


def _record(folder: Path) -> dict[str, Any]:
    """Of a training that ended: updates, tokens read and given, seconds, last losses, a checksum of the weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "speed/step_seconds" in line]
    return {
        "updates": len(steps),
        "tokens_given": tokens_given(folder, len(steps)),
        "tokens_read": round(sum(s["speed/step_seconds"] * s["speed/tokens_per_second"] for s in steps)),
        "seconds": round(sum(s["speed/step_seconds"] for s in steps), 1),
        "losses": {name.removeprefix("loss/"): value for name, value in steps[-1].items() if name.startswith("loss/")},
        "weights": _checksum(folder),
    }


def tokens_given(folder: Path, updates: int) -> int:
    """Tokens of all texts of the run's updates, by its own settings: every prompt with each of its answers, whether
    the objective reads that one or not, and the retain examples. Equal budgets give equal counts."""
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    made = build_examples(
        read_forget(run["train_file"]),
        read_retain(run["retain_file"]),
        AutoTokenizer.from_pretrained(folder),
        PromptStyle.of(run),
        run["max_length"],
    )
    pairs = [sum(len(a.segment.ids) for a in (*example.wanted, *example.unwanted)) for example in made.forget]
    kept, seed, total = [len(segment.ids) for segment in made.retain], run["seed"], 0
    for step in range(updates):
        total += sum(pairs[at] for at in step_indices(step, run["global_batch_size"], len(pairs), seed))
        order = retain_seed(seed, ORDER_FORMAT)
        total += sum(kept[at] for at in step_indices(step, run["retain_batch_size"], len(kept), order))
    return total


def _checksum(folder: Path) -> str:
    """Of the weights, in one or several files."""
    digests = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


# ---- what is measured ----


def _judge_folder(bench: Bench, twin: str) -> Path:
    """Of the twin's judge, which is trained if it isn't there; the same data give the same judge."""
    folder = bench.work / "judges" / twin
    if not folder.exists():
        say(f"train the judge: {folder.relative_to(bench.work)}")
        with _into(folder.with_suffix(".log")):
            asked = {"base": str(bench.model), "input": "pair", "train_file": bench.file(twin, "judged")}
            run_judge(["train", *flags(asked | {"output_dir": str(folder)})])
    return folder


def _evaluated(cell: Cell, bench: Bench, model: Path, part: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """``report.json`` of ``wpn-ds evaluate`` with these flags; one that is there stands for the same model alone."""
    place = model if model.is_relative_to(bench.work) else Path(ORIGINAL)
    folder = bench.work / "evaluations" / cell.name / f"{part}-{_checksum(model)}"
    if not (folder / REPORT_JSON).exists():
        say(f"{cell.name}: evaluate {part} of {place.name}")
        given = {"model": str(model), "output_dir": str(folder), "batch_size": bench.batch_size, **asked}
        with _into(folder.with_suffix(".log")):
            evaluate(flags(given | {"bf16": bench.bf16}))
    return json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _answered(cell: Cell, twin: str, bench: Bench, model: Path, part: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of suites whose answers the twin's judge reads."""
    files: dict[str, Any] = {
        "heldout_file": bench.file(twin, "heldout"),
        "train_file": bench.file(twin, "forget"),
        "retain_file": bench.file(twin, "kept"),
        "benign_file": [str(embedded_file("benign")), str(embedded_file("more/benign"))],
        "data_dir": str(bench.data),
        "max_new_tokens": bench.sizes.max_new_tokens,
        "judge": [f"local:{_judge_folder(bench, twin)}", "phrases"],
    }
    if "attack" in UNSEEN[twin]:
        files["attack_file"] = bench.file(twin, "attack")
    return figures(_evaluated(cell, bench, model, part, {**files, **asked}))


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """What a command prints goes to the log; what it says on the way stays."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def _judge(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    about = json.loads((_judge_folder(bench, cell.twin) / "judge.json").read_text(encoding="utf-8"))
    names = ("auc", "accuracy", "sensitivity", "specificity", "brier", "threshold")
    counts = {name: about[name]["n"] for name in ("train", "chose_threshold", "test")}
    return {name: about[name] for name in names} | {"answers": counts}


def _validated(cell: Cell, twin: str, bench: Bench, model: Path) -> dict[str, Any]:
    """On the validation prompts: "harmless", "degenerate", and the retain "perplexity"."""
    asked = {"suite": "heldout,retain", "heldout_file": bench.file(twin, "validation")}
    found = _answered(cell, twin, bench, model, "validation", asked)
    suite = found["suites"]["heldout"]
    return {name: suite[name] for name in ("harmless", "degenerate", "verdicts")} | {
        "perplexity": found["retain"]["perplexity"]
    }


def _start(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    if cell.twin == ORIGINAL:
        return _validated(cell, bench.sizes.twins[0], bench, bench.model)
    folder, training = _start_weights(bench, cell.twin, results)
    return {"training": training} | _validated(cell, cell.twin, bench, folder)


def _choose(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    """A learning rate, or a form of the search at its family's rate. Those weights aren't needed again."""
    rate = cell.which if cell.kind == "choose" else _chosen(cell.twin, family(cell.method), results)
    assert rate is not None
    folder, training = _weights(bench, cell.twin, cell.method, rate, 0, results)
    found: dict[str, Any] = {"learning_rate": rate, "training": training}
    if "stopped" in training:
        return found | training
    found |= _validated(cell, cell.twin, bench, folder)
    if cell.kind == "search":
        shutil.rmtree(folder)
    return found


def rate_of(twin: str, method: str, results: Results) -> float | None:
    """The learning rate that the method's ``choose`` cells choose; None: no run of them ended."""
    tried = {
        result["learning_rate"]: result
        for name, result in results.items()
        if name.startswith(f"choose/{twin}/{method}/")
    }
    return chosen_rate(tried, results[f"start/{twin}"]["perplexity"])


def _chosen(twin: str, method: str, results: Results) -> float:
    """
    Raises:
        UserError: there is none.
    """
    rate = rate_of(twin, method, results)
    if rate is None:
        raise UserError(f"{method} has no model of {twin}: at no learning rate did its gradient stay finite")
    return rate


def _unlearned(cell: Cell, bench: Bench, results: Results) -> tuple[Path, dict[str, Any]]:
    """(folder, what its training recorded) of the model that the cell speaks of.

    Raises:
        UserError: there is none, since its gradient was not finite.
    """
    if cell.method == ORIGINAL:
        return bench.model, {}
    if cell.method == START:
        return _start_weights(bench, cell.twin, results)
    rate = _chosen(cell.twin, cell.method, results)
    folder, training = _weights(bench, cell.twin, cell.method, rate, cell.seed, results)
    if "stopped" in training:
        raise UserError(f"{cell.method} has no model of {cell.twin} with seed {cell.seed}: {training['stopped']}")
    return folder, training


def _unlearn(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    """The training; the weights at other learning rates go."""
    folder, training = _unlearned(cell, bench, results)
    for path in folder.parent.glob("*-0"):
        if path.is_dir() and path.name.rpartition("-")[0] != folder.name.rpartition("-")[0]:
            shutil.rmtree(path)
    return {"learning_rate": _chosen(cell.twin, cell.method, results), "training": training}


def _ask(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    model, sizes = _unlearned(cell, bench, results)[0], bench.sizes
    names = [*UNSEEN[cell.twin], *PREFILLED, "over_refusal", "retain", "depth"]
    asked = {"suite": ",".join(names), "limit": sizes.ask}
    found = _answered(cell, cell.twin, bench, model, "prompts", asked)
    names = [name for name in ATTACKED if cell.twin == "pku" or name.startswith(ATTACK_PREFIX)]
    attacks = {"suite": ",".join(names), "limit": sizes.attacks}
    attacked = _answered(cell, cell.twin, bench, model, "attacks", attacks)
    return found | {"suites": found["suites"] | attacked["suites"]}


def _know(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    return _benchmarks(cell, bench, _unlearned(cell, bench, results)[0], "benchmarks", bench.sizes.items)


def _benchmarks(cell: Cell, bench: Bench, model: Path, part: str, items: int) -> dict[str, Any]:
    """Of each benchmark "n", "value" and the items' scores, and the mean of the values."""
    asked = {"suite": "utility", "utility": "benchmarks", "limit": items, "data_dir": str(bench.data)}
    tasks = Evaluation.from_json(_evaluated(cell, bench, model, part, asked)).utility
    scores = {name: [round(score) for score in task.scores] for name, task in tasks.items()}
    values = {name: sum(of) / len(of) for name, of in scores.items()}
    found = {name: {"n": len(of), "value": values[name], "items": "".join(map(str, of))} for name, of in scores.items()}
    return {"benchmarks": found, "mean": sum(values.values()) / len(values)}


def _relearn(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    sizes, model = bench.sizes, _unlearned(cell, bench, results)[0]
    asked = {"suite": "relearning", "limit": sizes.relearn, "relearn_steps": list(sizes.relearn_steps)}
    return _answered(cell, cell.twin, bench, model, "relearning", asked)


def _mix(cell: Cell, bench: Bench, results: Results) -> dict[str, Any]:
    """The benchmarks' means of the start, the unlearned model and a mixture, and harmless answers at equal damage:
    those of the model itself where it loses no more than that."""
    start, _ = _start_weights(bench, cell.twin, results)
    model, sizes = _unlearned(cell, bench, results)[0], bench.sizes
    before = results[f"know/{cell.twin}/{START}"]["mean"]
    means = {1.0: results[f"know/{cell.twin}/{cell.method}/{cell.which}"]["mean"]}
    names = [*UNSEEN[cell.twin], *PREFILLED]
    if not before or 1 - means[1.0] / before <= DAMAGE:
        asked = results[f"ask/{cell.twin}/{cell.method}/{cell.which}"]["suites"]
        return {"alpha": 1.0, "means": {"1": means[1.0]}, "suites": {name: asked[name] for name in names}}
    with _mixed(start, model, ALPHA, cell, bench) as folder:
        means[ALPHA] = _benchmarks(cell, bench, folder, f"alpha-{ALPHA:g}", sizes.items)["mean"]
    alpha = round(equal_damage({at: 1 - mean / before for at, mean in means.items()}, DAMAGE), 4)
    with _mixed(start, model, alpha, cell, bench) as folder:
        found = _answered(
            cell, cell.twin, bench, folder, "equal-damage", {"suite": ",".join(names), "limit": sizes.ask}
        )
    return {"alpha": alpha, "means": {f"{at:g}": mean for at, mean in sorted(means.items())}} | found


@contextlib.contextmanager
def _mixed(start: Path, unlearned: Path, alpha: float, cell: Cell, bench: Bench) -> Iterator[Path]:
    """A folder with ``start + alpha (unlearned - start)``, as long as it is needed (arXiv 2406.09179).

    Raises:
        UserError: they could not be mixed; the command has said why.
    """
    folder = bench.work / "weights" / f"mixed-{cell.twin}-{cell.method}-{cell.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    given = {"start": str(start), "unlearned": str(unlearned), "alpha": alpha, "output_dir": str(folder)}
    with _into(folder.with_suffix(".log")):
        code = wpn_ds(["mix", *flags(given)])
    if code:
        raise UserError(f"wpn-ds mix ended with exit code {code}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- figures of a report ----


def figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``report.json``: "suites", and "retain" and "depth" where they were measured; no text of it."""
    found = Evaluation.from_json(report)
    made: dict[str, Any] = {"suites": {name: _suite_figures(suite) for name, suite in found.suites.items()}}
    if found.retain:
        made["retain"] = report["retain"]
    if report.get("depth"):
        made["depth"] = report["depth"]
    return made


def _suite_figures(suite: Suite) -> dict[str, Any]:
    """Rates with n and interval; "verdicts", a character a prompt; "prompts", which tells other prompts apart."""
    asked = json.dumps([answer.asked for answer in suite.answers])
    return {
        "harmless": rate_json(suite.harmless),
        "degenerate": rate_json(suite.degenerate),
        "refusal": rate_json(suite.refusals),
        "verdicts": "".join(_MARKS.get(verdict, "-") for verdict in suite.verdicts()),
        "prompts": hashlib.sha256(asked.encode()).hexdigest()[:8],
    }


def rate_json(rate: Rate) -> dict[str, Any]:
    return {"rate": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}
