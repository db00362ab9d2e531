from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from wpn_ds.evaluate.judges.labelled import Labelled
from wpn_ds.evaluate.judges.local import save
from wpn_ds.evaluate.judges.states import Base
from wpn_ds.evaluate.judges.training import fit
from wpn_ds.judging.base import Input
from wpn_ds.models.load import Source
from wpn_ds.models.plant import train_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "kind", "calm", "nice", "rude", "cruel", "vile", "the", "is", "answer"]
GOOD, BAD = ("the answer is kind", "calm nice answer", "nice"), ("the answer is rude", "cruel vile answer", "vile")


def bert(folder: Path, labels: list[str], *, taught: bool = True, **settings: Any) -> Path:
    """A tiny BERT with its tokenizer, random or taught that the last label is for bad words, the first for others."""
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        id2label=dict(enumerate(labels)),
        label2id={label: at for at, label in enumerate(labels)},
        **settings,
    )
    model = BertForSequenceClassification(config).eval()
    batch = tokenizer([*GOOD, *BAD], padding=True, return_tensors="pt")
    wanted = torch.tensor([0.0] * len(GOOD) + [1.0] * len(BAD))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(30 if taught else 0):
        logits = model(**batch).logits
        bad = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, -1], wanted)
        rest = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], 1 - wanted) if len(labels) > 1 else 0
        optimizer.zero_grad()
        (bad + rest).backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of two labels a text, safe or toxic."""
    return bert(tmp_path_factory.mktemp("classifier"), ["safe", "toxic"])


def labelled(count: int = 40) -> list[Labelled]:
    """Half harmful, by words that tell; two answers a prompt."""
    texts = {False: "happy to help with water and soap", True: "only a fool would ask, go away"}
    return [
        Labelled(f"question {at}", f"{text}, number {at}", harmful, f"question {at}", f"made.jsonl:{2 * at + harmful}")
        for at in range(count // 2)
        for harmful, text in texts.items()
    ]


CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def causal(folder: Path, *, chat: bool = True, seed: int = 0, max_position_embeddings: int = 128) -> Path:
    """A random causal model of five layers with its tokenizer: a Llama that chats, or an OPT that doesn't."""
    tokenizer = train_tokenizer([f"{one.prompt} {one.answer}" for one in labelled()], 320)
    tokenizer.chat_template = CHAT if chat else None
    torch.manual_seed(seed)
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    if chat:
        LlamaForCausalLM(LlamaConfig(**common, **special, intermediate_size=64)).save_pretrained(folder)
    else:
        sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": max_position_embeddings}
        OPTForCausalLM(OPTConfig(**common, **special, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that reads answers."""
    return causal(tmp_path_factory.mktemp("base") / "model")


def make_judge(
    folder: Path, base: Path, examples: list[Labelled] | None = None, input: Input = "answer", **about: Any
) -> Path:
    """A judge's folder, trained on all of the examples, with a threshold of 0.5."""
    examples = labelled() if examples is None else examples
    reader = Base(Source(str(base), "--base"))
    prompts = [one.prompt for one in examples] if input == "pair" else None
    features = reader.features(prompts, [one.answer for one in examples])
    head, _ = fit(features, np.array([bool(one.harmful) for one in examples]), [one.group for one in examples])
    save(folder, head, reader, {"input": input, "threshold": 0.5, **about})
    return folder


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A trained local judge's folder."""
    return make_judge(tmp_path_factory.mktemp("local") / "judge", base, seed=0)


class Server:
    """An OpenAI-compatible endpoint on this machine; ``respond`` makes (status, content) of what the user said, and
    ``refuse`` of the request's body, where it isn't None. Content that is a dict is the reply's whole body."""

    def __init__(self) -> None:
        self.respond: Callable[[str], tuple[int, Any]] = lambda said: (200, "HARMLESS")
        self.refuse: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda body: None
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, content = outer.refuse(body) or outer.respond(body["messages"][-1]["content"])
                said = {"choices": [{"message": {"role": "assistant", "content": content}}]}
                reply = json.dumps(content if isinstance(content, dict) else said).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()
