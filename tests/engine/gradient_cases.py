"""Models, data and cases of the gradient test, shared by the processes that compute and the one that compares."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from wpn_ds.data.examples import Answer, ExampleSet, ForgetExample
from wpn_ds.data.layout import SHORTEST_HEADER
from wpn_ds.data.plan import Segment
from wpn_ds.models.adapters import attach
from wpn_ds.models.load import Source, load_model
from wpn_ds.settings.lora import LoraConfig

VOCABULARY = 96
WINDOW = 8  # of GPT-Neo's local layers; many segments below are longer
WEIGHTS = {"npair": 0.7, "preference": 0.7, "forget": 0.7, "retain": 2.0}
BASE = {
    "stage": 3,
    "targets": "reference",
    "layout": "shared",
    "reference": "sharded",
    "several": True,
    "checkpointing": False,
    "pooling": "weighted",
    "power": 1.0,
    "scoring": "cosine",
    "negatives": "step",
    "retain_loss": "kl",
    "temperature": 0.2,
    "ascent": 0.0,
    "dropout": 0.0,
    "objective": "wpn",
    "beta": 1.0,
    "gamma": 0.0,
    "importance": 1.0,
    "steering": 6.5,
    "trained": 0,
    "nll": 1.3,
    "nll_power": 0.0,
    "harmonise": False,
    "sam_rho": 0.0,
    "adversary": 0,
    "adversary_rate": 0.05,
    "meta": 0.0,
    "headed": False,
    "lora": 0,
    "four_bits": False,
}


def case(**changes) -> dict:
    return {**BASE, **changes}


#: The matrix: every combination for ZeRO-3.
MATRIX = [
    case(targets=targets, layout=layout, several=several, checkpointing=checkpointing)
    for targets, layout, several, checkpointing in itertools.product(
        ("reference", "live"), ("shared", "padded"), (False, True), (False, True)
    )
]
#: Gradient ascent, in the layouts in which prompts are shared and in which each row is padded.
ASCENT = [
    case(ascent=0.4, layout=layout, several=several) for layout in ("shared", "padded") for several in (True, False)
]
BY_LIKELIHOOD = {"scoring": "likelihood", "targets": "live", "negatives": "step", "temperature": 1.0}
#: Every answer's score against the whole step's, which any rank and micro-batch may hold; and position weights.
STEP_SCORES = [
    *(
        case(**BY_LIKELIHOOD, layout=layout, several=several)
        for layout in ("shared", "padded")
        for several in (True, False)
    ),
    case(**BY_LIKELIHOOD, power=2.5, nll_power=1.5, layout="flat"),
    case(**BY_LIKELIHOOD, power=-1.0, nll_power=-0.5, layout="rows", checkpointing=True, ascent=0.4),
]
#: One change at a time: other stages, and every other setting of the objective.
VARIATIONS = [
    *(case(stage=stage) for stage in (0, 1, 2)),
    *(case(stage=stage, targets="live", layout="padded") for stage in (0, 2)),
    *(case(layout=layout, targets=targets) for layout in ("flat", "rows") for targets in ("reference", "live")),
    *(case(reference=reference) for reference in ("states", "topk", "cpu")),
    case(reference="states", stage=1),
    case(targets="detached"),
    case(pooling="mean"),
    case(pooling="last", targets="live"),
    case(power=2.0),
    case(power=0.0, targets="live", layout="padded"),
    case(nll_power=2.0),
    case(nll_power=1.0, layout="padded", several=False),
    case(nll_power=1.0, scoring="likelihood", targets="live", negatives="own", temperature=1.0),
    case(nll_power=1.0, scoring="likelihood", targets="live", negatives="own", temperature=1.0, several=False),
    *STEP_SCORES,
    *(case(**BY_LIKELIHOOD, stage=stage) for stage in (0, 2)),
    case(**BY_LIKELIHOOD, stage=0, layout="padded", ascent=0.4),
    *(
        case(**BY_LIKELIHOOD | {"scoring": "likelihood_ratio", "temperature": 10.0}, pooling="sum", layout=layout)
        for layout in ("shared", "padded")
    ),
    case(scoring="dot", temperature=20.0),
    case(scoring="likelihood", targets="live", negatives="own", temperature=1.0),
    case(scoring="likelihood", targets="live", negatives="own", temperature=1.0, several=False),
    case(scoring="likelihood", targets="live", negatives="own", temperature=1.0, layout="rows"),
    case(scoring="likelihood_ratio", targets="live", negatives="own", temperature=10.0, pooling="sum"),
    case(scoring="likelihood_ratio", targets="live", negatives="own", temperature=10.0, pooling="sum", layout="padded"),
    case(targets="live", negatives="own"),
    case(negatives="own"),
    case(negatives="bank"),
    case(retain_loss="nll"),
    *ASCENT,
    case(ascent=0.4, layout="rows"),
    *(
        case(
            ascent=0.4,
            scoring="likelihood",
            targets="live",
            negatives="own",
            temperature=1.0,
            headed=True,
            layout=layout,
            several=several,
        )
        for layout in ("headed", "padded")
        for several in (True, False)
    ),
    case(ascent=0.4, targets="live", negatives="own"),
    case(ascent=0.4, scoring="likelihood", targets="live", negatives="own", temperature=1.0),
    case(ascent=0.4, scoring="likelihood", targets="live", negatives="own", temperature=1.0, several=False),
]
#: Every other objective, packed with shared prompts and padded. The sharpness is such that no sigmoid saturates.
FAMILY = [
    case(objective=objective, layout=layout, **settings)
    for layout in ("shared", "padded")
    for objective, settings in {
        "ga": {"ascent": 0.4, "nll": 0.0},
        "graddiff": {"ascent": 0.4, "nll": 0.0, "retain_loss": "nll"},
        "llmu": {"ascent": 0.4},
        "pmpo": {"ascent": 0.4},
        "wga": {"ascent": 0.4, "nll": 0.0, "beta": 0.5},
        "tnpo": {"ascent": 0.4, "nll": 0.0, "beta": 2.0},
        "satimp": {"ascent": 0.4, "nll": 0.0, "beta": 0.5, "importance": 1.5},
        "ceu": {},
        "undial": {"nll": 0.0, "beta": 3.0},
        "pdu": {"nll": 0.0, "retain_loss": "nll"},
        "rmu": {"nll": 0.0, "retain_loss": "states", "trained": 1},
        "npo": {"nll": 0.0, "beta": 0.5, "retain_loss": "nll"},
        "simnpo": {"nll": 0.0, "beta": 0.5, "gamma": 0.3, "retain_loss": "nll"},
        "dpo": {"beta": 0.5},
        "altpo": {"nll": 0.0, "beta": 0.5, "retain_loss": "nll"},
        "idkdpo": {"nll": 0.0, "beta": 0.4, "retain_loss": "nll"},
        "neat": {"ascent": 0.4},
        "c3po": {"nll": 0.0, "beta": 0.3},
    }.items()
] + [
    case(objective="altpo", layout="rows", several=False, nll=0.0, beta=0.5),
    case(objective="altpo", layout="flat", checkpointing=True, beta=0.5),
    case(objective="npo", layout="rows", several=False, beta=0.5),
    case(objective="tnpo", layout="flat", several=False, ascent=0.4, beta=2.0),
    case(objective="altpo", stage=2, beta=0.5),
    case(objective="undial", beta=3.0, reference="states"),
    case(objective="pdu", layout="rows", stage=0, checkpointing=True),
    case(objective="rmu", retain_loss="states", layout="flat", several=False, checkpointing=True),
    case(objective="rmu", retain_loss="kl", layout="rows", nll=0.0, checkpointing=True, trained=1, stage=2),
    # with an ascent strong enough to oppose the retain term, and with one that does not
    *(case(harmonise=True, stage=stage, ascent=9.0, layout=form) for stage in (0, 3) for form in ("flat", "padded")),
    case(harmonise=True, several=False, ascent=9.0, targets="live"),
    case(harmonise=True),
]  # fmt: skip
#: The forget gradient where the weights have moved along it, as far as it takes to be another one.
RHO = 0.3
SHARPNESS = [
    *(case(sam_rho=RHO, stage=stage, layout=("shared", "padded")[stage % 2]) for stage in range(4)),
    case(sam_rho=RHO, objective="npo", nll=0.0, beta=0.5, retain_loss="nll", several=False, checkpointing=True),
    case(sam_rho=RHO, targets="live", layout="padded"),
    case(sam_rho=RHO, **BY_LIKELIHOOD, checkpointing=True),
    case(sam_rho=RHO, targets="detached", stage=1, layout="rows"),
    case(sam_rho=RHO, objective="ga", ascent=0.4, nll=0.0, stage=2, layout="flat"),
    *(case(sam_rho=RHO, harmonise=True, ascent=9.0, stage=stage) for stage in (0, 3)),
    *(case(sam_rho=RHO, lora=4, stage=stage) for stage in (0, 2, 3)),
]
#: The forget gradient after steps of relearning; most of these objectives don't read what is relearned.
ADVERSARIES = [
    *(case(adversary=2, stage=stage, layout=("shared", "padded")[stage % 2]) for stage in range(4)),
    case(adversary=1, objective="npo", nll=0.0, beta=0.5, retain_loss="nll", several=False, checkpointing=True),
    case(adversary=2, targets="live", harmonise=True, ascent=9.0),
    case(adversary=2, lora=4, stage=2),
]
#: The examples in the first half of the first step, whose order the default seed decides.
SUPPORT = np.random.default_rng([42, 0]).permutation(6)[:3].tolist()
#: A virtual step on that half, and pairs that look beyond a micro-batch and rank, but not beyond a half.
META = [
    case(meta=0.1, stage=2),
    case(meta=0.1, stage=0, harmonise=True, ascent=9.0, layout="flat"),
    case(meta=0.1, harmonise=True, ascent=9.0, several=False),
    case(meta=0.1, stage=1, targets="live", layout="padded"),
    case(meta=0.1, objective="dpo", beta=0.5, checkpointing=True),
    case(meta=0.1, **BY_LIKELIHOOD, several=False),
]
#: The gradient of adapters of rank 4 in all linear layers; the model without them is the starting one.
LORA = [
    *(
        case(lora=4, targets=targets, layout=layout, several=several)
        for targets, several in (("reference", True), ("live", False))
        for layout in ("shared", "padded")
    ),
    *(case(lora=4, stage=stage) for stage in (0, 1, 2)),
    case(lora=4, checkpointing=True, layout="rows"),
    *(case(lora=4, reference=reference) for reference in ("states", "topk")),
    case(lora=4, **BY_LIKELIHOOD),
    case(lora=4, objective="npo", nll=0.0, beta=0.5),
    case(lora=4, objective="altpo", nll=0.0, beta=0.5, layout="padded"),
    case(lora=4, objective="undial", beta=3.0),
    case(lora=4, objective="rmu", retain_loss="states", layout="flat"),
    case(lora=4, objective="tnpo", ascent=0.4, nll=0.0, beta=2.0, several=False),
    *(case(lora=4, harmonise=True, stage=stage, ascent=9.0) for stage in (0, 3)),
    *(case(lora=4, four_bits=True, stage=stage, layout=layout) for stage, layout in ((0, "shared"), (2, "padded"))),
]
#: Two forwards of each micro-batch must drop the same activations.
REPLAYS = [
    case(targets="live", dropout=0.3),
    case(**BY_LIKELIHOOD, dropout=0.3),
    case(sam_rho=1e-30, targets="live", dropout=0.3),
]


def name_of(case: dict) -> str:
    changed = {k: v for k, v in case.items() if BASE[k] != v}
    return ",".join(f"{k}={v}" for k, v in changed.items()) or "base"


def objective_key(case: dict) -> str:
    """What of a case the plain reference depends on."""
    layout = ("stage", "layout", "reference", "several", "checkpointing", "dropout")
    return json.dumps({name: value for name, value in case.items() if name not in layout})


def make_model(family: str, folder: Path, seed: int) -> None:
    """A random model with weights large enough that every term has a gradient to speak of."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 96}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt_neo":
        layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
        lm = GPTNeoForCausalLM(GPTNeoConfig(**common, **layers, **special, window_size=WINDOW, intermediate_size=64))
    elif family == "llama":
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
        lm = LlamaForCausalLM(LlamaConfig(**common, **layers, **special, pad_token_id=0))
    else:
        odd = (
            {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
            if family == "opt-350m"
            else {"word_embed_proj_dim": 32}
        )
        layers = {"num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "pad_token_id": 1}
        lm = OPTForCausalLM(OPTConfig(**common, **layers, **odd, **(special | {"bos_token_id": 2})))
    save_larger(lm, folder)


def save_larger(lm: Any, folder: Path) -> None:
    """Save the model with noise on its weights, which are small otherwise."""
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    lm.save_pretrained(folder)


def adapt(lm: Any, rank: int) -> None:
    """Adapters in all linear layers whose two matrices are both far from zero, the same wherever it is called."""
    attach(lm, LoraConfig(lora_r=rank, lora_alpha=2 * rank, lora_target=["all-linear"]), seed=0)
    with torch.no_grad():
        for name, parameter in sorted(lm.named_parameters()):
            if parameter.requires_grad:
                seed = torch.Generator().manual_seed(sum(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=seed) * 0.2)


def rounded_to_4_bits(lm: Any, folder: Path) -> None:
    """Give ``lm``, which is of ``folder``, the weights that its linear layers have in 4 bits."""
    small = load_model(Source(str(folder)), dtype=torch.float32, four_bits=True)
    layers = dict(lm.named_modules())
    for name, module in small.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            layers[name].weight.data = weight.to(layers[name].weight.dtype)


def make_examples(headed: bool = False) -> ExampleSet:
    """Uneven segments, several answers, one prompt in two examples, prompts and answers longer than the window, an
    unwanted text that is another example's wanted one, text-like retain."""
    rng = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, VOCABULARY) for _ in range(n))

    forget, retain, texts = [], [], {}
    counts = itertools.count()
    shared = ids(9)

    def answers(prompt: tuple[int, ...], tails: list[tuple[int, ...]]) -> tuple[Answer, ...]:
        return tuple(
            Answer(
                Segment((2, *prompt, *tail, 2), 1, 1 + len(prompt)), next(counts), texts.setdefault(tail, len(texts))
            )
            for tail in tails
        )

    prompt: tuple[int, ...] = ()
    header = ids(SHORTEST_HEADER) if headed else ()
    for n_prompt, wanted, unwanted in (
        (3, [ids(12), shared], [ids(5)]),
        (14, [ids(2)], [ids(7), ids(19)]),
        (6, [ids(20)], [shared, ids(3)]),
        (9, [ids(4), ids(1), ids(8)], [ids(11)]),
        (0, [ids(5)], [ids(10)]),
        (1, [ids(6)], [ids(6), ids(2), ids(13)]),
    ):
        prompt = (*header, *ids(n_prompt)) if n_prompt else prompt
        forget.append(ForgetExample(answers(prompt, wanted), answers(prompt, unwanted)))
    for n, start in ((17, 5), (4, 1), (24, 10)):
        retain.append(Segment((2, *header, *ids(n), 2), 1, start + len(header)))
    return ExampleSet(forget, retain)
