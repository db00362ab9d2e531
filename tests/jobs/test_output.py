"""The output folder: no file that is somebody else's is deleted, and no place is taken that can't be a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from wpn_ds.errors import UserError
from wpn_ds.jobs.output import claim_output, lock_output


@pytest.mark.parametrize("inside", ["", "runs/1"])
@pytest.mark.parametrize("target", ["link", "nowhere"])
def test_a_link_that_points_nowhere_is_no_output_folder(world, target, inside, tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(UserError, match=f"^--output_dir {link / inside}: the link {link} points to {target}, which is"):
        lock_output(link / inside, tmp_path, world)


def test_the_starting_models_folder_is_no_output_folder_by_any_of_its_names(world, tmp_path) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    model.mkdir()
    link.symlink_to("model")
    for name in (model, link, model / ".." / "model"):
        with pytest.raises(UserError, match="is the starting model's own folder"):
            lock_output(name, model, world)


def claim(output_dir: Path, model: str = "hub/model", *, resume: bool = False, overwrite: bool = True) -> None:
    claim_output(output_dir, Path(model), resume=resume, overwrite=overwrite)


def a_run(folder: Path) -> Path:
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "run.yaml").write_text("seed: 1\n")
    return folder


def test_links_in_an_old_run_go_and_what_they_lead_to_stays(tmp_path) -> None:
    kept, out = tmp_path / "kept", a_run(tmp_path / "out")
    (kept / "deep").mkdir(parents=True)
    (kept / "weights").write_text("mine")
    for name in ("runs", "checkpoint-9", "model.tmp"):
        (out / name).symlink_to(kept)
    (out / "model.safetensors").symlink_to(kept / "weights")
    (out / "checkpoint-3" / "deep").symlink_to(kept)
    (out / "DONE").symlink_to(tmp_path / "gone")
    claim(out)
    assert not list(out.iterdir()) and (kept / "weights").read_text() == "mine" and (kept / "deep").is_dir()


def test_a_link_for_an_output_folder_does_not_delete_the_run_that_it_leads_to(tmp_path) -> None:
    out, link = a_run(tmp_path / "run-12"), tmp_path / "latest"
    link.symlink_to(out)
    with pytest.raises(UserError, match=f"^--output_dir {link} is a link: name {out} itself if --overwrite"):
        claim(link)
    assert (out / "run.yaml").exists()
    claim(link, overwrite=False, resume=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "disk")
    claim(tmp_path / "empty")  # nothing to lose there


def test_a_starting_model_that_lies_in_the_old_run_is_not_deleted_with_it(tmp_path) -> None:
    out = a_run(tmp_path / "out")
    with pytest.raises(UserError, match=r"^--overwrite_output_dir would delete .*checkpoint-3, and the starting model"):
        claim(out, str(out / "checkpoint-3"))
    assert (out / "checkpoint-3").is_dir() and (out / "run.yaml").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_runs_folder_is_called_so_whatever_the_flags_say(tmp_path, overwrite) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=f"^--output_dir {tmp_path} is no run's folder, and has README.md of its own: "):
        claim(tmp_path, overwrite=overwrite)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_that_holds_a_run_is_not_taken_unasked(tmp_path) -> None:
    out = a_run(tmp_path / "out")
    with pytest.raises(UserError, match=f"^--output_dir {out} already holds a run: pass --resume_from_checkpoint auto"):
        claim(out, overwrite=False)
    assert (out / "run.yaml").exists()
