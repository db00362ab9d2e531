#!/usr/bin/env bash
# slurm/array.sh MODEL 'FLAGS' 'FLAGS' ...: one run for each set of train flags, as an array job. For example
#     slurm/array.sh opt-1.3b '--seed 1' '--seed 2' '--wpn_scoring likelihood_ratio --wpn_pooling sum'
# Flags of sbatch stand before the model; --array=%2 lets two run at a time.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
set +eu # `module load` doesn't keep to it
# shellcheck source=/dev/null
[ ! -e "$here/cluster.env" ] || . "$here/cluster.env"
set -eu

sbatch_flags=() at_a_time=
while [[ ${1:-} == -* ]]; do
    case $1 in
    --array=%*) at_a_time=${1#--array=} ;;
    *) sbatch_flags+=("$1") ;;
    esac
    shift
done
if [ $# -lt 2 ] || [ ! -e "$here/$1.sh" ]; then
    echo "usage: slurm/array.sh [sbatch flags] MODEL 'FLAGS' 'FLAGS' ..." >&2
    exit 2
fi
model=$1
shift
WPN_SWEEP=$(printf '%s\n' "$@")
export WPN_SWEEP
sbatch --array="0-$(($# - 1))$at_a_time" --output=%x-%A-%a.log "${sbatch_flags[@]}" "$here/$model.sh"
