#!/usr/bin/env bash
# First process of a controller (`boot.sh controller`) or a node (`boot.sh node NAME NUMBER`), in namespaces of its own;
# cluster.py starts the former, which starts the latter. LAB, NODES, NET and SHARE come from the environment.
set -euo pipefail

# Our number in the namespace above, read before /proc is our own.
outside() { local key value; while read -r key value; do [ "$key" != Pid: ] || echo "$value"; done </proc/self/status; }

case $1 in
controller)
    mount --make-rprivate /
    outside >"$LAB/run/controller.pid"
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /run
    mount --bind "$LAB/etc/hosts" /etc/hosts
    hostname controller
    ip link set lo up
    ip link add bridge0 type bridge
    ip addr add "$NET.1/24" dev bridge0
    ip link set bridge0 up
    munged --force --socket="$LAB/munge/socket" --key-file="$LAB/munge/key" --pid-file="$LAB/munge/pid" \
        --log-file="$LAB/munge/log" --seed-file="$LAB/munge/seed"
    slurmctld -D &
    echo $! >"$LAB/run/slurmctld.pid"
    for number in $(seq 1 "$NODES"); do bash "$0" wire "node$number" "$number" & done
    while :; do
        sleep 3600 &
        wait $! || true
    done
    ;;
wire) # a cable from the bridge to a new network namespace, then the node
    ip netns add "$2" 2>/dev/null || true
    ip link del "port$3" 2>/dev/null || true
    ip link add "port$3" type veth peer name eth0 netns "$2"
    ip link set "port$3" master bridge0 up
    exec ip netns exec "$2" unshare --uts --ipc --mount --pid --fork --kill-child bash "$0" node "$2" "$3"
    ;;
node)
    mount --make-rprivate /
    outside >"$LAB/run/$2.pid"
    mount -t proc proc /proc
    # What a cluster shares is $SHARE; the rest of /tmp, /run and /dev/shm is the node's own, as PMIx needs it.
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    number=0
    for folder in $SHARE; do
        number=$((number + 1))
        mkdir -p "/run/share/$number"
        mount --bind "$folder" "/run/share/$number"
    done
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    number=0
    for folder in $SHARE; do
        number=$((number + 1))
        case $folder in /tmp/*)
            mkdir -p "$folder"
            mount --bind "/run/share/$number" "$folder"
            ;;
        esac
    done
    hostname "$2"
    ip link set lo up
    ip addr add "$NET.$((10 + $3))/24" dev eth0
    ip link set eth0 up
    mkdir -p "$LAB/spool/$2"
    exec slurmd -D -N "$2"
    ;;
esac
