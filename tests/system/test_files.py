"""Files: their modes, their encoding, what a kill leaves, and what is said of a disk."""

from __future__ import annotations

import ast
import errno
import os
import re
import stat
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from wpn_ds.system import files
from wpn_ds.system.files import NoRoom, cache_folder, filled, home, refusal, remove_abandoned, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_get_the_mode_that_the_umask_gives(tmp_path, umask) -> None:
    assert mode(write_atomically(tmp_path / "text", "a")) == 0o666 & ~umask
    with filled(tmp_path / "model", last="config.json") as partial:
        (partial / "weights").touch(mode=0o600)  # as safetensors does
        (partial / "config.json").touch()
    assert {mode(path) for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


def test_folders_are_moved_with_what_is_in_them_in_place_of_older_ones(tmp_path) -> None:
    """transformers writes the templates of a tokenizer that has several to a folder."""
    for text in ("old", "new"):
        with filled(tmp_path / "model", last="config.json") as partial:
            (partial / "additional_chat_templates").mkdir()
            (partial / "additional_chat_templates" / text).touch(mode=0o600)
            (partial / "config.json").touch()
    (kept,) = (tmp_path / "model" / "additional_chat_templates").iterdir()
    assert kept.name == "new" and mode(kept) == mode(tmp_path / "model" / "config.json")
    assert kept.parent.stat().st_mode & 0o100, "a folder that nobody can enter"


def test_a_models_weights_are_readable_like_its_other_files(tiny, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wpn_ds.engine.export import _write_model

    lm, tokenizer = (kind.from_pretrained(tiny / "opt") for kind in (AutoModelForCausalLM, AutoTokenizer))
    _write_model(lm, tokenizer, lm.state_dict(), tmp_path, {})
    assert (tmp_path / "model.safetensors").exists()
    assert len({mode(path) for path in tmp_path.iterdir()}) == 1


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = write_atomically(tmp_path / "text", "é\udc80")
    assert path.read_text(encoding="utf-8") == "é\\udc80"

    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "é\\udc80" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_after_a_day_and_nothing_else(tmp_path) -> None:
    def old(path: Path, hours: float = 25) -> None:
        os.utime(path, (time.time() - hours * 3600,) * 2)

    for name, file_hours, hours in (("a0", 25, 25), ("a1", 1, 1), ("a2", 1, 25)):  # the last is still written to
        folder = tmp_path / f"bank-{name}.host.1.tmp"
        folder.mkdir()
        (folder / "rows.npy").touch()
        old(folder / "rows.npy", file_hours)
        old(folder, hours)
    for name in (".status.json.0123abcd.tmp", "thesis.tmp", ".thesis.tmp"):
        (tmp_path / name).touch()
        old(tmp_path / name)
    assert [path.name for path in remove_abandoned(tmp_path)] == [".status.json.0123abcd.tmp"]
    assert [path.name for path in remove_abandoned(tmp_path, r"bank-.*tmp")] == ["bank-a0.host.1.tmp"]
    left = {"bank-a1.host.1.tmp", "bank-a2.host.1.tmp", "thesis.tmp", ".thesis.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOSPC, 4, "/out/f: No space left on device: make room"),
        (errno.EDQUOT, 4, "/out/f: Disk quota exceeded: make room"),
        (errno.EACCES, 2, "/out/f: Permission denied: mend its permissions, or name another place"),
        (errno.EROFS, 2, "/out/f: Read-only file system: name another place"),
        (errno.ENOTDIR, 2, "/out/f: Not a directory: remove what is in the place of a folder, or name another place"),
    ],
)
def test_what_is_said_of_a_disk_is_true_and_has_its_exit_code(number, code, said) -> None:
    told = refusal(OSError(number, os.strerror(number), "/out/f"))
    assert told is not None and str(told) == said and told.exit_code == code
    assert isinstance(told, NoRoom) == (code == 4)
    assert refusal(OSError(errno.ECONNRESET, "Connection reset by peer")) is None


@pytest.fixture
def homeless(monkeypatch, tmp_path) -> Path:
    """A user without a name or a home, as in a container that is started with a number."""

    def none(cls) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(none))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    for name in ("WPN_DS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    return tmp_path / f"wpn_ds-{os.getuid()}"


def test_without_a_home_there_is_a_folder_of_ones_own(homeless, monkeypatch) -> None:
    assert cache_folder() == homeless / ".cache" / "wpn_ds"
    assert os.environ["HOME"] == str(homeless) and mode(homeless) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/wpn_ds")


def test_somebody_elses_folder_is_no_home(homeless, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    homeless.symlink_to(tmp_path / "other")
    with pytest.raises(files.UserError, match="is somebody else's: set HOME to a folder of yours"):
        home()


def without_encoding(source: str) -> list[int]:
    """Lines that open a text file in whatever encoding the locale has."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        name = called.rpartition(".")[2]
        if not isinstance(node, ast.Call) or called in ("os.open", "_OPENER.open", "socket.fdopen"):
            continue
        values = (*node.args, *(keyword.value for keyword in node.keywords))
        told = [value.value for value in values if isinstance(value, ast.Constant)]
        modes = [value for value in told if isinstance(value, str) and re.fullmatch(r"[rwaxbt+]{1,3}", value)]
        binary = any("b" in mode for mode in modes) or (name.endswith("TemporaryFile") and not modes)
        opens = name in ("open", "fdopen", "read_text", "write_text", "FileHandler") or name.endswith("TemporaryFile")
        if opens and not binary and all(keyword.arg != "encoding" for keyword in node.keywords):
            lines.append(node.lineno)
    return sorted(lines)


def test_text_files_are_utf8_whatever_the_locale() -> None:
    source = "p.open('a')\np.read_text()\nopen(p)\nopen('x', 'rb')\nopen(p, encoding='utf-8')\nTemporaryFile('w+')"
    assert without_encoding(source) == [1, 2, 3, 6]
    found = {
        str(path.relative_to(ROOT)): lines
        for folder in ("wpn_ds", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := without_encoding(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_the_cache_is_in_the_home_folder_that_a_tilde_means(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WPN_DS_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
