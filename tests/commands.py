"""``wpn-ds`` on a rank of the pool."""

from __future__ import annotations

import sys
from typing import NoReturn

from wpn_ds import cli


def wpn_ds(*argv: str) -> NoReturn:
    """The command line ``wpn-ds ARGV...``, to its exit code."""
    sys.exit(cli.main(argv))
