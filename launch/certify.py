"""``wpn-ds certify`` for ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun``; the same flags."""

import sys

from wpn_ds.cli import main

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank=", "--local-rank="))]  # the launcher's own
    sys.exit(main(["certify", *arguments]))
