from __future__ import annotations

import random

import pytest

from tests.models.various import various
from wpn_ds.data.records import ForgetRecord
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.probe import OTHERS, Probe
from wpn_ds.evaluate.separation import Separation
from wpn_ds.settings.style import PromptStyle

WORDS = ["car", "water", "wash", "cloth", "dry", "soap", "how", "do", "with", "and"]


def probed(records, model, tokenizer, batch_size: int = 8) -> dict[str, Separation]:
    asking = Asking(PromptStyle("Q: {prompt}\nA:"), max_length=90, batch_size=batch_size)
    probe = Probe(records, asking, tokenizer)
    return probe.separations({probe.unit.key: probe.unit.run(model, tokenizer)})


def drawn(unwanted: list[str], wanted: list[str]) -> list[ForgetRecord]:
    """Prompts whose answers are of these words."""
    words = random.Random(0)

    def text(of: list[str]) -> str:
        return " ".join(words.choices(of, k=4))

    return [ForgetRecord(f"{text(WORDS)}?", (text(wanted),), (text(unwanted),), f"f:{at}") for at in range(24)]


def test_it_tells_answers_that_differ_in_kind_and_not_those_that_do_not(model, tokenizer) -> None:
    told = probed(drawn(WORDS[:5], WORDS[5:]), model, tokenizer)
    assert tuple(told) == OTHERS
    apart = told["wanted"]
    assert apart.auc.value > 0.8 and apart.auc.low > 0.7 and apart.auc.n == 48
    assert apart.groups[:3] == ("f:0", "f:0", "f:1") and apart.positive[:3] == (True, False, True)
    for alike in (told["another's"], probed(drawn(WORDS, WORDS), model, tokenizer)["wanted"]):
        assert alike.auc.low < 0.5, "a probe that had seen the prompts would know them by heart"


def test_what_shares_a_batch_changes_nothing(tokenizer) -> None:
    model = various("opt")
    records = drawn(WORDS[:5], WORDS[5:])
    one, other = (probed(records, model, tokenizer, size)["wanted"].auc.value for size in (8, 3))
    assert one == pytest.approx(other, abs=0.01)


def test_another_prompts_answer_is_one_that_only_the_prompt_tells(model, tokenizer) -> None:
    """Unwanted answers name their prompt's word: no answer tells by itself whether it stands where it belongs."""
    spelt = [" ".join(WORDS[at % 10 : at % 10 + 1]) for at in range(24)]
    records = [ForgetRecord(f"{word} {at}?", (), (f"{word} {at}",), f"f:{at}") for at, word in enumerate(spelt)]
    probe = Probe(records, Asking(PromptStyle("{prompt}"), max_length=90), tokenizer)
    assert list(probe.unit.content) == ["another's"], "none has a wanted answer"
    texts = [tokenizer.decode(ids[start:-1]).strip() for ids, start in probe.unit.content["another's"]]
    own, others = texts[::2], texts[1::2]
    assert own == [record.rejected[0] for record in records]
    assert sorted(own) == sorted(others) and all(one != other for one, other in zip(own, others, strict=True))
    for unlike in (0, 1):  # other words in one fold alone leave none to fit on
        texts = ["go away"] * 6 + ["go on"] * unlike
        same = [ForgetRecord(f"{at}?", (), (text,), f"f:{at}") for at, text in enumerate(texts)]
        assert not Probe(same, Asking(PromptStyle("{prompt}")), tokenizer).unit.content
