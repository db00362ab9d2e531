from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.evaluate.judges.conftest import Server, make_judge
from tests.evaluate.recall.conftest import write_rwku
from tests.evaluate.tofu.conftest import write_tofu
from tests.interface import check_report
from tests.launching import free_port, launch
from wpn_ds.errors import UserError
from wpn_ds.evaluate import answering, evaluation
from wpn_ds.evaluate import ranks as meeting
from wpn_ds.evaluate.answering import Asking
from wpn_ds.evaluate.command import run
from wpn_ds.evaluate.judges import local
from wpn_ds.evaluate.measurement import Measurement, Plan
from wpn_ds.evaluate.tofu.task import ANSWER_TOKENS
from wpn_ds.models.load import Source

pytestmark = pytest.mark.usefixtures("no_launcher")

IN_DISTRIBUTION = ["--suite", "in_distribution,retain"]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> list[str]:
    forget = [{"prompt": f"car {i}?", "chosen": f"with water {i}", "rejected": f"go away {i}"} for i in range(4)]
    return [
        "--train_file",
        write(tmp_path / "train.jsonl", forget),
        "--retain_file",
        write(tmp_path / "keep.jsonl", [{"prompt": "hm", "response": "no"}, {"text": "plain text"}]),
    ]


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_a_model_and_its_baseline_are_evaluated_and_reported(folders, files, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(folders / "opt"), "--baseline", str(folders / "neo"), "--output_dir", str(out), *files]
    assert run([*arguments, *IN_DISTRIBUTION, "--max_new_tokens", "5", "--limit", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed
    found = report(out)
    assert set(found["suites"]) == set(found["baseline"]["suites"]) == {"train"}
    assert found["suites"]["train"]["n"] == found["baseline"]["suites"]["train"]["n"] == 3
    check_report(found, "suites.*", "suites.*.answers[]", "changes.*", "retain", "judges[]", "settings")
    assert found["retain"]["n"] == 2 and found["retain_perplexity_ratio"] > 0
    assert found["settings"]["prompts_a_suite"] == 3 and found["utility"] == {}
    assert [judge["judge"] for judge in found["judges"]] == ["reference", "phrases", "resemblance"]


def test_every_suite_is_asked_by_default_and_what_is_not_there_is_noted(folders, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(folders / "opt"), "--output_dir", str(out), "--max_new_tokens", "2", "--limit", "2"]
    run([*arguments, "--relearn_steps", "1", "--samples", "2", "--utility", "dialogue"])
    found = report(out)
    names = {name.partition("/")[0] for name in found["suites"]}
    assert names == {"train", "heldout", "attack", "over_refusal", "toxicity", "diversity", "relearning"}
    assert {"relearning/0", "relearning/1", "attack/base64", "attack/few_shot"} <= set(found["suites"])
    begun = [found["suites"][f"attack/prefill-{tokens}"] for tokens in (1, 2, 4, 8)]
    assert all(suite["n"] == suite["words_back"]["n"] == 2 for suite in begun)
    assert found["depth"]["unwanted"][0]["n"] == found["depth"]["wanted"][0]["n"] == 2
    printed = capsys.readouterr().out
    assert "attack/prefill-8" in printed and "words of the unwanted rest that come back" in printed
    assert "unwanted answers, NLL at token" in printed and "11+" in printed
    assert found["suites"]["diversity"]["seeds"] == [0, 1] and found["suites"]["diversity"]["n"] == 4
    assert found["suites"]["over_refusal"]["kind"] == "benign" and found["baseline"] is None
    check_report(found, "suites.*", "suites.*.always_harmless", "suites.*.words_back", "suites.*.answers[]", "depth")
    assert any("advbench" in note for note in found["notes"]) and any("dialogue" in note for note in found["notes"])


def test_finished_prompts_are_kept_and_other_judges_cost_no_answers(folders, files, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(folders / "opt"), "--output_dir", str(out), *files, *IN_DISTRIBUTION]
    arguments += ["--max_new_tokens", "5", "--batch_size", "1"]
    asked: list[str] = []
    generate = answering.generate

    def counted(model, tokenizer, prompts, **settings) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(generate(model, tokenizer, prompts, **settings))
        return asked[-1:]

    monkeypatch.setattr(answering, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(arguments)
    assert not (out / "report.json").exists()
    first, asked[:] = list(asked), []
    monkeypatch.setattr(answering, "generate", lambda *a, **s: asked.extend(generate(*a, **s)) or asked[-1:])
    run(arguments)
    assert len(first) == len(asked) == 2
    whole = report(out)["suites"]
    run([*arguments, "--judge", "phrases"])
    assert len(asked) == 2 and set(report(out)["suites"]["train"]["judges"]) == {"phrases"}
    alone = tmp_path / "alone"
    run([str(alone) if part == str(out) else part for part in arguments])
    assert report(alone)["suites"] == whole


def test_prompts_without_a_long_enough_unwanted_answer_are_left_out_and_none_at_all_is_refused(
    folders, tmp_path, capsys
) -> None:
    rows = [{"prompt": "car?", "chosen": "with water", "rejected": "no"}]
    rows += [{"prompt": "bike?", "chosen": "with water", "rejected": "go away"}]
    flags = ["--model", str(folders / "opt"), "--heldout_file", write(tmp_path / "held.jsonl", rows)]
    flags += ["--max_new_tokens", "3", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"^--suite attack/prefill-8: no unwanted answer has more tokens than"):
        run([*flags, "--suite", "heldout,attack/prefill-8"])
    assert run([*flags, "--suite", "attack/prefill"]) == 0
    found = report(tmp_path / "out")
    assert {name: suite["n"] for name, suite in found["suites"].items()} == {
        "attack/prefill-1": 2,
        "attack/prefill-2": 2,
        "attack/prefill-4": 1,
    }
    notes = [note for note in found["notes"] if "prefill" in note]
    assert len(notes) == 2 and "attack/prefill-8: 0 of 2 prompts have an unwanted answer of more than 8" in notes[1]
    assert found["settings"]["first_prompt"].startswith("Question: car?\nAnswer: ")


def test_judges_load_on_rank_0_alone_after_the_answers_are_there(folders, files, tmp_path, monkeypatch) -> None:
    make_judge(tmp_path / "judge", folders / "opt")
    arguments = ["--model", str(folders / "opt"), "--output_dir", str(tmp_path / "out"), *files, "--suite", "train"]
    arguments += ["--max_new_tokens", "5", "--judge", f"local:{tmp_path / 'judge'}"]
    events: list[str] = []
    generate, load_weights = answering.generate, local.load_file
    monkeypatch.setattr(answering, "generate", lambda *a, **s: events.append("answers") or generate(*a, **s))
    monkeypatch.setattr(local, "load_file", lambda path: events.append("judge") or load_weights(path))
    assert run(arguments) == 0 and events == ["answers", "judge"]
    events.clear()
    monkeypatch.setattr(evaluation, "join_ranks", lambda *_: (1, 2))
    for module in (evaluation, meeting):
        monkeypatch.setattr(module, "all_arrived", lambda size: None)
        monkeypatch.setattr(module, "from_rank_0", lambda rank, size, work: work())
    assert run(arguments) == 0 and events == []


def test_a_hub_s_model_that_was_updated_is_another_one(hub, folders, tmp_path) -> None:
    addresses, places = [], []
    for model, commit in (("opt", "a" * 40), ("neo", "b" * 40)):
        hub.publish("org/small", folders / model, commit)
        part = Measurement("after", Source("org/small", "--model"), Plan(tmp_path / "answers", Asking()))
        addresses.append(part.address)
        places.append(part._folder)
        assert part._model.source.revision == commit, "all that is loaded is of this commit"
    assert addresses == [f"org/small@{letter * 40}" for letter in "ab"] and places[0] != places[1]
    local = Measurement("after", Source(str(folders / "opt")), Plan(tmp_path / "answers", Asking()))
    assert local.address == str(folders / "opt")


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    yield made
    made.stop()


def test_a_judge_that_is_not_understood_ends_the_evaluation_in_a_line_and_leaves_no_report(
    folders, files, tmp_path, capsys, server
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(folders / "opt"), "--output_dir", str(out), *files, "--suite", "in_distribution"]
    arguments += ["--max_new_tokens", "5", "--judge", f"openai:m@{server.url}"]
    for reply in (None, "<think>\nOkay, let me see what", ""):
        server.respond = lambda said, reply=reply: (200, reply)
        with pytest.raises(UserError, match=r"^--judge openai:m@http.*of its \d+ replies were unusable") as caught:
            run(arguments)
        assert "\n" not in str(caught.value) and [path.name for path in out.iterdir()] == ["answers"]
    server.respond = lambda said: (200, "Verdict: HARMLESS")
    server.refuse = lambda body: (400, {"error": "Unsupported: max_tokens"}) if "max_tokens" in body else None
    assert run(arguments) == 0
    figures = report(out)["suites"]["train"]
    assert figures["harmless_rate"] == 1 - figures["degenerate_rate"] > 0 and figures["unusable"] == 0


def test_two_ranks_report_what_one_reports(pool, folders, files, tmp_path) -> None:
    flags = ["--model", str(folders / "opt"), "--baseline", str(folders / "neo"), *files, "--max_new_tokens", "6"]
    flags += ["--suite", "train,attacks,depth,retain,relearning,diversity", "--batch_size", "3", "--relearn_steps", "1"]
    flags += ["--tofu_dir", str(write_tofu(tmp_path / "tofu")), "--rwku_dir", str(write_rwku(tmp_path / "All"))]
    for ranks in (1, 2):
        out = ["--output_dir", str(tmp_path / str(ranks))]
        done = pool.run(ranks, "tests.commands:script", "launch/evaluate.py", *flags, *out)
        assert done.returncode == 0, done.shown()
    one, two = (report(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one["settings"].pop("ranks") == 1 and two["settings"].pop("ranks") == 2
    assert [one["suites"][f"attack/{name}"]["n"] for name in ("role_play", "prefill-8")] == [4, 4]
    assert one["tofu"]["sets"]["forget"]["n"] == 5 and one["recall"]["rouge"]["rwku/forget_level3"]["n"] == 3
    assert one == two
    logs = [(tmp_path / str(ranks) / "tofu.json").read_text(encoding="utf-8") for ranks in (1, 2)]
    assert logs[0] == logs[1]


def test_ranks_that_share_the_weights_report_what_one_rank_reports(pool, folders, files, tmp_path) -> None:
    flags = ["--model", str(folders / "opt"), *files, "--max_new_tokens", "6", "--batch_size", "3", "--bf16", "false"]
    flags += ["--suite", "train,attack/role_play,attack/are_you_sure,depth,retain,diversity,relearning"]
    flags += ["--relearn_steps", "1", "--tofu_dir", str(write_tofu(tmp_path / "tofu"))]
    for ranks, more in ((1, []), (2, ["--share_weights"])):
        out = ["--output_dir", str(tmp_path / str(ranks))]
        done = pool.run(ranks, "tests.commands:script", "launch/evaluate.py", *flags, *more, *out)
        assert done.returncode == 0, done.shown()
    one, two = (report(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one["settings"].pop("ranks") == 1 and two["settings"].pop("ranks") == 2
    assert one["suites"]["train"]["n"] == 4 and one["retain"]["tokens"] > 5 and one == two
    by_rank = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "2" / "answers").rglob("rank-*"))]
    assert len(by_rank) == 2 and all(by_rank), "both took part"


@pytest.mark.distributed
def test_a_mistake_that_both_ranks_make_is_one_line_in_a_shell(folders, files, tmp_path) -> None:
    line = ["launch/evaluate.py", "--model", str(folders / "opt"), *files, "--output_dir", str(tmp_path)]
    wrong = launch(2, [*line, "--suite", "nonsense"], port=free_port())
    assert wrong.returncode == 2 and wrong.stdout.count("error: --suite nonsense") == 1, wrong.stdout


def test_the_template_of_the_training_run_is_used_unless_one_is_given(folders, files, tmp_path, capsys) -> None:
    trained = shutil.copytree(folders / "opt", tmp_path / "trained")
    (trained / "run.yaml").write_text('prompt_template: "Q {prompt} A"\n', encoding="utf-8")
    (trained / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n{"step": 2, "loss/total": 1.5}\n')
    out = tmp_path / "out"
    arguments = ["--model", str(trained), "--output_dir", str(out), *files, *IN_DISTRIBUTION, "--max_new_tokens", "2"]
    templates = []
    for more in ([], ["--prompt_template", "Hm {prompt}\\n"]):
        run([*arguments, *more])
        templates.append(report(out)["settings"]["prompt_template"])
    assert templates == ["Q {prompt} A", "Hm {prompt}\n"]
    assert "loss/total" in (out / "report.html").read_text(encoding="utf-8")


def test_a_models_own_data_are_the_default(folders, files, tmp_path) -> None:
    trained, out = tmp_path / "trained", tmp_path / "out"
    shutil.copytree(folders / "opt", trained)
    train, keep = files[1], files[3]
    (trained / "run.yaml").write_text(f"train_file: [{train}]\nretain_file: [{keep}]\nvalidation_file: [{train}]\n")
    arguments = ["--model", str(trained), "--output_dir", str(out), "--max_new_tokens", "2", "--limit", "2"]
    arguments += IN_DISTRIBUTION
    run(arguments)
    settings = report(out)["settings"]
    asked = {"train": [train], "heldout": [train], "retain": [keep], "benign": "embedded", "open": "embedded"}
    assert settings["files"] == asked
    (trained / "run.yaml").write_text(f"dataset_name: {tmp_path / 'gone'}\ntrain_file: []\nbf16: true\n")
    with pytest.raises(UserError, match=r"^--dataset_name .*gone --dataset_split train: can't be loaded"):
        run(arguments)


def test_the_baseline_of_a_run_is_the_model_that_it_started_from(tmp_path, monkeypatch) -> None:
    seen: list[tuple[str, str, str | None]] = []

    class Stop(Exception):
        pass

    def measurement(label, source, plan):
        seen.append((label, source.name_or_path, source.revision))
        if label == "after":
            raise Stop

    monkeypatch.setattr(evaluation, "Measurement", measurement)
    trained = tmp_path / "runs" / "demo" / "unlearned"
    folder = tmp_path / ("a very long folder's name " * 6 + '"quoted": #1')
    planted = trained.parent / "planted"
    for place in (trained, folder, planted):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").touch()
    arguments = ["--model", str(trained), "--baseline", "auto", "--output_dir", str(tmp_path / "o"), "--suite", "train"]
    with pytest.raises(
        UserError, match=r"^--baseline auto: .*run.yaml, .* is not there: name the model that it starte"
    ):
        run(arguments)
    (trained / "run.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"^--baseline auto: .*run.yaml, .* has no model_name_or_path"):
        run(arguments)
    for settings in ({"model_name_or_path": str(folder)}, {"model_name_or_path": "hub/m", "model_revision": "v2"}):
        (trained / "run.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(Stop):
            run(arguments)
        assert seen[-2:] == [
            ("before", settings["model_name_or_path"], settings.get("model_revision")),
            ("after", str(trained), None),
        ]
    (trained / "run.yaml").write_text("model_name_or_path: null\n")  # the demo's
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # whatever was planted in the project's folder
    with pytest.raises(UserError, match=r"^--baseline runs/demo/planted"):
        run(arguments)
    (planted / "PLANTED").touch()
    with pytest.raises(Stop):
        run(arguments)
    assert seen[-2][1] == str(planted)


@pytest.mark.parametrize("flag", ["--model", "--baseline"])
def test_a_missing_model_is_refused_in_one_line_before_anything_runs(folders, files, tmp_path, flag) -> None:
    places = {"--model": str(folders / "opt"), "--baseline": str(folders / "neo"), flag: str(tmp_path / "none")}
    arguments = [part for pair in places.items() for part in pair]
    with pytest.raises(UserError, match=f"^{flag} .*none: there is no such folder$"):
        run([*arguments, "--output_dir", str(tmp_path / "out"), *files])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no config"):
        run([*arguments, "--output_dir", str(tmp_path / "out"), *files])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_or_too_many_are_refused(folders, files, tmp_path) -> None:
    for change, problem in (
        ("lacks", "1 weights not in the files.*fc1.bias"),
        ("more", "1 weights in the files but not.*extra"),
    ):
        hurt = shutil.copytree(folders / "opt", tmp_path / change)
        weights = load_file(hurt / "model.safetensors")
        if change == "lacks":
            del weights["model.decoder.layers.1.fc1.bias"]
        else:
            weights["model.decoder.extra"] = weights["model.decoder.layers.1.fc1.bias"].clone()
        save_file(weights, hurt / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=problem):
            run(["--model", str(hurt), "--output_dir", str(tmp_path / "out"), *files])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt_template", "hm"], "--prompt_template must be auto, or a text with one {prompt} in it, got 'hm'"),
        (["--suite", "advbench"], "--suite advbench: .*--data_dir"),
        (["--suite", "hedout"], "did you mean heldout"),
        (["--judge", "refrence"], "did you mean reference"),
        (["--suite", "over_refusal", "--judge", "reference"], "--suite over_refusal: no judge of reference can say"),
        (["--suite", "toxicity", "--judge", "phrases"], "--suite toxicity: no judge of phrases can say"),
        (["--suite", "utility,train", "--utility", "dialogue"], "--suite utility: none of its tasks"),
        (["--max_new_tokens", "95"], "has only 96 positions"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_generated(folders, files, tmp_path, flags, message) -> None:
    start = ["--model", str(folders / "opt"), "--output_dir", str(tmp_path / "out"), *files]
    with pytest.raises(UserError, match=message) as caught:
        run([*start, *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_help_says_how_long_answers_are_without_a_flag(capsys) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"(default: {answering.Asking.max_new_tokens}, and {ANSWER_TOKENS} in the suite tofu)" in told
