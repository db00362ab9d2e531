"""README.md and the pages of docs/: their command lines parse, their links and paths lead somewhere, their tables stand
in one place, and they can be read in a terminal."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from tests.engine.test_families import FAMILIES
from wpn_ds.cli import main
from wpn_ds.data.embedded import recipe
from wpn_ds.errors import UserError
from wpn_ds.settings import parse
from wpn_ds.settings.run import parse_args

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
WIDTH, README_LINES = 120, 220

UNKNOWN = "--zzzzzz"
"""A flag that no module has: a command line with it is parsed, and goes no further than the error that names it."""

OF_OTHERS = {"--hostfile", "--master_port", "--exclude", "--no-kill", "--shm-size", "--logdir"}
"""Flags of deepspeed, sbatch, docker and TensorBoard that the text speaks of."""

MADE = {"benchmarks/results.json", "benchmarks/real.json", "slurm/cluster.env"}
"""Files that a user or a command makes."""

OWN = "ipo.py:IPO"
"""The objective in the first code block of its page, as a command line there names it."""

SHELL = {"source", ".", "cp", "export", "pre-commit"}
"""Programs whose command lines are not looked at."""


def shown(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def names(pages: list[Path]) -> list[str]:
    return [shown(page) for page in pages]


def fences(page: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced code block."""
    for found in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE):
        yield found[1], found[2]


def prose(page: str) -> str:
    """The page without its fenced code blocks."""
    return re.sub(r"^ *```\w*\n.*?^ *```$", "", page, flags=re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """The inline code of a page, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def commands(page: str) -> list[str]:
    """The command lines of a page's shell blocks, without comments; lines that a backslash continues are one.

    A here-document is the input of its command, not more commands.
    """
    found: list[str] = []
    for language, content in fences(page):
        if language in ("sh", "bash"):
            text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", content.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
            words = (shlex.split(line, comments=True) for line in text.splitlines())
            found += [shlex.join(line) for line in words if line]
    return found


def slugs(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    counted: Counter[str] = Counter()
    anchors = set()
    for title in plain:
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{counted[slug]}" if counted[slug] else slug)
        counted[slug] += 1
    return anchors


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures, those of HTML and of references too."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(page))
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE) + re.findall(r'(?:src|href)="([^"]+)"', text)


def tables(page: str) -> list[tuple[str, ...]]:
    """The header and the first two rows of each table, whatever the width of its cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()
        )
        found.append(tuple("|".join(cells) for cells in (header, *rows[:2])))
    return found


