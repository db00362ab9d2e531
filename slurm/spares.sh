# Sourced by common.sh. With WPN_SPARE_NODES=K a training step runs on all of the job's nodes but K. When one ends badly
# the next one starts in the same allocation, without the queue, and leaves out the node that the last one failed on.
# shellcheck shell=bash

step_nodes=() # those of the next step; none in a job without spares, whose steps run on all
blamed=' '    # nodes that a step failed on, the last one last
watch=''      # the process of watch_this_node
# One task beside what else runs on a node; --nodelist=NODE PROGRAM follows.
beside=(srun --overlap --quiet --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1)

# keep_spares: choose the nodes of the first step.
keep_spares() {
    local nodes wanted
    [ "${WPN_SPARE_NODES:-0}" -gt 0 ] || return 0
    readarray -t nodes < <(patiently scontrol show hostnames "$SLURM_JOB_NODELIST")
    wanted=$((${#nodes[@]} - WPN_SPARE_NODES))
    [ "$wanted" -gt 0 ] || fail "WPN_SPARE_NODES=$WPN_SPARE_NODES leaves none of ${#nodes[@]} nodes to train on:" \
        "sbatch --no-kill --nodes=N, where N is the script's own number and the spares"
    step_nodes=("${nodes[@]:0:wanted}")
    say "trains on ${step_nodes[*]}, with ${nodes[*]:wanted} in reserve"
}

# again_in_this_job RUN: whether the next step can start in this allocation; step_nodes are its nodes then. Of those in
# order the ones come first that nothing failed on, then those that failed longest ago.
again_in_this_job() {
    local run=$1 node fit ranking='' chosen
    [ "${#step_nodes[@]}" -gt 0 ] && [ -z "$told$ended" ] && [ ! -e "$run/REQUEUE" ] || return 1
    [ -z "$failed_node" ] || blamed="${blamed/ $failed_node / }$failed_node "
    fit=" $(nodes_in_order | paste -sd ' ' -) "
    for node in $fit; do [[ $blamed == *" $node "* ]] || ranking+=" $node"; done
    for node in $blamed; do [[ $fit != *" $node "* ]] || ranking+=" $node"; done
    read -ra chosen <<<"$ranking"
    if [ "${#chosen[@]}" -lt "${#step_nodes[@]}" ]; then
        say "$cause; in order are$fit: too few for the step"
        return 1
    fi
    ranking=" ${chosen[*]:0:${#step_nodes[@]}} "
    step_nodes=() # in Slurm's order, in which it numbers the tasks: the ranks meet on the first
    for node in $fit; do [[ $ranking != *" $node "* ]] || step_nodes+=("$node"); done
    export WPN_AGAIN=$((${WPN_AGAIN:-0} + 1)) # so that the folder's lock is known to be a former step's
    [ ! -d "$run" ] || echo "$cause" >"$run/RESTART" # for wpn-ds status
    say "$cause: on in this job, on ${step_nodes[*]}"
}

# nodes_in_order: this job's nodes, in Slurm's order, that are neither down nor draining, and that answer.
nodes_in_order() {
    local nodes node answer
    nodes=$(patiently squeue --noheader --jobs "$SLURM_JOB_ID" --format=%N) # without those that Slurm took away
    answer=$(
        for node in $(sinfo --noheader --Node --nodes="$nodes" --format='%N %t' | sed -E '/ (d|fail)/d; s/ .*//'); do
            timeout --kill-after=5 30 "${beside[@]}" --nodelist="$node" echo "$node" 2>/dev/null &
        done
        wait
    )
    scontrol show hostnames "$nodes" | grep -xF "$answer"
}

# what_failed LOG_SIZE: sets failed_node and cause, by what srun and the ranks have told in this job's log since it had
# that size; failed_node is empty if they name none.
what_failed() {
    failed_node='' cause=''
    [ "${#step_nodes[@]}" -gt 0 ] || return 0
    local said name='([A-Za-z0-9._-]+)'
    local task="srun: error: $name: tasks? "
    # Exit code 2 is a user's mistake, 5 a rank's whose watchdog spoke, and neither is the fault of its node.
    said=$(tail -c "+$(($1 + 1))" /proc/self/fd/2 | tr '\r' '\n' | grep -aE 'srun: error|no progress for|--exclude=' |
        grep -v 'exit code [25]$' || true)
    named() { # PATTERN [2]: sets failed_node to the first node that it finds; with 2 only if there isn't a second
        failed_node=$(sed -nE "s/.*$1.*/\\1/p" <<<"$said" | awk '!seen[$0]++')
        [ "$(wc -l <<<"$failed_node")" -lt "${2:-99999}" ] || failed_node=''
        failed_node=${failed_node%%$'\n'*}
        [ -n "$failed_node" ]
    }
    if named "Node failure on $name"; then
        cause="$failed_node was lost"
    elif named "sbatch --exclude=$name"; then
        cause="$failed_node is unfit"
    elif named "failed on node $name"; then
        cause="$failed_node started no task"
    elif [[ $said == *'no progress for'* ]]; then
        # A rank that is stopped doesn't speak. Of those that do, it is the only one that doesn't wait for another.
        said=$(grep -vE "task ($(sed -nE 's/.*rank ([0-9]+): no progress.*/\1/p' <<<"$said" | paste -sd '|')): " <<<"$said")
        named "$task" || named "not in a collective \\($name\\)" 2 || true
        cause="a rank hung${failed_node:+ on $failed_node}"
    else
        said=$(grep -v ': Terminated$' <<<"$said" || true) # that is by srun, since another one has ended
        cause='the step ended without a word'
        ! named "$task" || cause="a rank died on $failed_node"
    fi
}

# watch_this_node: a task on another node that requeues the job once this one, with the batch shell, is lost. Told
# --no-kill, Slurm would leave the job's other nodes to it until the time limit, and nothing would run there.
watch_this_node() {
    local node
    [ "${#step_nodes[@]}" -gt 0 ] || return 0
    [ -z "$watch" ] || ! kill -0 "$watch" 2>/dev/null || return 0
    node=$(scontrol show hostnames "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%N)" |
        grep -vxF "$SLURMD_NODENAME" | sed -n '$p' || true)
    [ -n "$node" ] || return 0
    # shellcheck disable=SC2016 # these are the task's own
    "${beside[@]}" --nodelist="$node" bash -c 'while sleep 10; do
        read -r head nodes < <(squeue --noheader --jobs "$SLURM_JOB_ID" --format="%B %N")
        [ -z "$head" ] || scontrol show hostnames "$nodes" | grep -qxF "$head" || scontrol requeue "$0"
    done' "$WPN_JOB" </dev/null >/dev/null 2>&1 &
    watch=$!
}
