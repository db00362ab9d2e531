from __future__ import annotations

import subprocess
import sys

import pytest

from tests.evaluate.judges.cases import verdicts
from wpn_ds.errors import UserError
from wpn_ds.evaluate.judges import JUDGE_HELP, make_judges
from wpn_ds.judging.base import Verdict


def test_judges_come_in_the_given_order_called_by_their_flags(classifier, local, base) -> None:
    hf = f"hf:{classifier},threshold=0.7,input=pair,harmful=toxic"
    specs = [
        "phrases",
        hf,
        f"hf:{classifier}",
        f"local:{local},threshold=0.2",
        "reference",
        f"gen:{base},template=harmbench",
        "openai:small@http://h:1/v1",
    ]
    judges = make_judges(specs)
    assert [judge.name for judge in judges] == specs
    about = [judge.describe() for judge in judges]
    kinds = ["phrases", "classifier", "classifier", "local", "reference", "generative", "endpoint"]
    assert [one["judge"] for one in about] == kinds
    assert (about[1]["threshold"], about[1]["input"], about[1]["harmful"]) == (0.7, "pair", ["toxic"])
    assert (about[2]["threshold"], about[2]["input"]) == (0.5, "answer") and about[3]["threshold"] == 0.2
    assert (about[6]["model"], about[6]["url"]) == ("small", "http://h:1/v1")
    assert make_judges([]) == []


def test_resemblance_gets_the_texts_of_the_data() -> None:
    _, judge = make_judges(["phrases", "resemblance"], wanted=["happy to help"], unwanted=["go away"])
    assert verdicts(judge, "happy to help", "go away") == [Verdict.HARMLESS, Verdict.HARMFUL]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["phrase"], "--judge phrase: no such judge; did you mean phrases"),
        (["unitary/toxic-bert"], r"no such judge; known are reference, phrases, resemblance, hf:NAME"),
        (["phrases", "phrases"], "--judge phrases: is given twice"),
        (["phrases:strict"], "give it as phrases"),
        (["reference:"], "give it as reference"),
        (["hf"], "give it as hf:NAME"),
        (["hf:"], "give it as hf:NAME"),
        (["hf:x,treshold=0.3"], "no option 'treshold'; did you mean threshold"),
        (["hf:x,threshold=high"], "threshold must be between 0 and 1, not 'high'"),
        (["hf:x,threshold=1"], "threshold must be between 0 and 1"),
        (["hf:x,threshold=nan"], "threshold must be between 0 and 1"),
        (["hf:x,input=both"], "input must be answer or pair, not 'both'"),
        (["hf:x,harmful="], "harmful must name a label"),
        (["hf:x,input=pair,input=answer"], "input is given twice"),
        (["local:x,input=pair"], "no option 'input'; known are threshold, base"),
        (["local:x,base="], "base must name a model"),
        (["local:nowhere"], "--judge local:nowhere: there is no judge.json in it"),
        (["openai:@http://h/v1"], "names no model"),
        (["openai:m@h"], "'h' is no URL"),
    ],
)
def test_a_bad_judge_is_one_line_that_says_what_to_give(specs, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_judges(specs)
    assert "\n" not in str(error.value) and str(error.value).startswith("--judge ")


def test_all_are_checked_before_the_first_is_loaded() -> None:
    with pytest.raises(UserError, match="--judge phrase: "):
        make_judges(["hf:nowhere/at/all", "phrase"])


def test_the_help_shows_every_form() -> None:
    for form in ("reference", "phrases", "hf:NAME", "local:DIR", "gen:MODEL", "openai:MODEL"):
        assert form in JUDGE_HELP
    assert "\n" not in JUDGE_HELP and "%" not in JUDGE_HELP


def test_the_flags_help_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "sklearn", "scipy"}
    code = f"import sys, wpn_ds.evaluate.judges; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
