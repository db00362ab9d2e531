"""``wpn-ds select`` for ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun``; the same arguments.

A file ``select.py`` would stand in for Python's own module of that name in every program of this folder.
"""

import sys

from wpn_ds.cli import launched

if __name__ == "__main__":
    sys.exit(launched("select", sys.argv[1:]))
