# Sourced by the job scripts. One task a GPU, started by srun; rank and rendezvous come from Slurm's environment.
# What your cluster has of its own is in cluster.env (cluster.env.example says what there is).
# shellcheck shell=bash
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
say() { printf '[%s] %s\n' "$(date +%T)" "$*" >&2; }
fail() { say "error: $*"; exit 2; }

set +eu # `module load` doesn't keep to it
# shellcheck source=/dev/null
[ ! -e "$root/slurm/cluster.env" ] || . "$root/slurm/cluster.env"
set -eu
: "${PYTHON:=$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# home PATH: a ~ that no shell has written out, since it stood in quotation marks or behind --flag=
home() { case $1 in \~/*) printf '%s\n' "$HOME/${1#\~/}" ;; *) printf '%s\n' "$1" ;; esac; }
TORCH_EXTENSIONS_DIR=$(home "${TORCH_EXTENSIONS_DIR:-${WPN_SCRATCH:-$HOME/.cache}/wpn_ds/extensions}")
export TORCH_EXTENSIONS_DIR
case $PYTHON in */*) export PATH="${PYTHON%/*}:$PATH" ;; esac # ninja, for what DeepSpeed compiles
[ -z "${NCCL_SOCKET_IFNAME:-}" ] || export NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# The number of this job, or of this task of an array: one of its tasks has the number of the whole array.
job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
export WPN_JOB=$job

# shellcheck source-path=SCRIPTDIR source=spares.sh
. "$root/slurm/spares.sh"

# step PROGRAM ARGUMENTS...: one task a GPU over all nodes, or over step_nodes, in the container if there is one. Call
# it in a subshell, which srun then replaces: a signal to it is a signal to srun, and that hands USR1 to every task.
step() {
    local inside=() command=("$PYTHON" "$@") binding=() place=() nodes=$SLURM_JOB_NODELIST
    if [ "${#step_nodes[@]}" -gt 0 ]; then
        nodes=$(IFS=, && echo "${step_nodes[*]}")
        place=(--nodelist="$nodes" --nodes="${#step_nodes[@]}")
        place+=(--ntasks="$((${#step_nodes[@]} * SLURM_NTASKS_PER_NODE))")
        # Where a rank has ended before its peer's node was missed, Slurm (22.05) takes that step for running for ever,
        # and this one would wait for its resources. srun has seen all of its tasks end, but for those on lost nodes.
        place+=(--overlap)
    fi
    [ "${WPN_CPU_BIND:-}" = none ] || binding+=(--cpu-bind="${WPN_CPU_BIND:-cores}")
    [ "${WPN_MEM_BIND:-}" = none ] || binding+=(--mem-bind="${WPN_MEM_BIND:-local}")
    if [ -n "${WPN_PYXIS_IMAGE:-}" ]; then
        inside=(--container-image="$WPN_PYXIS_IMAGE" --container-mounts="${WPN_MOUNTS:-$root,$PWD}" --container-workdir="$PWD")
    elif [ -n "${WPN_APPTAINER_IMAGE:-}" ]; then
        command=(apptainer exec --nv --bind "${WPN_MOUNTS:-$root,$PWD}" "$WPN_APPTAINER_IMAGE" "${command[@]}")
    fi
    # Here, since containers have no scontrol.
    MASTER_ADDR=$(patiently scontrol show hostnames "$nodes" | sed -n 1p)
    export MASTER_ADDR
    # srun doesn't inherit --cpus-per-task. Without --kill-on-bad-exit the others would wait for a rank that died.
    exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${place[@]}" "${binding[@]}" \
        "${inside[@]}" "${command[@]}"
}

# patiently COMMAND...: again and again for five minutes, since slurmctld may be away for a while.
patiently() {
    local tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 30 ] || return 1
        sleep 10
    done
}

# of_this_job FILE: how many of its lines are about this job.
of_this_job() { if [ -e "$1" ]; then grep -cF "\"job\": \"$job\"" "$1" || true; else echo 0; fi; }

# requeue: this job goes back into the queue, and on from its newest checkpoint.
requeue() {
    say "requeueing: it goes on from its newest checkpoint"
    patiently scontrol requeue "$job"
}

# flag NAME DEFAULT ARGUMENTS...: the value, a path, that the arguments give to --NAME.
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
    home "$value"
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

# saved_by_this_job RUN: whether there is a checkpoint of this job's.
saved_by_this_job() { grep -qsF "\"job\": \"$job\"" "$1"/checkpoint-*[0-9]/trainer_state.json; }

