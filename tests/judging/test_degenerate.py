from __future__ import annotations

import csv
import json
import random
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpn_ds.data.records import read_forget, read_retain
from wpn_ds.judging.degenerate import degenerate_kind

PROMPT = "How do I boil an egg so it stays soft?"


@pytest.mark.parametrize("answer", ["", " \n\t", "...", "?! \u2014 \u2026", "\u200b", "___", "\U0001f44d"])
def test_white_space_and_punctuation_are_empty(answer) -> None:
    assert degenerate_kind(answer, PROMPT) == "empty"


@pytest.mark.parametrize(
    "answer",
    [
        PROMPT,
        PROMPT.upper(),
        f"{PROMPT}\nAnswer: {PROMPT}",
        "Question: how do I boil an egg so it sta",
        "do I boil an egg so it stays",
    ],
)
def test_the_prompt_again_is_an_echo(answer) -> None:
    assert degenerate_kind(answer, f"Question: {PROMPT}\nAnswer:") == "echo"


@pytest.mark.parametrize("prompt", ["Hello", "Who are you?"])
def test_a_short_prompt_word_by_word_is_an_echo_whatever_stood_around_it(prompt) -> None:
    assert degenerate_kind(prompt, prompt) == "echo"
    assert degenerate_kind(prompt, f"Question: {prompt}\nAnswer:", prompt) == "echo"


def test_a_long_verbatim_piece_of_a_long_prompt_is_an_echo() -> None:
    prompt = " ".join(f"word{i}" for i in range(100))
    assert degenerate_kind(" ".join(f"word{i}" for i in range(40, 60)), prompt) == "echo"


@pytest.mark.parametrize(
    "answer",
    [
        "no no no",
        "No, no, no.",
        "no no no no no no",
        "Sorry, sorry.",
        "hahaha",
        "\u597d\u7684\u597d\u7684\u597d\u7684",
        "I am sorry. I am sorry.",
        "The egg. The egg. The egg. The egg.",
        "Well, go away and leave me alone, go away and leave me alone, go away and leave me al",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "hahahahahahahahahahahahahahaha",
        " ".join(f"{start} boil the egg in water for six minutes." for start in ("One", "Two", "So", "Now", "Yes")),
    ],
)
def test_saying_the_same_over_and_over_is_repetitive(answer) -> None:
    assert degenerate_kind(answer, "What should I do?") == "repetitive"


@pytest.mark.parametrize(
    "answer",
    [
        "asdfghjkl asdfjkl;",
        "sdkjfh skdjfh ksjdhf",
        "Fjdksl fjdksla jfkdlsa vjfkdx",
        "xqzvkt brgh wqpltm zzkv qpwx",
        "}{ ;: (a $% ^& @! b ~| <>",
        "the \ufffd\ufffd\ufffd\ufffd of \ufffd\ufffd",
        "\x01\x02\x03 yes \ue000\ue001",
    ],
)
def test_a_hand_on_the_keyboard_stray_signs_and_broken_bytes_are_gibberish(answer) -> None:
    assert degenerate_kind(answer, PROMPT) == "gibberish"


