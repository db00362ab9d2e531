"""TRL's way: its DPOTrainer as it comes, asked step by step. Runs in TRL's own environment, which has nothing of ours.

The trainer gets the token ids that our own trainer reads, so both train on the same tokens; what its users would do
beside that is left to its defaults, but for fp32 and no recomputation of activations, as in every other way, and a
learning rate large enough for the loss to move.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.protocol import asked, clock, finish, since, tell


class Tokenised(DPOTrainer):
    """A DPOTrainer whose data are tokenised already, and that keeps the loss of the step."""

    loss = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)  # divided by the accumulation steps
        self.loss += loss.item()
        return loss


class Turns(TrainerCallback):
    """Waits for the driver before each optimizer step, and answers after it."""

    trainer: Tokenised

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not asked():
            finish()
        self.trainer.loss, self.begun = 0.0, clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        took = since(self.begun)
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
        tell(**took, examples=examples, losses={"npair": self.trainer.loss})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", required=True, type=Path)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--set", action="append", default=[], help="another field of DPOConfig: name=JSON")
    args = parser.parse_args()
    examples = [e for line in args.steps.read_text().splitlines() for e in json.loads(line)["forget"]]
    per_step = len(json.loads(args.steps.open().readline())["forget"])
    rows = [{"answers": (e["wanted"][0], e["unwanted"][0])} for e in examples]
    data = Dataset.from_list([_pair(*row["answers"]) for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "beta": 0.1,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "constant",
            "max_length": args.max_length,
            "per_device_train_batch_size": args.micro_batch,
            "gradient_accumulation_steps": per_step // args.micro_batch,
            "train_sampling_strategy": "sequential",
            "num_train_epochs": 1,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
        }
        settings |= {name: json.loads(value) for name, _, value in (s.partition("=") for s in args.set)}
        turns = Turns()
        turns.trainer = Tokenised(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=DPOConfig(**settings),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[turns],
        )
        tell(ready=True)
        turns.trainer.train()
        asked()  # the driver has had all steps that there are: this is the end
        finish()


def _pair(wanted: list[Any], unwanted: list[Any]) -> dict[str, list[int]]:
    (chosen, _, start, _), (rejected, *_) = wanted, unwanted
    return {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


if __name__ == "__main__":
    main()
