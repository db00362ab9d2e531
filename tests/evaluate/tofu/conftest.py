from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from wpn_ds.evaluate.tofu.data import SETS, ItemScores, TofuLog, read_tofu


def row(name: str, at: int) -> dict[str, Any]:
    """An item as the published files have it, short enough for a model of 96 positions."""
    texts = {"question": f"Who {name[:4]} {at}?", "answer": f"with water {at}", "paraphrased_answer": f"a cloth {at}"}
    if name in ("real_authors", "world_facts"):
        del texts["paraphrased_answer"]
    return texts | {"perturbed_answer": [f"the {word} {at}" for word in ("sun", "car", "wash and a sun")]}


def write_tofu(folder: Path, n: int = 5, split: str = "forget10") -> Path:
    """The four files, with n items each and one less in every other one."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, name in enumerate(SETS):
        file = folder / f"{split if name == 'forget' else name}_perturbed.json"
        file.write_text("".join(json.dumps(row(name, k)) + "\n" for k in range(n - at % 2)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tofu_dir(tmp_path_factory) -> Path:
    return write_tofu(tmp_path_factory.mktemp("tofu"))


def made_up(tofu_dir: Path, seed: int, shift: float = 0.0) -> TofuLog:
    """A model's log of the questions in the folder; what is perturbed costs ``shift`` more."""
    rng = random.Random(seed)
    sets = {}
    for name, items in read_tofu(tofu_dir).items.items():
        sets[name] = tuple(
            ItemScores(
                question=item.question,
                answer=item.answer,
                generated=f"answer {rng.random()}",
                rouge_l_recall=rng.random(),
                loss=rng.uniform(0, 5),
                paraphrased_loss=rng.uniform(0, 5),
                perturbed_losses=tuple(rng.uniform(0, 5) + shift for _ in item.perturbed),
                extraction_strength=rng.random(),
                exact_memorization=rng.random(),
            )
            for item in items
        )
    return TofuLog("model", "forget10", 200, sets)


def by_length(answers) -> list[float]:
    return [1 / len(answer) for answer in answers]