# train RECIPE ARGUMENTS...: a training run that goes on after a signal, a crash or a lost node.
train() {
    local recipe=$1 lead limit
    shift
    told='' ended='' task=''
    trap 'told=1; say "USR1: a checkpoint, then this job goes back into the queue"; pass_on' USR1
    # Told TERM, srun would kill its tasks in the middle of their save.
    trap 'ended=1; say "TERM: a checkpoint if there is time"; pass_on' TERM
    pass_on() { [ -z "$task" ] || kill -USR1 "$task" || true; }

    if [ -n "${WPN_SWEEP:-}" ]; then # an array job: line number SLURM_ARRAY_TASK_ID of it has this task's flags
        local line words more=()
        line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" <<<"$WPN_SWEEP")
        # As a shell splits it, but for backslashes, which stay: \n in a template is a line break.
        words=$(tr '\134' '\1' <<<"$line" | xargs printf '%s\n' 2>&1 | tr '\1' '\134') ||
            fail "task $SLURM_ARRAY_TASK_ID: $line: $words"
        [ -z "$words" ] || readarray -t more <<<"$words"
        set -- "$@" ${more[@]+"${more[@]}"}
        say "task $SLURM_ARRAY_TASK_ID: $line"
    fi
    run=$(flag output_dir "runs/$SLURM_JOB_NAME-${job/_/-}" "$@")

    # A signal that comes as the job starts would requeue it for ever.
    lead=${WPN_SIGNAL_LEAD:-$(sed -n 's/^#SBATCH --signal=B:USR1@//p' "$0")}
    limit=$(seconds "$(patiently squeue --noheader --jobs "$job" --format=%l)")
    if [ -n "$limit" ] && [ "$limit" -le "$lead" ]; then
        fail "the time limit, $limit s, is no longer than the signal's lead, $lead s: raise --time, or lower" \
            "--signal=B:USR1@SECONDS and say so in WPN_SIGNAL_LEAD"
    fi
    export WPN_SIGNAL_LEAD=$lead # so that a save that takes too long for it is noticed

    keep_spares
    one_start "$recipe" "$@"
    while again_in_this_job "$run"; do one_start "$recipe" "$@"; done
    requeue
}

# one_start RECIPE ARGUMENTS...: one step of train. Ends the job if the run is done or nothing is gained by another.
one_start() {
    local recipe=$1 before after log_size code=0 resume=(--resume_from_checkpoint auto) given=() idle="$run/idle.jsonl"
    shift
    # What the user says of the start is for the first one; from this job's first checkpoint on, the newest counts.
    before=$(of_this_job "$run/starts.jsonl")
    while [ $# -gt 0 ]; do
        local word=$1 value=''
        shift
        case ${1:-} in --* | '') ;; *) value=$1 && shift ;; esac
        case $word in
        --overwrite_output_dir*)
            [ "$before" -eq 0 ] || continue # it has been done
            case $word$value in *false) ;; *) resume=() ;; esac
            ;;
        --resume_from_checkpoint*)
            ! saved_by_this_job "$run" || continue
            resume=()
            ;;
        esac
        given+=("$word")
        [ -z "$value" ] || given+=("$value")
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do # flags with several values
            given+=("$1")
            shift
        done
    done
    # Of this job's last start; others' are not ours to delete. REQUEUE the next start reads, and deletes.
    [ "$before" -eq 0 ] || rm -f "$run"/{DONE,FAILED}

    watch_this_node
    log_size=$(stat -Lc %s /proc/self/fd/2)
    (step "$root/launch/train.py" --deepspeed "$root/ds_configs/zero3.json" --config "$recipe" --output_dir "$run" \
        "${given[@]}" "${resume[@]}") &
    task=$!
    [ -z "$told$ended" ] || pass_on # a signal that came before there was a step
    while :; do
        wait "$task" && code=0 || code=$?
        kill -0 "$task" 2>/dev/null || break # it was a signal of our own that ended the wait
    done
    task=''

    # Files tell how it ended. srun's exit code doesn't: it has been 0 with a task that never started.
    what_failed "$log_size"
    after=$(of_this_job "$run/starts.jsonl")
    if [ "$after" -gt 0 ] && [ -e "$run/DONE" ]; then
        say "done: $run"
        exit 0
    elif [ "$after" -gt 0 ] && [ -e "$run/FAILED" ]; then
        fail "$(cat "$run/FAILED") (see above; nothing is gained by starting this job again)"
    elif [ -n "$ended" ]; then
        say "stopped: to go on, sbatch the same with --output_dir $run and without --overwrite_output_dir"
        exit 143
    elif [ "$after" -gt "$before" ]; then # the program itself refuses a third start from the same step
        [ -e "$run/REQUEUE" ] || say "the step ended without a word (exit code $code)"
        rm -f "$idle"
    elif { [ -n "$failed_node" ] || { [ -n "$told" ] || [ "$before" -gt 0 ]; } && [ "$code" -ne 2 ]; } &&
        [ "$(of_this_job "$idle")" -lt 2 ]; then
        say "training did not start (exit code $code): once more, a node may be bad"
        mkdir -p "$run"
        printf '{"job": "%s", "nodes": "%s"}\n' "$job" "$SLURM_JOB_NODELIST" >>"$idle"
    else
        fail "training did not start (exit code $code)"
    fi
}
