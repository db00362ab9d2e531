"""``make house``: how large the house is, and how far a batch walks through it. A step of a tiny model is watched."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ("settings", "data", "models", "objectives", "losses", "engine", "jobs")
LAST_TEST = ROOT / ".venv" / ".test-seconds"


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def make_model(folder: Path) -> None:
    """A tiny OPT with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    text = "<pad> </s> <unk> question answer : the cat sat on a mat no yes Question Answer"
    words = {word: number for number, word in enumerate(text.split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, **special)
    OPTForCausalLM(config).save_pretrained(folder)


def while_importing(frame: Any) -> bool:
    """Whether a module or a class is being made above ``frame``, or is what it makes."""
    while frame is not None:
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED and frame.f_code.co_filename.startswith(f"{ROOT}/wpn_ds/"):
            return True
        frame = frame.f_back
    return False


def watch() -> None:
    """Train one step in this process; print the package's files that were run through before DeepSpeed's
    ``engine.step``, and those of them after the step began."""
    walked: dict[str, None] = {}
    loop: dict[str, None] = {}
    inside = done = False

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal inside, done
        if event != "call" or done:
            return
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("deepspeed/runtime/engine.py") and name == "step":
            done = True
        elif path.startswith(f"{ROOT}/wpn_ds/") or path.startswith(f"{ROOT}/launch/"):
            inside = inside or (path.endswith("engine/step.py") and name == "__call__")
            if path not in (loop if inside else walked) and not while_importing(frame):
                walked[path] = None
                if inside:
                    loop[path] = None

    from wpn_ds.cli import train

    leave = os._exit

    def report(code: int) -> None:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)
        Path(os.environ["HOUSE_OUT"]).write_text(json.dumps({"walked": list(walked), "loop": list(loop)}))
        leave(code)

    os._exit = report  # type: ignore[assignment]
    threading.setprofile(profile)
    sys.setprofile(profile)
    train(sys.argv[2:])


def walk() -> dict[str, list[Path]]:
    """The files that a step passes: from the command on (``walked``), and from its beginning on (``loop``)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        records = [{"prompt": "the cat", "chosen": "sat on a mat", "rejected": "no no"}]
        (folder / "forget.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 4))
        (folder / "retain.jsonl").write_text('{"prompt": "a mat", "response": "yes"}\n' * 4)
        flags = ["--deepspeed", "ds_configs/zero3.json", "--model_name_or_path", f"{folder}/model"]
        flags += ["--train_file", f"{folder}/forget.jsonl", "--retain_file", f"{folder}/retain.jsonl"]
        flags += ["--output_dir", f"{folder}/out", "--max_steps", "1", "--global_batch_size", "4", "--max_length", "32"]
        env = os.environ | {"HOUSE_OUT": f"{folder}/walk.json", "WPN_DS_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "tests.house", "watch", *flags]
        run = subprocess.run(
            command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
        )
        if run.returncode:
            sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
        found = json.loads((folder / "walk.json").read_text())
    return {name: [Path(path) for path in paths] for name, paths in found.items()}


def places(word: str) -> list[Path]:
    """Files of the project that name an objective."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    texts = [ROOT / name for name in tracked if name.endswith((".py", ".md", ".yaml", ".toml", ".sh"))]
    said = re.compile(rf"\b{word}\b", re.IGNORECASE)
    return [path for path in texts if path.is_file() and said.search(path.read_text(encoding="utf-8"))]


def main() -> None:
    walked = walk()
    product = [path for path in places("simnpo") if path.is_relative_to(ROOT / "wpn_ds")]
    seconds = LAST_TEST.read_text().strip() if LAST_TEST.exists() else "run make test first"
    page = ROOT / "wpn_ds" / "engine" / "run.py"
    rows = {
        "package, lines of .py": f"{lines(python_files('wpn_ds')):,}",
        "the trainer alone": f"{lines(python_files(*(f'wpn_ds/{part}' for part in TRAINER))):,}",
        "files from launch/train.py to engine.step()": len(walked["walked"]),
        "of them in the micro-batch loop": len(walked["loop"]),
        "lines of these": f"{lines(walked['loop']):,}",
        "files that name simnpo": f"{len(places('simnpo'))}, of the package {len(product)}",
        "lines of engine/run.py": lines([page]) if page.exists() else "none",
        "modules beside the folders": len(list((ROOT / "wpn_ds").glob("*.py"))) - 1,
        "lines of README.md": lines([ROOT / "README.md"]),
        "seconds of the last make test": seconds,
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print("\nthe micro-batch loop:")
    for path in sorted(walked["loop"]):
        print(f"  {lines([path]):>4}  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    watch() if sys.argv[1:2] == ["watch"] else main()
