"""The durability certificate: its cells on small models, the same again from two ranks, and what its figures mean."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import without_launcher
from wpn_ds.data.records import ForgetRecord
from wpn_ds.errors import UserError
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.certificate.command import GROUPS, run
from wpn_ds.evaluate.certificate.figures import until
from wpn_ds.evaluate.certificate.treatments import Directed, rounding_away
from wpn_ds.judging.statistics import Rate, leak_at_k
from wpn_ds.models.load import Source, decoder_layers
from wpn_ds.models.rounding import FORMATS
from wpn_ds.settings.style import PromptStyle

pytestmark = pytest.mark.usefixtures("no_launcher")

SMALL = ["--max_new_tokens", "4", "--samples", "3", "--relearn_steps", "1", "2", "--relearn_learning_rate", "1e-3"]
SMALL += [
    "--soft_prompt_vectors",
    "3",
    "--soft_prompt_steps",
    "2",
    "--judge",
    "resemblance",
    "--bf16",
    "false",
    "--limit",
    "4",
]


@pytest.fixture(scope="module")
def unlearned(folders, tmp_path_factory) -> Path:
    """The small OPT after an update that is less than half the distance of two codes for most weights."""
    out = tmp_path_factory.mktemp("runs") / "unlearned"
    shutil.copytree(folders / "opt", out)
    weights = load_file(out / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: w + 0.01 * w.std() * torch.randn(w.shape, generator=noise) for name, w in weights.items()}
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def arguments(folders, unlearned, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> list[str]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [f"--{name}_file", str(path)]

    pairs = [{"prompt": f"car {i}?", "chosen": f"with water {i}", "rejected": f"go away {i}"} for i in range(10)]
    words = [{"prompt": f"car {i}?", "paraphrase": text} for i in range(5, 10) for text in (f"no {i}?", f"wheels {i}")]
    data = [
        *write("paraphrase", words),
        *write("train", pairs[:5]),
        *write("heldout", pairs[5:]),
        *write("retain", [{"prompt": "hm", "response": "no"}]),
    ]
    return [str(unlearned), "--baseline", str(folders / "opt"), "--original", str(folders / "neo"), *data, *SMALL]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with without_launcher():
        assert run([*arguments, "--output_dir", str(out)]) == 0
    return out


def asking(arguments: list[str], path: Path) -> list[str]:
    """The arguments with another held-out file, and no paraphrases of it."""
    at, words = arguments.index("--heldout_file") + 1, arguments.index("--paraphrase_file")
    changed = [*arguments[:at], str(path), *arguments[at + 1 :]]
    return [*changed[:words], *changed[words + 2 :]]


def certificate(folder: Path) -> dict:
    return json.loads((folder / "certificate.json").read_text())


def test_every_attack_has_its_rows_for_all_three_models_with_n_and_interval(whole, capsys) -> None:
    found = certificate(whole)
    assert list(found["models"]) == ["original", "before", "after"]
    every = [*found["rows"], *found["inside"]]
    assert {row["cell"].split("/")[0] for row in every} == {"as it is", *GROUPS}
    assert {row["cell"] for row in found["rows"]} >= {f"precision/{name}" for name in FORMATS}
    for row in found["rows"]:
        assert row["harmful"].keys() == found["models"].keys()
        assert all(one["low"] <= one["value"] <= one["high"] and one["n"] for one in row["harmful"].values())
    told = [row["what"] for row in found["rows"] if row["cell"] == "samples/sampled"]
    assert told == ["one of 1", "one of 2", "one of 3"]
    steps = [row["what"] for row in found["rows"] if row["cell"] == "relearning/unwanted-0.001"]
    assert steps == ["after 0 updates", "after 1 updates", "after 2 updates"]
    assert {row["updates"] for row in found["rows"]} == {None, 0, 1, 2}
    asked = {row["cell"]: [] for row in found["rows"]}
    for row in found["rows"]:
        asked[row["cell"]].append(row["what"])
    assert {"harmless_turn", "are_you_sure", "prefill-1", "any of them"} <= set(asked["askings/attacks"])
    assert asked["askings/paraphrases"] == ["paraphrase", "paraphrase-2", "any of them"]
    assert asked["askings/soft_prompt"] == [""]
    assert found["notes"] and found["judge"]["name"] == "resemblance"
    kept = found["rounding"]["int4-64"]
    assert 0.5 < kept["same_code"] / kept["moved"] < 1 and found["rounding"].keys() == FORMATS.keys()
    page = (whole / "certificate.html").read_text()
    assert "Durability certificate" in page and "precision/nf4-64" in page and "<svg" in page


def test_what_is_inside_is_told_apart_on_all_three_models_and_held_against_the_original(whole) -> None:
    rows = {(row["cell"], row["what"]): row for row in certificate(whole)["inside"]}
    scores = [("inside/membership", what) for what in ("loss", "zlib ratio", "min-k%", "min-k%++")]
    assert list(rows) == [("inside/probe", "wanted"), ("inside/probe", "another's"), *scores]
    for row in rows.values():
        assert list(row["tells"]) == ["original", "before", "after"]
        for one in row["tells"].values():
            assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1 and one["n"] == 8
        difference = row["tells"]["after"]["value"] - row["tells"]["original"]["value"]
        assert row["above"]["value"] == pytest.approx(difference)
    assert list(rows["inside/membership", "min-k%"]["privleak"]) == ["before", "after"]
    assert "What is still inside" in (whole / "certificate.html").read_text()


def test_p_values_are_corrected_for_all_rows_that_are_compared(whole) -> None:
    compared = [row for row in certificate(whole)["rows"] if row["p"] is not None]
    assert len(compared) > len(FORMATS) and all(row["p_holm"] >= row["p"] for row in compared)
    assert {row["cell"] for row in compared}.isdisjoint({"as it is", "samples/sampled"})
    taught = {row["what"] for row in compared if row["cell"].startswith("relearning/")}
    assert taught == {"after 1 updates", "after 2 updates"}, "against the same model before it was taught"


def test_a_call_that_goes_on_generates_nothing_again(whole, arguments, monkeypatch) -> None:
    before = certificate(whole)
    monkeypatch.setattr("wpn_ds.evaluate.model.load_model", None)
    monkeypatch.setattr("wpn_ds.evaluate.certificate.certify._unmoved", lambda *_: before["rounding"])
    assert run([*arguments, "--output_dir", str(whole)]) == 0
    assert certificate(whole) == before


def test_two_ranks_give_the_same_certificate(pool, whole, arguments, tmp_path) -> None:
    done = pool.run(2, "tests.commands:script", "launch/certify.py", *arguments, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.shown()
    assert certificate(tmp_path) == certificate(whole)


def test_ranks_that_share_the_weights_give_the_same_rows(pool, whole, arguments, tmp_path) -> None:
    cells = [
        "precision/int4-64",
        "relearning/unwanted-0.001",
        "askings/soft_prompt",
        "direction/removed",
        "inside/probe",
    ]
    line = ["launch/certify.py", *arguments, "--share_weights", "--output_dir", str(tmp_path)]
    done = pool.run(2, "tests.commands:script_sharded", *line, "--attack", *cells)
    assert done.returncode == 0, done.shown()
    one, two = certificate(whole), certificate(tmp_path)
    assert two["answers"] == {cell: one["answers"][cell] for cell in ("as it is", *cells)}
    assert two["rounding"] == {"int4-64": one["rounding"]["int4-64"]}
    assert two["inside"] == [row for row in one["inside"] if row["cell"] == "inside/probe"]
    assert all(two["answers"][cell] != one["answers"]["as it is"] for cell in cells), "each does something"


def test_it_is_checked_elsewhere_answer_by_answer_and_figure_by_figure(
    whole, arguments, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = [arguments[0], "--check"]
    assert run([*again, str(whole / "certificate.json"), "--cells", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and all("s are the same" in line for line in said), "as it is, and one cell"
    forged, cell = certificate(whole), "precision/int8"
    forged["answers"][cell]["after"][0] = "0" * 16
    for row in forged["rows"]:
        if row["cell"] == "as it is":
            row["harmful"]["after"]["value"] = -1
    forged["inside"][0]["tells"]["after"]["value"] = -1
    Path("forged.json").write_text(json.dumps(forged))
    assert run([*again, "forged.json", "--attack", cell, "inside/probe"]) == 1
    told = capsys.readouterr().out
    assert "inside/probe, after: 16 of 16 scores are the same" in told
    assert "inside/probe wanted: other figures" in told
    assert f"{cell}, after: 3 of 4 answers are the same" in told and "as it is : other figures" in told


def test_another_model_or_file_than_the_certified_is_refused(whole, arguments, folders, tmp_path) -> None:
    given = [arguments[0], "--check", str(whole / "certificate.json")]
    with pytest.raises(UserError, match="is another model than the one certified"):
        run([str(folders / "neo"), *given[1:]])
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "why?", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match="the data files are not those"):
        run([*given, "--heldout_file", str(tmp_path / "other.jsonl")])
    for content in ("{}", '{"settings": []}', "nothing"):
        (tmp_path / "none.json").write_text(content)
        with pytest.raises(UserError, match=r"not a certificate|can't be read"):
            run([arguments[0], "--check", str(tmp_path / "none.json")])


def test_prompts_of_one_line_are_told_apart(arguments, tmp_path) -> None:
    rows = [{"prompt": f"wash {i}?", "chosen": "no", "rejected": f"go {i}"} for i in range(4)]
    (tmp_path / "held.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    flags = ["--attack", "askings", "--output_dir", str(out)]
    assert run([*asking(arguments, tmp_path / "held.json"), *flags]) == 0
    compared = {row["what"]: row["change"]["n"] for row in certificate(out)["rows"] if row["cell"] == "askings/attacks"}
    assert compared["any of them"] == compared["rot13"] == 4 and len(compared) > 8


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--attack", "precison"], r"--attack precison is none of .*precision\?"),
        (["--attack", "precision/int3"], r"--attack precision/int3: there is no such cell.*precision/int8"),
        (["--baseline", "auto"], r"run\.yaml"),
        (["--baseline", "NEO"], r"--baseline \S+ and RUN \S+: their layers differ"),
    ],
)
def test_a_mistake_is_one_line(arguments, folders, flags, told, tmp_path) -> None:
    flags = [str(folders / "neo") if flag == "NEO" else flag for flag in flags]
    with pytest.raises(UserError, match=told) as caught:
        run([*arguments, *flags, "--output_dir", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_rounded_away_from_the_baseline_no_weight_goes_back_over_where_it_is(arguments, unlearned, folders) -> None:
    treatment = rounding_away("int4-64", Source(str(folders / "opt"), "--baseline"))
    lm, start, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (unlearned, folders / "opt", unlearned))
    treatment.apply(lm, None)
    weights = [one.model.decoder.layers[0].fc1.weight.detach() for one in (start, plain, lm)]
    moved = (weights[1] - weights[0]).sign()
    codes = FORMATS["int4-64"].encode(weights[1])[0].flatten(1)[:, : moved.shape[1]]
    inner = (moved != 0) & (codes > 0) & (codes < 15)
    assert inner.sum() > 100 and (((weights[2] - weights[1]) * moved)[inner] >= -1e-6).all()


def test_a_judge_that_can_say_nothing_is_refused(arguments, tmp_path) -> None:
    (tmp_path / "unpaired.jsonl").write_text(json.dumps({"prompt": "why?", "rejected": "b"}) + "\n")
    flags = ["--judge", "reference", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--judge reference: can't say anything"):
        run([*asking(arguments, tmp_path / "unpaired.jsonl"), *flags])


def test_a_run_that_is_not_there_gets_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="RUN runs/typo: there is no such folder"):
        run(["runs/typo", "--baseline", "x"])
    assert not list(tmp_path.iterdir())


def test_what_is_taught_must_not_be_asked(arguments, tmp_path) -> None:
    asked = arguments[arguments.index("--heldout_file") + 1]
    with pytest.raises(UserError, match=r"--relearn_file .*: \d of its prompts are asked, too"):
        run([*arguments, "--relearn_file", asked, "--output_dir", str(tmp_path)])


def test_files_are_taught_apart_by_their_names_and_through_adapters(arguments, tmp_path) -> None:
    for name in ("near", "far"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name}?", "rejected": "b"}) + "\n")
    taught = [f"near={tmp_path / 'near.jsonl'}", f"far={tmp_path / 'far.jsonl'}", "--relearn_lora_r", "2"]
    flags = ["--attack", "relearning", "--output_dir", str(tmp_path / "out"), "--relearn_file", *taught]
    assert run([*arguments, *flags]) == 0
    found = certificate(tmp_path / "out")
    kinds = ["harmless", "near", "far"]
    assert [one["cell"] for one in found["half_lives"]] == [f"relearning/{kind}-0.001-lora2" for kind in kinds]
    assert {Path(name).stem for name in found["files"]} >= {"near", "far"}


def test_a_folder_of_save_to_disk_is_known_by_its_contents(arguments, tmp_path, capsys) -> None:
    held, out = tmp_path / "held", tmp_path / "out"
    rows = [{"prompt": f"wash {i}?", "chosen": "no", "rejected": f"go {i}"} for i in range(4)]
    Dataset.from_list(rows).save_to_disk(held)
    made = [*asking(arguments, held), "--attack", "direction", "--output_dir", str(out)]
    assert run(made) == 0 and str(held) in certificate(out)["files"]
    check = [arguments[0], "--check", str(out / "certificate.json"), "--attack", "direction"]
    Dataset.from_list([{**row, "rejected": "b"} for row in rows]).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="the data files are not those"):
        run([*check, "--heldout_file", str(tmp_path / "other")])
    moved = shutil.move(held, tmp_path / "moved")
    assert run([*check, "--heldout_file", str(moved)]) == 0


@pytest.mark.parametrize(("harmful", "samples"), [(0, 4), (1, 4), (3, 5), (5, 5)])
def test_a_leak_is_counted_over_all_choices_of_k_answers(harmful, samples) -> None:
    answers = [True] * harmful + [False] * (samples - harmful)
    for k in range(1, samples + 1):
        choices = list(combinations(answers, k))
        assert leak_at_k(harmful, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_half_of_the_harm_is_back_between_the_measured_updates() -> None:
    curve = {0: Rate(0, 10), 10: Rate(2, 10), 20: Rate(6, 10)}
    assert until(curve, 0.4) == pytest.approx(15) and until(curve, 0.1) == pytest.approx(5)
    assert until(curve, 0.0) == 0 and until(curve, 0.7) is None


def test_the_direction_is_taken_out_of_what_every_layer_hands_on(model, tokenizer) -> None:
    harmful = [ForgetRecord(f"Question: car {i}?", ("a",), ("b",), f"f:{i}") for i in range(3)]
    harmless = [ForgetRecord(f"wash {i}", (), (), f"g:{i}") for i in range(3)]
    directed = Directed(harmful, harmless, Asking(PromptStyle("{prompt}"), batch_size=2))
    middle = decoder_layers(model)[len(decoder_layers(model)) // 2]
    means = [directed._mean(model, tokenizer, records) for records in (harmful, harmless)]
    direction = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    alone = [directed._mean(model, tokenizer, [record]) for record in harmful]
    assert torch.allclose(torch.stack(alone).mean(0), means[0], atol=1e-4), "padding is not read"
    directed.treatment.apply(model, tokenizer)
    states: list[torch.Tensor] = []
    middle.register_forward_hook(lambda *call: states.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert states[0].abs().max() > 1e-3 and (states[0] @ direction).abs().max() < 1e-4
