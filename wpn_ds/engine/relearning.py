"""A copy of a model whose weights ranks share that learns: by THE step, in packed rows; it answers on all ranks
together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import plan_step
from wpn_ds.data.plan import Segment
from wpn_ds.engine.adversary import RELEARNING
from wpn_ds.engine.copies import Copy
from wpn_ds.engine.reading import Generation
from wpn_ds.engine.start import Start
from wpn_ds.engine.step import Step
from wpn_ds.models.generate import continued


class Learner(Copy):
    """By AdamW at a constant rate and without decay. Without adapters, 16 bytes a parameter with gradient and AdamW's
    state, over all ranks together."""

    def __init__(self, lm: Any, tokenizer: Any, learning_rate: float, lora_r: int, seed: int, max_length: int) -> None:
        # DeepSpeed's own AdamW would be compiled first.
        adamw = {"lr": learning_rate, "weight_decay": 0.0, "torch_adam": True, "fused": True}
        super().__init__(lm, tokenizer, {"type": "AdamW", "params": adamw}, lora_r, seed, max_length)
        start = Start(RELEARNING, ExampleSet(), self.reader)  # that term compares to nothing
        self.step = Step(self.engine, RELEARNING, self.world, self.layout, self.pad_id, start)

    def teach(self, segments: Sequence[Segment]) -> None:
        """One update on the mean NLL of the answers' tokens."""
        unwanted = [Answer(segment, at, at) for at, segment in enumerate(segments)]
        examples = ExampleSet([ForgetExample((), (answer,)) for answer in unwanted])
        self.step(plan_step(examples, range(len(segments)), (), self.layout, roles=RELEARNING.read))

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, batch_size: int) -> list[str]:
        """Greedy ones, of so many tokens at most, on every rank; each batch is answered by one of them."""
        generation = Generation(self.lm, self.tokenizer, self.world, batch_size=batch_size)
        return [continued(self.tokenizer, (), ids).strip() for ids in generation("relearning", prompts, tokens)]
