"""A run's model on the Hugging Face hub: weights or adapter, tokenizer, card and report, and no other file of it.

The token is huggingface_hub's own: HF_TOKEN, or that of ``hf auth login``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from wpn_ds.errors import UserError
from wpn_ds.system.secrets import without_secrets

#: What may leave the machine, by the names in the folder; its checkpoints, logs, data and settings stay.
_MODEL = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
_BESIDE = ("README.md", "report.html", "report.json", "*/report.html", "*/report.json")


class Unreached(UserError):
    """The hub doesn't answer, or this process may not ask it."""


def chosen(folder: Path) -> list[str]:
    """The files of ``folder`` that are pushed.

    Raises:
        UserError: there is no model among them.
    """
    code = "*.py"  # of a model that brings its own
    patterns = (*_MODEL, *_TOKENIZER, code, *_BESIDE)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in found):
        raise UserError(f"{folder} holds no model: name the --output_dir of a run that ended well")
    return [path.relative_to(folder).as_posix() for path in found]


def prepare(repo: str) -> None:
    """Make the repository, private, unless it is there.

    Raises:
        Unreached: the hub doesn't answer.
        UserError: no token, one that may not write there, or a name that can't be one.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(f"--push_to_hub {repo}: nobody is logged in: hf auth login, or set HF_TOKEN")
    with _told(repo):
        HfApi().create_repo(repo, private=True, exist_ok=True)


def push(folder: Path, repo: str) -> str:
    """Upload what :func:`chosen` names, in one commit; returns the model's address. Raises as :func:`prepare` does."""
    from huggingface_hub import HfApi

    files = chosen(folder)
    prepare(repo)
    with _told(repo):
        done = HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="Upload by wpn_ds"
        )
    return str(done.repo_url)


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
    """Around a request: its errors in one line, without the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version has
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        said = without_secrets(" ".join((error.server_message or str(error)).split()))[:300]
        if code >= 500:
            raise Unreached(f"--push_to_hub {repo}: {constants.ENDPOINT} answers {code}: {said}") from None
        advice = ": the token needs the right to write there" if code in (401, 403) else ""
        raise UserError(f"--push_to_hub {repo}: refused with {code}: {said}{advice}") from None
    except ValueError as error:  # the repository's name, or the card's own header
        raise UserError(f"--push_to_hub {repo}: {' '.join(str(error).split())}") from None
    except (http_error, OSError, RuntimeError) as error:  # the last from hf_xet, which carries large files
        said = without_secrets(" ".join(str(error).split()))[:300]
        raise Unreached(f"--push_to_hub {repo}: {constants.ENDPOINT} isn't reached: {said}") from None
