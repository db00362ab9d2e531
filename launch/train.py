"""Entry point of a training job for ``deepspeed``, ``torchrun``, ``srun`` and ``mpirun`` (or plain ``python``)."""

import sys

from wpn_ds.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
