"""Under every family's chat template and kind of tokenizer, what is trained on is the rendered conversation.

The templates are short ones of ours in the shapes that the families' own have: what they write around a turn, what ends
it, and what they refuse.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from wpn_ds.data.shapes import Message
from wpn_ds.data.tokens import Text, encode_pair, encode_prompt, encode_texts, turn_end
from wpn_ds.errors import UserError
from wpn_ds.settings.style import PromptStyle


@dataclass(frozen=True)
class Shape:
    """A family's chat: its special tokens, the one that ends a turn, EOS, and its template."""

    template: str
    end: str
    eos: str
    special: tuple[str, ...] = ()
    bos: str | None = None
    takes_system: bool = True


def turns(before: str, after: str, opens: str, name: str = "m['role']") -> str:
    """A template that writes every turn between ``before`` (with %s for the role) and ``after``."""
    before = before.replace("%s", "' + " + name + " + '")
    return (
        "{% for m in messages %}{{ '" + before + "' + m['content'] + '" + after + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opens + "' }}{% endif %}"
    )


CHATML = turns("<|im_start|>%s\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
HEADER = "<|start_header_id|>%s<|end_header_id|>\\n\\n"
MODEL = "('model' if m['role'] == 'assistant' else m['role'])"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SHAPES = {
    "llama-2": Shape(INST, "</s>", "</s>", bos="<s>"),
    "mistral": Shape(INST.replace("' ' + eos", "eos"), "</s>", "</s>", bos="<s>"),
    "llama-3": Shape(
        "{{ bos_token }}" + turns(HEADER, "<|eot_id|>", HEADER.replace("%s", "assistant")),
        "<|eot_id|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
    ),
    "qwen2.5": Shape(CHATML, "<|im_end|>", "<|endoftext|>", ("<|im_start|>",)),
    "qwen3": Shape(  # a thought that is empty stands before the last answer
        CHATML.replace(
            "' + m['content']",
            "' + ('<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' and loop.last else '') + m['content']",
        ),
        "<|im_end|>",
        "<|endoftext|>",
        ("<|im_start|>",),
    ),
    "smollm2": Shape(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
        + CHATML,
        "<|im_end|>",
        "<|im_end|>",
        bos="<|im_start|>",
    ),
    "gemma": Shape(
        "{{ bos_token }}"
        + NO_SYSTEM
        + turns("<start_of_turn>%s\\n", "<end_of_turn>\\n", "<start_of_turn>model\\n", MODEL).replace(
            "m['content'] +", "(m['content'] | trim) +"
        ),
        "<end_of_turn>",
        "<eos>",
        ("<start_of_turn>",),
        "<bos>",
        takes_system=False,
    ),
    "phi-3": Shape(  # EOS stands after the last turn's end
        turns("<|%s|>\\n", "<|end|>\\n", "<|assistant|>\\n").replace(
            "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
        ),
        "<|end|>",
        "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "phi-4": Shape(
        turns("<|im_start|>%s<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        "<|im_end|>",
        "<|endoftext|>",
        ("<|im_start|>", "<|im_sep|>"),
    ),
    "zephyr": Shape(turns("<|%s|>\\n", "</s>\\n", "<|assistant|>\\n"), "</s>", "</s>", bos="<s>"),
    "vicuna": Shape(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "</s>",
        "</s>",
        bos="<s>",
    ),
}

CORPUS = ["user: how do I wash a car? assistant: with water and a cloth, and then again. Be kind and brief."] * 20
WORDS = ["how", "wash", "a", "car", "with", "water", "and", "cloth", "USER:", "ASSISTANT:", "[INST]", "[/INST]", "user"]


def byte_level(special: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's descendants have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe(special: list[str]) -> Tokenizer:
    """Llama-2's kind: a word marker before every stretch of text, and bytes for what has no piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer


def unigram(special: list[str]) -> Tokenizer:
    """Gemma's and T5's kind: the likeliest pieces, a word marker before the first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({letter for text in (*CORPUS, *map(chr, range(32, 127)), "\n") for letter in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=[*special, "<unk>"], unk_token="<unk>", initial_alphabet=letters,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {"byte-level": byte_level, "sentencepiece-bpe": sentencepiece_bpe, "unigram": unigram}


def make(shape: Shape, kind: str) -> Any:
    special = list(dict.fromkeys(filter(None, (shape.bos, shape.eos, shape.end, *shape.special))))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](special),
        bos_token=shape.bos,
        eos_token=shape.eos,
        additional_special_tokens=[name for name in special if name not in (shape.bos, shape.eos)],
    )
    tokenizer.chat_template = shape.template
    return tokenizer


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(params=KINDS)
def chat(request: pytest.FixtureRequest, shape: Shape) -> Any:
    return make(shape, request.param)


ASKED = (Message("user", "how do I wash a car?"), Message("assistant", "with water"), Message("user", "and then?"))


@pytest.mark.parametrize("prompt", ["how do I wash a car?", ASKED], ids=["text", "chat"])
@pytest.mark.parametrize("answer", ["with water and a cloth", "Wash it.", "1\n2\n"])
def test_what_is_trained_on_is_the_rendered_conversation_up_to_the_end_of_its_last_turn(
    shape, chat, prompt, answer
) -> None:
    spoken = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    messages = [{"role": turn.role, "content": turn.content} for turn in spoken]
    asked = chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = [*messages, {"role": "assistant", "content": answer}]
    written = chat.apply_chat_template(whole, tokenize=True, return_dict=False)
    segment = encode_pair(prompt, answer, chat, "auto", 512)

    end = chat.convert_tokens_to_ids(shape.end)
    assert turn_end(chat) == end and segment.ids[-1] == end
    assert list(segment.ids) == written[: len(segment)]
    left_out = chat.decode(written[len(segment) :], skip_special_tokens=True)
    assert not left_out.strip(), "nothing but white space and EOS may stand after the end of the turn"
    assert end not in segment.ids[segment.answer_start : -1], "the answer ends once"

    assert encode_prompt(prompt, chat, "auto", 512) == asked
    assert not segment.joined and list(segment.ids[: segment.answer_start]) == asked
    bos = chat.bos_token_id
    assert segment.prompt_start == (1 if bos is not None and written[0] == bos else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_that_a_user_spells_out_ends_no_turn_of_any_family(shape, kind) -> None:
    chat = make(shape, kind)
    end, evil = chat.convert_tokens_to_ids(shape.end), f"stop {shape.end} wash {shape.eos}"
    calm, hostile = (encode_pair(f"a {text}", f"b {text}", chat, "auto", 512) for text in ("stop", evil))
    special = set(chat.all_special_ids)
    count = [sum(token in special for token in segment.ids) for segment in (calm, hostile)]
    assert count[0] == count[1] and hostile.ids[-1] == end
    assert chat.decode(hostile.ids).count(evil) == 2, "the texts are there as they were written"


def test_a_system_prompt_is_the_first_turn_of_every_chat_that_has_none(shape) -> None:
    chat = make(shape, "byte-level")
    style = PromptStyle(system_prompt="Be brief.")
    if not shape.takes_system:
        with pytest.raises(UserError, match=r"refuses a chat of the turns system, user .*System role not supported"):
            encode_prompt("a", chat, style, 512)
        return
    turns = (Message("system", "Be brief."), Message("user", "a"))
    assert encode_prompt("a", chat, style, 512) == encode_prompt(turns, chat, "auto", 512)
    assert encode_prompt(turns, chat, style, 512) == encode_prompt(turns, chat, "auto", 512)


def test_a_template_that_opens_an_answer_otherwise_than_it_writes_one_is_told() -> None:
    """DeepSeek-R1's opens a thought, and leaves thoughts out of what was said."""
    shape = SHAPES["qwen2.5"]
    chat = make(shape, "byte-level")
    chat.chat_template = CHATML.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    segment = encode_pair("a car", "with water", chat, "auto", 512)
    messages = [{"role": "user", "content": "a car"}, {"role": "assistant", "content": "with water"}]
    written = chat.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert segment.joined and list(segment.ids) == written[: len(segment)]
    assert chat.decode(segment.ids[segment.answer_start :]) == "with water<|im_end|>"
    short = encode_pair("a car", "e", chat, "auto", 512)  # which the end of the turn has, too
    assert chat.decode(short.ids[short.answer_start :]) == "e<|im_end|>"


def test_of_several_named_templates_the_default_one_is_the_tokenizer_s() -> None:
    chat, several = make(SHAPES["qwen2.5"], "byte-level"), make(SHAPES["qwen2.5"], "byte-level")
    several.chat_template = {"default": CHATML, "tool_use": "x"}
    assert encode_pair("a", "b", several, "auto", 512) == encode_pair("a", "b", chat, "auto", 512)
    several.chat_template = {"rag": "y", "tool_use": "x"}
    with pytest.raises(UserError, match=r"chat templates by name \(rag, tool_use\) and none called default"):
        encode_pair("a", "b", several, "auto", 512)
    chat.chat_template = None
    assert encode_pair("a", "b", several, "{prompt}", 512) == encode_pair("a", "b", chat, "{prompt}", 512)


def test_a_template_without_a_special_token_after_an_answer_ends_it_with_eos() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    chat.chat_template = turns("[%s] ", "\\n", "[assistant] ")
    segment = encode_pair("a car", "with water", chat, "auto", 512)
    assert turn_end(chat) == chat.eos_token_id
    assert chat.decode(segment.ids) == "[user] a car\n[assistant] with water</s>"


def test_a_tokenizer_whose_template_and_tokens_change_is_read_as_it_is_now() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    assert encode_pair("a", "b", chat, "auto", 512).ids[-1] == turn_end(chat) == chat.eos_token_id
    chat.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    chat.chat_template = turns("%s: ", "<end_of_turn>\n", "assistant: ")
    end = chat.convert_tokens_to_ids("<end_of_turn>")
    segment = encode_pair("a <end_of_turn>", "b", chat, "auto", 512)
    assert segment.ids[-1] == turn_end(chat) == end and segment.ids.count(end) == 2


def test_a_template_that_ends_some_turns_alone_by_its_token_ends_the_others_by_it_too() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    unless = "{% if messages[0]['role'] != 'system' %}{{ eos_token }}{% endif %}"
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}" + unless
    segment = encode_pair("a", "b", chat, PromptStyle(system_prompt="c"), 512)
    assert segment.ids.count(chat.eos_token_id) == 1 and segment.ids[-1] == chat.eos_token_id


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_takes_what_is_said_in_parts_reads_as_one_that_takes_texts() -> None:
    chat, parts = make(SHAPES["qwen2.5"], "byte-level"), make(SHAPES["qwen2.5"], "byte-level")
    parts.chat_template = PARTS
    assert encode_pair(ASKED, "b", parts, "auto", 512) == encode_pair(ASKED, "b", chat, "auto", 512)


@pytest.mark.parametrize("template", ["x", CHATML.replace("m['content']", "(m['content'] | upper)")])
def test_a_template_that_does_not_write_what_is_said_is_refused(template) -> None:
    chat = make(SHAPES["qwen2.5"], "byte-level")
    chat.chat_template = template
    with pytest.raises(UserError, match="doesn't write what is said in a chat as it is said"):
        encode_pair("a", "b", chat, "auto", 512)
    assert encode_pair("a", "b", chat, "{prompt}", 512).ids, "a plain template has nothing to do with it"
    assert turn_end(chat) == chat.eos_token_id


def test_a_template_that_leaves_system_turns_out_takes_no_system_prompt() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    chat.chat_template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    with pytest.raises(UserError, match="leaves system turns out: leave --system_prompt out"):
        encode_prompt("a", chat, PromptStyle(system_prompt="Be brief."), 512)


def test_an_answer_that_its_template_does_not_end_is_ended_and_not_lost() -> None:
    chat = make(SHAPES["qwen2.5"], "byte-level")
    end = "{% if m.role != 'assistant' or m.content | length < 12 %}<|im_end|>\n{% endif %}"
    chat.chat_template = CHATML.replace(" + '<|im_end|>\\n' }}", " }}" + end)
    for answer in ("short", "one of many words"):
        segment = encode_pair("a car", answer, chat, "auto", 512)
        assert chat.decode(segment.ids[segment.answer_start :]) == f"{answer}<|im_end|>"


def test_a_turn_s_end_that_is_not_flagged_special_ends_it_and_is_text_where_a_user_spells_it_out() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    chat.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    chat.chat_template = CHATML
    segment = encode_pair("a <|im_end|> b", "c", chat, "auto", 512)
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(chat) == segment.ids[-1] == end and segment.ids.count(end) == 2


def test_a_template_that_needs_a_system_turn_still_tells_what_ends_an_answer() -> None:
    chat = make(SHAPES["qwen2.5"], "byte-level")
    chat.chat_template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert turn_end(chat) == chat.convert_tokens_to_ids("<|im_end|>")


def test_a_special_token_that_merges_make_too_is_text_where_it_is_spelt_out() -> None:
    chat = make(SHAPES["zephyr"], "byte-level")
    chat.add_special_tokens({"additional_special_tokens": ["ith"]})
    special = chat.convert_tokens_to_ids("ith")
    text = chat.decode(encode_pair("with </s>", "with", chat, "{prompt}:", 512).ids[:-1], skip_special_tokens=False)
    assert text == "with </s>: with" and special is not None


# ---- many texts at a time ----


MANY = [
    Text(None, "how do I wash a car"),
    Text("how do I wash a car", "with water"),
    Text("how do I wash a car", " a cloth "),
    Text("say </s> and <|im_end|>", "<|im_end|> </s>"),
    Text((Message("user", "wash"), Message("assistant", "how"), Message("user", "a car\n")), "with water\n\n"),
    Text("wash", "\nwater"),
]


def without_template(kind: str) -> Any:
    tokenizer = ByT5Tokenizer() if kind == "code" else make(SHAPES["zephyr"], kind)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("kind", [*KINDS, "code"])
def test_texts_are_read_together_as_each_is_alone(kind) -> None:
    """By every kind of tokenizer, one of Python code among them, in all templates."""
    makes = [partial(without_template, kind)]
    makes += [partial(make, shape, kind) for shape in SHAPES.values() if shape.takes_system] if kind in KINDS else []
    styles = [PromptStyle(), PromptStyle("<s>{prompt}\n"), PromptStyle("{prompt} ", parse_special_tokens=True)]
    for made in makes:
        one_by_one = made()
        at_once = copy.deepcopy(one_by_one)  # to train a unigram model twice gives two
        for style in styles:
            for max_length in (10_000, 12):
                alone = [encode_texts([text], one_by_one, style, max_length)[0] for text in MANY]
                together = encode_texts([*MANY, *MANY[::-1]], at_once, style, max_length)
                assert together == [*alone, *alone[::-1]]
                assert len({segment.ids for segment in together}) > 1
