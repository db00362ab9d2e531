"""Entry point of a training job for the ``deepspeed`` launcher (or plain ``python`` for one process)."""

import sys

from wpn_ds.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
