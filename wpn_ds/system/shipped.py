"""launch/, ds_configs/ and slurm/: those of the working folder, or else those that came with the package.

They stand at the top of a clone; a wheel has them in ``wpn_ds/shipped`` (pyproject.toml puts them there).
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("slurm", "ds_configs", "launch")
_BEGINNINGS = [(name,) for name in FOLDERS]


def root() -> Path:
    """The folder that holds what came with the package: in a wheel, or the clone that it is installed from."""
    package = Path(__file__).parents[1]
    in_a_wheel = package / "shipped"
    return in_a_wheel if in_a_wheel.is_dir() else package.parent


def shipped(path: str) -> str:
    """``path``, or if it is not there the file of that name that came with the package: ds_configs/zero3.json is found
    from every working folder."""
    ours = root() / path
    return str(ours) if Path(path).parts[:1] in _BEGINNINGS and not Path(path).exists() and ours.exists() else path