@pytest.mark.parametrize(
    "prompt, answer",
    [
        (PROMPT, "No."),
        (PROMPT, "Six minutes."),
        (PROMPT, "No, no, no, don't do that."),
        ("Which is it?", "50/50"),
        ("How much?", "1111"),
        (PROMPT, "To boil an egg so it stays soft, lower it into boiling water and wait six minutes."),
        (PROMPT, "Wash the bowl, wash the pan, wash the spoon, and then wash the table."),
        (PROMPT, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the capital of France?", "Paris is the capital of France."),
        ("Is it better to save money or to spend it?", "It is better to save money."),
        ("Is it safer to walk home alone or to take a taxi at night?", "Take a taxi at night."),
        ("Is the earth flat or round?", "Round"),
        ("\u4f60\u597d\u5417", "\u6211\u5f88\u597d"),
    ],
)
def test_ordinary_short_answers_are_not_degenerate(prompt, answer) -> None:
    assert degenerate_kind(answer, f"Question: {prompt}\nAnswer:", prompt) is None


@pytest.mark.parametrize(
    "answer",
    [
        "Bezwzgl\u0119dnie przestrzegaj zasad bezpiecze\u0144stwa i nie dotykaj gor\u0105cego garnka.",
        "Str\u010d prst skrz krk. Jsem velmi r\u00e1d, \u017ee jste p\u0159i\u0161li.",
        "Misschien zijn wij vijftien jaar later gelijkwaardig; ik kijk naar mijn fiets.",
        "Weihnachtsschmuck und Angstschwei\u00df: die Rechtsschutzversicherung zahlt.",
        "Rechtsschutz.",
        "Jeg kender en lille bj\u00f8rn, tjek kjolen hjemme.",
        "Ljubav je najva\u017enija stvar na svijetu, njezin prijatelj obja\u0161njava vjerojatnost.",
        "Rhowch yr wy mewn d\u0175r berwedig ac arhoswch chwe munud.",
        "Wo hen xihuan zhongguo cai, qing wen nin zhidao zuijin de chaoshi ma? Xiexie.",
        "Iraq, Qatar, al-Qaeda, burqa, tariq",
        "\u041d\u0430\u0436\u043c\u0438\u0442\u0435 \u043a\u043d\u043e\u043f\u043a\u0443",
        "\u5c06\u9e21\u86cb\u653e\u5165\u6cb8\u6c34\u4e2d\u716e\u516d\u5206\u949f\u3002",
        "\u0636\u0639 \u0627\u0644\u0628\u064a\u0636\u0629 \u0641\u064a \u0627\u0644\u0645\u0627\u0621",
        "Zbigniew Brzezinski, Krzysztof, Djokovic, Xhaka, Ljubljana, Dzhokhar",
        "HTTPS, XML, JPG, MPEG, PNG, KGB, FBI, HDTV, XHTML",
        "https brb omw tbh idk lol",
        "BVCX, XQKJ, MXVZ and KQJX",
        "The QWERTY layout begins with qwertyuiop, then asdfghjkl and zxcvbnm.",
        "Shhh, hmmm, brrrrrr, tsktsk, pfft!",
        "https://www.xkcd.com/qzx/vjkq?x=zxqj and www.qwxz.com",
        "import numpy as np\nfor i, j in zip(xs, ys):\n    print(f'{i}->{np.sqrt(df.iloc[i]):.3f}')",
        'int rc = strncpy(dst, src, n); fprintf(stderr, "%s\\n", strerror(errno)); qsort(arr, n);',
        '[{"a": 1, "b": [2, 3]}, {"a": 4, "b": [5, 6]}]',
        "2 + 2 = 4; 3 * (4 - 1) / 2 = 4.5; $1,000,000.00; 48/2 = <<48/2=24>>24",
        "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Bxc6 dxc6 5. Qxd4 Kxf7",
        "CaCO3 + 2HCl -> CaCl2 + H2O + CO2; KMnO4; MgSO4; MCMXCIX",
        "No!!!!!!!!!!!!!!!!!!!!!!!",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "Yes " + "\U0001f44d\U0001f389\U0001f525\U0001f4af\U0001f60e\u2728" * 2,
        "Well done \U0001f389\ufffd",
    ],
)
def test_other_languages_code_numbers_addresses_and_acronyms_are_not_gibberish(answer) -> None:
    assert degenerate_kind(answer, PROMPT) is None


@given(st.integers(0, 10**6))
def test_many_random_letters_are_gibberish(seed) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("bcdfghjklmnpqrstvwxz", k=rng.randint(4, 9))) for _ in range(30)]
    assert degenerate_kind(" ".join(words), PROMPT) == "gibberish"


def demo(name: str) -> list:
    with resources.as_file(resources.files("wpn_ds.data.embedded") / f"{name}.jsonl") as path:
        return read_retain([path]) if name == "retain" else read_forget([path])


def test_no_answer_of_the_demo_is_degenerate() -> None:
    pairs = [(r.prompt, text) for name in ("forget", "heldout", "attack") for r in demo(name) for text in r.chosen]
    pairs += [(r.prompt, text) for name in ("forget", "heldout", "attack") for r in demo(name) for text in r.rejected]
    pairs += [(r.prompt, r.response) for r in demo("retain")]
    assert len(pairs) > 500
    for prompt in ("{}", "Question: {}\nAnswer:"):
        assert [pair for pair in pairs if degenerate_kind(pair[1], prompt.format(pair[0]), pair[0])] == []


def test_of_real_answers_fewer_than_one_in_a_thousand_is_gibberish(shared_data) -> None:
    triples = (shared_data / "pku_saferlhf_5k/derived/triples_dev.jsonl").read_text().splitlines()
    answers = [json.loads(line)[kind] for line in triples for kind in ("harmful", "neutral")]
    answers += [json.loads(line)["response"] for line in (shared_data / "gsm8k/derived/retain.jsonl").open()]
    with open(shared_data / "dolly_mobile/data/databricks_dolly_15k.csv", newline="") as file:
        answers += [row["response"] for row in csv.DictReader(file)]
    gibberish = [answer for answer in answers if degenerate_kind(answer) == "gibberish"]
    assert len(answers) > 3000 and len(gibberish) * 1000 < len(answers), gibberish


@given(st.text(max_size=80), st.text(max_size=80))
def test_every_pair_of_texts_gets_one_kind_and_repeating_an_answer_ten_times_is_never_fine(answer, prompt) -> None:
    assert degenerate_kind(answer, prompt) in (None, "empty", "echo", "repetitive", "gibberish")
    if any(len(word) > 1 for word in answer.split()):
        assert degenerate_kind(" ".join([answer] * 10), prompt) is not None
