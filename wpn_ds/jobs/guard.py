"""How a rank ends: with its exit code, at once where others may wait for it, and a user's mistake in one line."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import NoReturn

from wpn_ds.errors import UserError
from wpn_ds.jobs.distributed import shutdown
from wpn_ds.jobs.launchers import leave, tell
from wpn_ds.jobs.watchdog import let_it_end
from wpn_ds.system.files import refusal


def run_guarded(work: Callable[[], None]) -> NoReturn:
    """``work`` with a user's mistake as one line and its exit code; what is a defect keeps its traceback.

    Leaves at once in the case of an error: other ranks may wait in a collective that will never come.
    """
    try:
        try:
            work()
        except BaseException:
            let_it_end()
            raise
    except (UserError, OSError) as error:
        told = refusal(error) if isinstance(error, OSError) else error
        if told is None:
            traceback.print_exc()
            leave(1)
        tell(told, os.environ.get("RANK", "0"))
        leave(told.exit_code)
    except KeyboardInterrupt:
        leave(130)
    except BaseException:
        traceback.print_exc()
        leave(1)
    shutdown()
    leave(0)  # gloo's threads sometimes abort a process that ends by itself, after all is done
