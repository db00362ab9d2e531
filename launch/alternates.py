"""``wpn-ds alternates`` for ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun``; the same flags."""

import sys

from wpn_ds.cli import launched

if __name__ == "__main__":
    sys.exit(launched("alternates", sys.argv[1:]))