def cut_at_unknown(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails unless ``call``, of a command line with UNKNOWN as its last flag, finds that one wrong and no other."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(call())
    said = capsys.readouterr().err
    wrong = said.strip().splitlines()[-1] if said.strip() else ""
    assert ended.value.code == 2 and wrong.endswith(f"unrecognized arguments: {UNKNOWN}"), wrong


class Parsed(Exception):
    """A command line was read, and nothing begun."""


def check_ours(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless ``wpn-ds`` takes the command line."""

    def build(*arguments: object) -> None:
        built(*arguments)
        raise Parsed

    built = parse.build
    with monkeypatch.context() as patched, contextlib.suppress(Parsed):
        patched.setattr(parse, "build", build)
        code = main(words)
        raise AssertionError(f"exit code {code}: {capsys.readouterr().err}")


def check_train(flags: list[str]) -> None:
    """As a rank reads them: values, recipes and what doesn't go together; data and model need not be there."""
    if OWN in flags:
        assert re.search(r"^class IPO\(", (ROOT / "docs/own-objective.md").read_text(), re.MULTILINE)
        flags = [flag.replace(OWN, "dpo") for flag in flags]
    if "--deepspeed" in flags:
        require(flags[flags.index("--deepspeed") + 1])
    if parse_args(flags).model.model_name_or_path is None:
        parse_args(flags, base=recipe())


def require(path: str) -> None:
    assert (ROOT / path).exists(), f"{path} is not there"


def check(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command line of a page is not one."""
    program, *words = shlex.split(command)
    if ">" in words:
        words = words[: words.index(">")]
    if program == "wpn-ds":
        if words[0] == "train":
            check_train(words[1:])
        else:
            check_ours(words, capsys, monkeypatch)
    elif program == "deepspeed":
        job = runner.parse_args(words)
        check_launched(job.user_script, job.user_args, capsys, monkeypatch)
    elif program == "sbatch":
        known = set(re.findall(r"^#SBATCH (--[\w-]+)", "".join(p.read_text() for p in slurm_scripts()), re.MULTILINE))
        while words[0].startswith("--"):
            flag = words.pop(0).split("=")[0]
            assert flag in known | OF_OTHERS, f"sbatch has no {flag} in any script"
        check_slurm(words[0], words[1:], capsys, monkeypatch)
    elif program in ("slurm/submit.sh", "slurm/array.sh"):
        require(program)
        script, flags = f"slurm/{words[0]}.sh", words[1:]
        for line in flags if program == "slurm/array.sh" else [shlex.join(flags)]:
            check_slurm(script, shlex.split(line), capsys, monkeypatch)
    elif program == "slurm/tensorboard.sh":
        require(program)
    elif program == "make":
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name in (word.split("=")[0] for word in words if "=" in word):
            assert f"$({name})" in (ROOT / "Makefile").read_text(), f"no variable {name}"
    elif program == "python" and words[:1] == ["-m"]:
        check_module(words[1], words[2:], capsys, monkeypatch)
    elif program == "python" and words:
        check_launched(words[0], words[1:], capsys, monkeypatch)
    elif program != "python":
        assert program in SHELL, f"{program}: what a page may start is looked at"


def slurm_scripts() -> list[Path]:
    return sorted((ROOT / "slurm").glob("*.sh"))


def check_launched(
    script: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script of launch/ with its flags."""
    require(script)
    if script == "launch/train.py":
        check_train(flags)
    else:
        check_ours([Path(script).stem, *flags], capsys, monkeypatch)


def check_slurm(
    script: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job script with the flags that it adds by itself (slurm/common.sh)."""
    require(script)
    if script == "slurm/evaluate.sh":
        run, *more = flags
        check_ours(["evaluate", "--model", run, "--output_dir", run, *more], capsys, monkeypatch)
    else:
        own = ["--deepspeed", "ds_configs/zero3.json", "--config", f"launch/recipes/{Path(script).stem}.yaml"]
        check_train([*own, "--output_dir", "runs/job", *flags])


def check_module(
    name: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m name``."""
    assert importlib.util.find_spec(name) is not None, f"no module {name}"
    if name == "pytest":
        for path in (word for word in flags if "/" in word):
            require(path)
    elif flags:
        module = importlib.import_module(f"{name}.__main__" if (ROOT / name).is_dir() else name)
        monkeypatch.setattr(sys, "argv", [name, *flags, UNKNOWN])
        cut_at_unknown(module.main, capsys)


COMMANDS = [(shown(page), command) for page in PAGES for command in commands(page.read_text())]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_line_of_a_page_is_one(page, command, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes and JSON files are named from there
    try:
        check(command, capsys, monkeypatch)
    except UserError as error:
        pytest.fail(f"{page}: {command}: {error}")


RUN = "--deepspeed ds_configs/zero3.json --output_dir x"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("wpn-ds evalute --model x --output_dir y", "did you mean evaluate"),
        ("wpn-ds evaluate --model x --output_dir y --heldout_fil z", "did you mean --heldout_file"),
        ("wpn-ds evaluate --model x --output_dir y z", "unexpected argument 'z'"),
        ("wpn-ds estimate --model opt-125m --gpus_per_node many", "--gpus_per_node must be a whole number"),
        ("wpn-ds select hardest --model x --train_file y --output z", "--baseline is missing"),
        (f"wpn-ds train {RUN} --wpn_pooling media", "--wpn_pooling must be one of"),
        ("deepspeed --number 2 launch/train.py", "unrecognized arguments: --number"),
        (f"deepspeed launch/train.py {RUN} --seeed 2", "--seeed"),
        ("deepspeed launch/train.py --deepspeed ds_configs/zero9.json --output_dir x", "zero9.json is not there"),
        (f"deepspeed launch/train.py {RUN} --config launch/recipes/opt.yaml", "opt.yaml: No such file"),
        (f"deepspeed launch/train.py {RUN} --objective npo --wpn_pooling mean", "--wpn_pooling is a flag of wpn"),
        (f"deepspeed launch/trian.py {RUN}", "launch/trian.py is not there"),
        ("deepspeed launch/evaluate.py --output_dir x", "--model is missing"),
        ("sbatch --node=2 slurm/opt-125m.sh", "sbatch has no --node"),
        ("sbatch slurm/opt-126m.sh", "slurm/opt-126m.sh is not there"),
        ("sbatch slurm/opt-125m.sh --train_fil x", "--train_fil"),
        ("sbatch slurm/evaluate.sh run --suit quick", "did you mean --suite"),
        ("slurm/submit.sh opt-125m --train_fil x", "--train_fil"),
        ("slurm/array.sh opt-125m '--seed 1' '--seed one'", "--seed must be a whole number"),
        ("make dmeo", "No rule to make target 'dmeo'"),
        ("make bench ONYL=main", "no variable ONYL"),
        ("python -m benchmark", "no module benchmark"),
        ("python -m benchmarks --onyl main", "--onyl main"),
        ("python -m benchmarks.tofu --tofu_dir x --alternates y", "required: --fluency"),
        ("python -m pytest tests/dta", "tests/dta is not there"),
        ("python launch/trian.py", "launch/trian.py is not there"),
        ("rm -r runs", "rm: what a page may start is looked at"),
    ],
)
def test_a_command_line_that_is_none_is_seen(command, said, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, AssertionError, SystemExit)) as refused:
        check(command, capsys, monkeypatch)
    assert said in str(refused.value) + capsys.readouterr().err


@cache
def help_of(*words: str) -> str:
    """What ``wpn-ds`` prints with ``words`` and --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if words[:1] == ("train",):  # which would take over this process's signals
            parse_args([*words[1:], "--help"])
        else:
            assert main([*words, "--help"]) == 0, words
    return printed.getvalue()


def flags_in(helped: str) -> set[str]:
    """The flags at the beginning of a help's lines, not those that its sentences name."""
    heads = re.findall(r"^ {2}(-.*?)(?: {2}|$)", helped, re.MULTILINE)
    return {flag for head in heads for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", head)}


@cache
def subcommands(command: str) -> tuple[str, ...]:
    """Of ``wpn-ds judge``: train and measure."""
    found = re.search(rf"^usage: wpn-ds {command} \{{([\w,]+)\}}", help_of(command))
    return tuple(found[1].split(",")) if found else ()


@cache
def known_flags() -> frozenset[str]:
    """The flags of all commands of ours, and of the launcher."""
    found = set(re.findall(r"^  ([\w-]+)  ", help_of(), re.MULTILINE))
    assert {"train", "evaluate", "judge"} <= found
    calls = [(command, *more) for command in found for more in ([()] + [(name,) for name in subcommands(command)])]
    calls += [("train", "--objective", path.stem) for path in (ROOT / "launch/recipes/objectives").glob("*.yaml")]
    texts = [help_of(*words) for words in calls]
    texts += [
        importlib.import_module(f"benchmarks.{name}").parser().format_help()
        for name in ("gpu", "tofu", "real", "scale", "saves")
    ]
    ours = {flag for text in texts for flag in flags_in(text)}
    headers = "".join(path.read_text() for path in slurm_scripts())
    ours |= set(re.findall(r"^#SBATCH (--[\w-]+)", headers, re.MULTILINE))
    return frozenset(ours | {"--num_accelerators", "--num_gpus"} | OF_OTHERS)


@pytest.mark.parametrize("page", names(PAGES))
def test_a_flag_that_the_text_names_is_one(page) -> None:
    named = {flag for span in spans((ROOT / page).read_text()) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert named <= known_flags(), f"no command has {sorted(named - known_flags())}"


@pytest.mark.parametrize("page", names(PAGES))
def test_a_command_that_the_text_names_is_one(page) -> None:
    for span in spans((ROOT / page).read_text()):
        program, *words = span.split()
        if program == "wpn-ds" and words:
            known = subcommands(words[0])  # fails for a command that isn't one
            second = words[1].split(",") if len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]) else []
            assert not known or set(second) <= set(known), span
        elif program == "make" and words:
            done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{span}: {done.stderr}"


@pytest.mark.parametrize("page", names(PAGES))
def test_a_path_that_the_text_names_is_there(page) -> None:
    folders = "benchmarks|docs|ds_configs|launch|slurm|tests|wpn_ds"
    for span in spans((ROOT / page).read_text()):
        for path in re.findall(rf"(?<![\w/.~])(?:{folders})/[\w./-]*[\w/]", span):
            placeholder = re.search(r"\b(MODEL|NAME)\b", path)
            assert placeholder or path in MADE or (ROOT / path).exists(), f"{path} is not there"


@pytest.mark.parametrize("page", names(PAGES))
def test_an_extra_that_the_text_installs_is_one(page) -> None:
    named = set(re.findall(r"pip install '\.\[(\w+)\]'", (ROOT / page).read_text()))
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert named <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere in the repository; addresses of the web are not asked."""
    wrong = []
    for link in links(text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target == page or (target.is_relative_to(ROOT) and target.exists())
        if not inside or (anchor and anchor not in slugs(text if target == page else target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", names(LINKED))
def test_links_and_anchors_lead_somewhere(page) -> None:
    path = ROOT / page
    assert broken(path, path.read_text()) == []


def test_a_link_that_leads_nowhere_is_seen() -> None:
    text = """# A title, `code` and more
[a](#a-title-code-and-more) [b](#a-title) [c](docs/nothing.md) [d](docs/evaluation.md#suites) [e][ref]
[f](docs/evaluation.md#nothing) ![g](docs/nothing.png) <img src="docs/none.png"> [web](https://a.b/c#d) `[no](link)`

[ref]: LICENCE
"""
    wrong = [
        "#a-title",
        "docs/nothing.md",
        "docs/evaluation.md#nothing",
        "docs/nothing.png",
        "LICENCE",
        "docs/none.png",
    ]
    assert broken(ROOT / "README.md", text) == wrong


def test_every_page_is_reached_from_the_readme() -> None:
    listed = {link.partition("#")[0] for link in links((ROOT / "README.md").read_text())}
    assert {shown(page) for page in PAGES[1:]} <= listed


def test_no_table_stands_in_two_places() -> None:
    found = Counter(table for page in PAGES for table in tables(page.read_text()))
    assert len(found) > 5, "the pages have tables"
    assert [table for table, times in found.items() if times > 1] == []


def test_a_table_is_known_again_in_other_widths() -> None:
    one, other = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n", "|a|b|\n| --- | :-: |\n|1|  2|\n| 3 | 4 |\n| 5 | 6 |\n"
    assert tables(f"{one}\ntext\n\n{other}")[0] == tables(other)[0] != tables(other.replace("3", "7"))[0]


def test_the_table_of_families_has_those_that_are_held_against_fp64() -> None:
    section = (ROOT / "docs/big-models.md").read_text().split("## Families")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(["opt", "gpt_neo", *FAMILIES])


@pytest.mark.parametrize("page", names(LINKED))
def test_no_line_is_wider_than_a_page(page) -> None:
    lines = (ROOT / page).read_text().splitlines()
    wide = [number for number, line in enumerate(lines, start=1) if len(line) > WIDTH and not line.startswith("|")]
    assert wide == [], "only a row of a table can't be broken"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
