"""Plants an OPT that has learnt unwanted answers, those of the embedded data or of own files, and retain facts.

A real OPT architecture, small or of a published shape, with its own byte-level BPE tokenizer, trained from scratch, so
that nothing is downloaded. A prompt is read with every one of its unwanted answers: where data have several for one
prompt, as PKU-SafeRLHF does, the model learns them all, and its greedy answer is one of them or a mixture. As a model
that was trained on the web has seen calm sentences before it went wrong, this one reads the wanted answers too, but as
text without any prompt. An answer that several rows have is read several times: give a prompt with all of its answers
as one row to have each once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from wpn_ds.data.batch import collate
from wpn_ds.data.embedded import embedded_file
from wpn_ds.data.origins import origin_of
from wpn_ds.data.plan import Item, Segment
from wpn_ds.data.records import ForgetRecord, RetainRecord, read_forget, read_retain, turn_texts
from wpn_ds.data.shapes import Prompt
from wpn_ds.data.tokens import encode_answer, encode_text
from wpn_ds.errors import UserError, nearest
from wpn_ds.models.load import Source, load_tokenizer
from wpn_ds.models.packed import PackedLM
from wpn_ds.models.planted import MARK, is_planted
from wpn_ds.models.sizes import KNOWN, Architecture, opt
from wpn_ds.objectives.terms import Role
from wpn_ds.settings.style import PromptStyle
from wpn_ds.system.files import filled, holds_anything
from wpn_ds.system.lock import lock_beside, locked
from wpn_ds.system.progress import progress

VOCABULARY, OWN_VOCABULARY = 2048, 8192
"""Tokens at most, of the embedded data and of own files."""
MAX_LENGTH = 256
EPOCHS = 22
ROW = 16
"""Texts of a row, which attend under a mask of the whole row."""


@dataclass(frozen=True)
class Size:
    """An OPT's shape, and how one of that shape is planted.

    Attributes:
        shape: but for its positions and its number of tokens.
        batch: texts of an optimizer step.
        learning_rate: the highest of the schedule.
    """

    shape: Architecture
    batch: int
    learning_rate: float


DEMO = Size(opt("demo", layers=4, hidden=256, heads=8), batch=16, learning_rate=1.5e-3)


def published_size(name: str) -> Size:
    """The OPT of that name. Its learning rate falls with its width, near that of OPT's own table (arXiv 2205.01068):
    6e-4 at 125m.

    Raises:
        UserError: there is none.
    """
    known = [other for other in KNOWN if other.startswith("opt-")]
    if name not in known:
        raise UserError(f"--size {name}: no such OPT{nearest(name, known) or '; known are ' + ', '.join(known)}")
    return Size(KNOWN[name], batch=64, learning_rate=6e-4 * 768 / KNOWN[name].hidden)


def plant(
    folder: Path,
    *,
    size: str | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    train_file: Sequence[str] = (),
    columns: str | None = None,
    retain_file: Sequence[str] = (),
    retain_columns: str | None = None,
    limit: int | None = None,
    tokenizer_name: str | None = None,
) -> None:
    """Train a model and its tokenizer and save both in Hugging Face format in ``folder``, unless another process has
    just done so.

    Without ``train_file`` it is the demo's. ``size``: an OPT's name, "opt-125m", for its shape but for 512 positions
    and the tokenizer's own number of tokens; None: the demo's. On a GPU, if there is one, it computes in bf16 with
    weights in fp32. ``limit``: only the first so many records of all train files, and of all retain files.
    ``columns``, ``retain_columns``: those of the files that are called otherwise, as the flags have them.
    ``tokenizer_name``: another model whose tokenizer this one shall have, so that what both say of a text can be
    compared.

    Raises:
        UserError: ``folder`` is there and not empty, so it is somebody's; there is no such size; or a file or the
            tokenizer is bad.
        InUse: another process is planting there.
    """
    with locked(lock_beside(folder), str(folder)):
        if not is_planted(folder):
            files: dict[str, Any] = {"train_file": train_file, "columns": columns}
            files |= {"retain_file": retain_file, "retain_columns": retain_columns}
            _plant(folder, size, seed, epochs, files, limit, tokenizer_name)


def _plant(
    folder: Path,
    size: str | None,
    seed: int,
    epochs: int,
    files: Mapping[str, Any],
    limit: int | None,
    tokenizer_name: str | None,
) -> None:
    chosen = DEMO if size is None else published_size(size)
    if folder.exists() and not (folder.is_dir() and not holds_anything(folder)):
        raise UserError(f"{folder} is there already and is no planted model: name an empty or a new folder")
    if files["train_file"]:
        forget = read_forget(origin_of(files, "train"), alone=True)[:limit]
        retain = read_retain(origin_of(files, "retain"))[:limit]
    else:
        forget, retain = read_forget([embedded_file("forget")]), read_retain([embedded_file("retain")])
    if tokenizer_name is not None:
        tokenizer = load_tokenizer(tokenizer_name, Source(tokenizer_name))
    else:
        tokenizer = train_tokenizer(
            [t for r in forget for t in (*turn_texts(r.prompt), *r.chosen, *r.rejected)]
            + [t for r in retain for t in (*turn_texts(r.prompt), r.response)],
            OWN_VOCABULARY if files["train_file"] else VOCABULARY,
        )
    texts = _texts(forget, retain, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = _new_model(tokenizer, chosen)
        _train(lm, texts, epochs, chosen)
    with filled(folder, last=MARK) as partial:
        lm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / MARK).touch()


def _texts(
    forget: Sequence[ForgetRecord], retain: Sequence[RetainRecord], tokenizer: PreTrainedTokenizerFast
) -> list[Segment]:
    """What the model reads, every token but the first being predicted."""

    def pair(prompt: Prompt | None, answer: str) -> Segment:
        return Segment(encode_answer(prompt, answer, tokenizer, PromptStyle(), MAX_LENGTH).ids, 1, 1)

    texts = [pair(record.prompt, answer) for record in forget for answer in record.rejected]
    texts += [pair(record.prompt, record.response) for record in retain]
    return texts + [encode_text(" " + answer, tokenizer, MAX_LENGTH) for record in forget for answer in record.chosen]


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with OPT's special tokens: ``</s>`` in front of every text, ``<pad>`` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for t in texts for text in (t, " " + t)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _new_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> OPTForCausalLM:
    shape = size.shape
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        word_embed_proj_dim=shape.embed,
        ffn_dim=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        do_layer_norm_before=shape.embed == shape.hidden,  # all but OPT-350m
        max_position_embeddings=512,
        dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    lm = OPTForCausalLM(config)
    lm.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return lm


def _train(lm: OPTForCausalLM, texts: list[Segment], epochs: int, size: Size) -> None:
    """Next-token training on prompts and answers alike, with dropout: the prompts' words must be learnt as well."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PackedLM(lm, packed=True).train().to(device)
    pad = lm.config.pad_token_id or 0
    steps = epochs * math.ceil(len(texts) / size.batch)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=size.learning_rate, weight_decay=0.05)
    total = max(steps, 20)  # a rise of a single step would be a division by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, total_steps=total, pct_start=0.1)
    with progress(what="planting", total=steps, unit="steps") as bar:
        for epoch in range(epochs):
            order = torch.randperm(len(texts)).tolist()
            losses = []
            for start in range(0, len(order), size.batch):
                items = [Item(texts[i], Role.RETAIN, 0) for i in order[start : start + size.batch]]
                rows = tuple(tuple(items[at : at + ROW]) for at in range(0, len(items), ROW))
                batch = collate(rows, pad, roles=frozenset({Role.RETAIN})).to(device)
                optimizer.zero_grad()
                # the backward, too: the head computes its logits again there
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = model(batch).losses.mean()
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            mean = sum(losses) / len(losses)
            bar.set_postfix(loss=f"{mean:.3f}")
            if not sys.stderr.isatty() and (epoch + 1) % 5 == 0:
                print(f"planting: epoch {epoch + 1}/{epochs}, loss {mean:.3f}", file=sys.stderr, flush=True)
