#!/usr/bin/env bash
# slurm/submit.sh MODEL [train flags]: training, then its evaluation and report, as two jobs of which the second waits.
# Flags of sbatch stand before the model: slurm/submit.sh --nodes=4 opt-6.7b --train_file forget.jsonl
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
set +eu # `module load` doesn't keep to it
# shellcheck source=/dev/null
[ ! -e "$here/cluster.env" ] || . "$here/cluster.env"
set -eu

sbatch_flags=() place=()
while [[ ${1:-} == -* ]]; do
    sbatch_flags+=("$1")
    case $1 in --partition=* | --account=* | --qos=* | --output=*) place+=("$1") ;; esac
    shift
done
model=${1:-}
if [ -z "$model" ] || [ ! -e "$here/$model.sh" ]; then
    echo "usage: slurm/submit.sh [sbatch flags] MODEL [train flags]" >&2
    echo "models: $(cd "$here" && echo opt-*.sh gpt-neo-*.sh | sed 's/\.sh//g')" >&2
    exit 2
fi
shift

run=
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --output_dir) next=$((i + 1)) && run=${!next:-} ;;
    --output_dir=*) run=${!i#*=} ;;
    esac
done
run=${run:-runs/$model-$(date +%Y%m%d-%H%M%S)}
case $run in \~/*) run=$HOME/${run#\~/} ;; esac # nothing writes it out in --output_dir=~/run
train=$(sbatch --parsable "${sbatch_flags[@]}" "$here/$model.sh" "$@" --output_dir "$run")
# Without --kill-on-invalid-dep it would wait for ever for a training that failed.
echo "training is job $train, in $run; wpn-ds status $run says how far it is"
if [ "$model" = opt-66b ]; then
    echo "no evaluation: the model does not fit one GPU" >&2
    exit 0
fi
evaluate=$(sbatch --parsable --dependency="afterok:${train%%;*}" --kill-on-invalid-dep=yes "${place[@]}" \
    "$here/evaluate.sh" "$run")
echo "evaluation is job $evaluate, which waits for it"
