"""The rows of the table: what is compared with what, on which data, how often.

A way of "ours" is a list of flags of ``wpn-ds train``; whatever else is compared is in a ``way_*`` module. Every row
has its own data, ``examples`` forget records for every step, chosen at equal distances by length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

BATCH = 16
MAX_LENGTH = 1024
LENGTHS = (512, 1024, 2048)
LEARNING_RATE = "1e-5"

#: DPO with beta 0.1 in our terms: summed log-probabilities, their ratio to the start, one pair's own unwanted answer.
DPO = (
    *("--wpn_scoring", "likelihood_ratio", "--wpn_pooling", "sum", "--wpn_negatives", "own", "--wpn_targets", "live"),
    *("--wpn_temperature", "10", "--nll_weight", "0", "--retain_weight", "0"),
)
CHECKPOINTING = ("--set", "gradient_checkpointing=true")
#: The starting model's states at retain labels are computed once: the same KL without a second model.
STATES = ("--reference", "states")
LIVE = ("--wpn_targets", "live")


@dataclass(frozen=True)
class Spec:
    """One way of a row.

    Attributes:
        module: of this package; ``way_ours`` takes our flags.
        args: further arguments.
        rounds: turns that it takes; 0: as many as the row has.
        steps: optimizer steps a turn, whose mean counts.
        examples: forget examples of a step; 0: the row's.
        warm_up: take a step that isn't counted first.
        one_time: load it a second time with its caches filled; what that saves is the one-time cost.
    """

    module: str = "way_ours"
    args: tuple[str, ...] = ()
    rounds: int = 0
    steps: int = 1
    examples: int = 0
    warm_up: bool = True
    one_time: bool = False


@dataclass(frozen=True)
class Row:
    """Ways that are measured in turns.

    Attributes:
        group: what ``ONLY=`` selects by, beside the name.
        examples, retain: of an optimizer step.
        alternates: wanted answers that are kept of each of TOFU's examples.
        same_loss: the ways must report the same losses, or the row is refused.
    """

    name: str
    group: str
    title: str
    ways: dict[str, Spec] = field(default_factory=dict)
    data: str = "pku"
    family: str = "opt"
    rounds: int = 3
    examples: int = BATCH
    retain: int = BATCH
    alternates: int = 5
    same_loss: bool = True
    max_length: int = MAX_LENGTH

    def quick(self) -> Row:
        """The same with a tiny model, one round and no large N: to see whether everything works."""
        ways = {
            label: replace(spec, steps=1, rounds=min(spec.rounds, 1))
            for label, spec in self.ways.items()
            if spec.examples <= 64
        }
        return replace(self, rounds=1, ways=ways, family=self.family.partition("-")[0] + "-tiny")


def ours(*flags: str, **more: int | bool) -> Spec:
    return Spec(args=(*STATES, *flags), **more)  # type: ignore[arg-type]


def plain(micro_batch: int, *args: str, **more: int | bool) -> Spec:
    return Spec("way_plain", ("--micro_batch", str(micro_batch), *args), **more)  # type: ignore[arg-type]


def trl(micro_batch: int, *args: str, **more: int | bool) -> Spec:
    return Spec("way_trl", ("--micro_batch", str(micro_batch), "--max_length", str(MAX_LENGTH), *args), **more)  # type: ignore[arg-type]


def growth(name: str, title: str, flags: Sequence[str]) -> Row:
    """Time and memory against N: small N takes more steps, so that all see about as many texts."""
    turns = {16: (4, 2), 128: (1, 1), 1024: (1, 1)}
    ways = {
        str(n): ours(*flags, rounds=rounds, steps=steps, examples=n, warm_up=n < 128)
        for n, (rounds, steps) in turns.items()
    }
    return Row(name, "growth", title, ways, family="opt-small", rounds=4, retain=0, same_loss=False)


def part(name: str, length: int, family: str, routes: Sequence[str], title: str) -> Row:
    """A part of the model by itself, on random tokens."""
    ways = {route: Spec("way_part", ("--route", route, "--length", str(length))) for route in routes}
    group = name.partition("_")[0]
    return Row(f"{name}_{length}", group, f"{title}, {length} tokens", ways, family=family)


def by_length(name: str, title: str, ways: Mapping[str, Sequence[str]], **more: Any) -> list[Row]:
    """One row for each length of the rows that go through the model, of the same texts."""
    return [
        Row(
            f"{name}_{n}",
            name.partition("_")[0],
            f"{title}, rows of {n} tokens",
            {label: ours(*flags, "--tokens_per_micro_batch", str(n)) for label, flags in ways.items()},
            **({"examples": 8, "retain": 8, "rounds": 2, "max_length": 512} | more),
        )
        for n in LENGTHS
    ]


SHARING = {"shared": (*LIVE, "--share_prefix", "true"), "repeated": (*LIVE, "--share_prefix", "false")}

ROWS = (
    Row(
        "plain_pku",
        "plain",
        "WPN against the plain way, PKU triples",
        {"ours": ours(one_time=True), "plain": plain(8)},
        rounds=5,
    ),
    *(
        Row(
            f"plain_pku_micro_batch_{n}",
            "plain",
            f"the same, PKU triples, micro-batches of {n}",
            {"ours": ours(), "plain": plain(n)},
            rounds=1,
        )
        for n in (2, 16)
    ),
    Row("plain_hh", "plain", "the same, HH triples", {"ours": ours(), "plain": plain(8)}, data="hh"),
    Row(
        "plain_pku_gpt_neo",
        "plain",
        "the same, PKU triples, GPT-Neo",
        {"ours": ours(), "plain": plain(8)},
        family="gpt_neo",
        rounds=2,
    ),
    *(
        Row(
            f"plain_pku_135m{name}",
            "plain",
            f"the same, PKU triples, a Llama of SmolLM2-135M's shape{title}, micro-batches of 2",
            {"ours": ours(*own), "plain": plain(2, *theirs)},
            family="llama-135m",
            rounds=2,
            examples=8,
            retain=8,
            same_loss=not own,  # bf16 rounds by more than the losses may differ
        )
        for name, title, own, theirs in (
            ("", "", (), ()),
            ("_bf16", ", bf16", ("--bf16", "true"), ("--bf16",)),
        )
    ),
    Row(
        "plain_pku_max_length",
        "plain",
        f"the same, PKU triples, every batch padded to {MAX_LENGTH} tokens",
        {"ours": ours(), "plain": plain(4, "--pad_to", str(MAX_LENGTH))},
        examples=4,
        retain=4,
        rounds=1,
    ),
    *(
        Row(
            f"trl_{name}",
            "trl",
            f"DPO against TRL's DPOTrainer, PKU triples, {title}",
            {"ours": ours(*DPO, one_time=name == "8"), "trl": trl(n, *settings)},
            rounds=rounds,
            retain=0,
        )
        for name, title, n, rounds, settings in (
            ("2", "micro-batches of 2", 2, 1, ()),
            ("4", "micro-batches of 4", 4, 2, ()),
            ("8", "micro-batches of 8", 8, 2, ()),
            (
                "checkpointing",
                "micro-batches of 8, activation checkpointing on, both TRL's defaults",
                8,
                1,
                CHECKPOINTING,
            ),
        )
    ),
    *(
        part(f"attention_{family}", n, family, routes, f"backbone, {family}, 8 segments, forward and backward")
        for family, routes in (("opt", ("packed", "sdpa", "eager")), ("gpt_neo", ("packed", "eager")))
        for n in LENGTHS
    ),
    *(
        part("head", n, "opt", ("chunked", "full"), "NLL of the last half of 8 segments, forward and backward")
        for n in LENGTHS
    ),
    *by_length("packing", "WPN, PKU triples", {"packed": (), "padded": ("--packing", "false")}),
    Row(
        "prefix_hh",
        "prefix",
        "shared prompts, live targets, HH triples",
        {label: ours(*flags) for label, flags in SHARING.items()},
        data="hh",
        retain=0,
    ),
    *by_length("prefix_hh", "shared prompts, live targets, HH triples", SHARING, data="hh", retain=0, rounds=1),
    Row(
        "prefix_tofu",
        "prefix",
        "shared prompts, live targets, TOFU with five alternates",
        {label: ours(*flags) for label, flags in SHARING.items()},
        data="tofu",
        retain=0,
    ),
    *by_length(
        "reference",
        "the KL term's reference: sharded model, stored states, stored top-k, PKU triples",
        {kind: ("--reference", kind) for kind in ("states", "topk", "sharded")},
        rounds=1,
        same_loss=False,  # top-k lumps the tail
    ),
    Row(
        "bank",
        "bank",
        "targets from the bank against forwards in every step, PKU triples",
        {"bank": ours(one_time=True), "forwards": ours("--wpn_targets", "detached")},
        rounds=2,
        examples=8,
        retain=8,
        same_loss=False,  # of the current model, not of the start
    ),
    growth("growth_live", "live targets against N, PKU triples", LIVE),
    growth("growth_reference", "reference targets against N, PKU triples", ()),
    *(
        Row(
            f"answers_{n}",
            "growth",
            f"{n} wanted answers a prompt, live targets, TOFU",
            {label: ours(*flags) for label, flags in SHARING.items()},
            data="tofu",
            alternates=n,
            examples=8,
            retain=0,
            rounds=1,
        )
        for n in (1, 2)
    ),
)

#: TRL is as fast as the fastest of these lets it be.
TRL_ROWS = ("trl_4", "trl_8")
#: What the JSON has under "ratios": rows, kind, measured way, what it is compared to. Of several rows, the one counts
#: in which the other way is fastest.
RATIOS = {
    "throughput_vs_plain_pku": (("plain_pku",), "throughput", "ours", "plain"),
    "throughput_vs_plain_hh": (("plain_hh",), "throughput", "ours", "plain"),
    "memory_vs_plain_pku": (("plain_pku",), "memory", "ours", "plain"),
    "throughput_vs_trl": (TRL_ROWS, "throughput", "ours", "trl"),
    "memory_vs_trl": (TRL_ROWS, "memory", "ours", "trl"),
    "attention_time_vs_eager_2048_opt": (("attention_opt_2048",), "time", "packed", "eager"),
    "attention_time_vs_eager_2048_gpt_neo": (("attention_gpt_neo_2048",), "time", "packed", "eager"),
    "prefix_sharing_hh": (("prefix_hh",), "throughput", "shared", "repeated"),
    "prefix_sharing_tofu": (("prefix_tofu",), "throughput", "shared", "repeated"),
    "memory_n1024_vs_n16": (("growth_live",), "memory", "1024", "16"),
    "time_per_example_n1024_vs_n16": (("growth_live",), "time", "1024", "16"),
}
