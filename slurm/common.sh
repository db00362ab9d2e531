# Sourced by the job scripts. One task a GPU, started by srun; rank and rendezvous come from Slurm's environment.
# What your cluster has of its own is in cluster.env (cluster.env.example says what there is).
# shellcheck shell=bash
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
say() { printf '[%s] %s\n' "$(date +%T)" "$*" >&2; }
fail() { say "error: $*"; exit 2; }

# shellcheck source=/dev/null
[ ! -e "$root/slurm/cluster.env" ] || . "$root/slurm/cluster.env"
: "${PYTHON:=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${WPN_SCRATCH:-$HOME/.cache}/wpn_ds/extensions}"
PATH="$(dirname "$PYTHON"):$PATH" # ninja, for what DeepSpeed compiles
export PATH
[ -z "${NCCL_SOCKET_IFNAME:-}" ] || export NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# step PROGRAM ARGUMENTS...: one task a GPU over all nodes, in the container if there is one.
step() {
    local inside=() command=("$PYTHON" "$@") binding=()
    [ "${WPN_CPU_BIND:-}" = none ] || binding+=(--cpu-bind="${WPN_CPU_BIND:-cores}")
    [ "${WPN_MEM_BIND:-}" = none ] || binding+=(--mem-bind="${WPN_MEM_BIND:-local}")
    if [ -n "${WPN_PYXIS_IMAGE:-}" ]; then
        inside=(--container-image="$WPN_PYXIS_IMAGE" --container-mounts="${WPN_MOUNTS:-$root,$PWD}" --container-workdir="$PWD")
    elif [ -n "${WPN_APPTAINER_IMAGE:-}" ]; then
        command=(apptainer exec --nv --bind "${WPN_MOUNTS:-$root,$PWD}" "$WPN_APPTAINER_IMAGE" "${command[@]}")
    fi
    # srun doesn't inherit --cpus-per-task. Without --kill-on-bad-exit the others would wait for a rank that died.
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${binding[@]}" "${inside[@]}" "${command[@]}"
}

# starts RUN: how often this run was started so far.
starts() { if [ -e "$1/starts.jsonl" ]; then wc -l <"$1/starts.jsonl"; else echo 0; fi; }

# flag NAME DEFAULT ARGUMENTS...: the value that the arguments give to --NAME.
flag() {
    local name=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "--$name") value=${2:-$value} ;;
        "--$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

# seconds D-HH:MM:SS: what squeue calls a time, in seconds; nothing if it is unlimited.
seconds() {
    local time=$1 days=0 part total=0
    case $time in *[!0-9:-]* | '') return ;; esac
    case $time in *-*) days=${time%%-*} time=${time#*-} ;; esac
    local IFS=:
    for part in $time; do total=$((total * 60 + 10#$part)); done
    echo $((days * 86400 + total))
}

# train RECIPE ARGUMENTS...: a training run that goes on after a signal, a crash or a lost node.
train() {
    local recipe=$1 lead limit started
    shift
    if [ -n "${WPN_SWEEP:-}" ]; then # an array job: line number SLURM_ARRAY_TASK_ID of it has this task's flags
        local more
        more=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" <<<"$WPN_SWEEP")
        # shellcheck disable=SC2086 # several words
        set -- "$@" $more
        say "task $SLURM_ARRAY_TASK_ID: $more"
    fi
    run=$(flag output_dir "runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}" "$@")

    # A signal that comes as the job starts would requeue it for ever.
    lead=${WPN_SIGNAL_LEAD:-$(sed -n 's/^#SBATCH --signal=B:USR1@//p' "$0")}
    limit=$(seconds "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%l)")
    if [ -n "$limit" ] && [ "$limit" -le "$lead" ]; then
        fail "the time limit, $limit s, is no longer than the signal's lead, $lead s: raise --time, or lower" \
            "--signal=B:USR1@SECONDS and say so in WPN_SIGNAL_LEAD"
    fi

    export WPN_SIGNAL_LEAD=$lead # so that a save that takes too long for it is noticed

    started=$(starts "$run")
    rm -f "$run"/{DONE,REQUEUE,FAILED} # of an earlier start
    told=
    trap 'told=1; say "USR1: a checkpoint, then this job goes back into the queue"; kill -USR1 "$task" 2>/dev/null || true' USR1
    trap 'say "TERM: a checkpoint if there is time"; kill -TERM "$task" 2>/dev/null || true' TERM
    step "$root/launch/train.py" --deepspeed "$root/ds_configs/zero3.json" --config "$recipe" --output_dir "$run" \
        --resume_from_checkpoint auto "$@" &
    task=$!
    local code=0
    while :; do
        wait "$task" && code=0 || code=$?
        kill -0 "$task" 2>/dev/null || break # it was a signal of our own that ended the wait
    done

    # These files tell how it ended. srun's exit code doesn't: it has been 0 with a task that never started.
    if [ -e "$run/DONE" ]; then
        say "done: $run"
    elif [ -e "$run/FAILED" ]; then
        fail "$(cat "$run/FAILED") (see above; nothing is gained by starting this job again)"
    elif [ -e "$run/REQUEUE" ] && [ -z "$told" ]; then
        say "stopped: sbatch the same again to go on"
        exit 143
    elif [ -e "$run/REQUEUE" ] || [ "$(starts "$run")" -gt "$started" ]; then
        [ -e "$run/REQUEUE" ] || say "the step ended without a word (exit code $code)"
        say "requeueing: it goes on from its newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    else
        fail "training did not start (exit code $code)"
    fi
}
