#!/usr/bin/env bash
# slurm/tensorboard.sh RUN [RUN...]: TensorBoard on this login node, for you alone, and how to reach it from your desk.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
set +eu # `module load` doesn't keep to it
# shellcheck source=/dev/null
[ ! -e "$here/cluster.env" ] || . "$here/cluster.env"
set -eu
: "${PYTHON:=$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}"

[ $# -gt 0 ] || { echo "usage: slurm/tensorboard.sh RUN [RUN...]" >&2; exit 2; }
spec=
for run in "$@"; do
    [ -d "$run/runs" ] || { echo "error: $run/runs is not there: name the --output_dir of a run" >&2; exit 2; }
    spec+="${spec:+,}$(basename "$run"):$run/runs"
done
port=${PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
echo "on your own machine: ssh -N -L 6006:localhost:$port ${USER:-$(id -un)}@$(hostname -f 2>/dev/null || hostname)"
echo "then open http://localhost:6006   (Ctrl-C ends it)"
exec "$PYTHON" -m tensorboard.main --logdir_spec "$spec" --host localhost --port "$port"
