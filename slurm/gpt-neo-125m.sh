#!/usr/bin/env bash
#SBATCH --job-name=gpt-neo-125m
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# wpn-ds estimate --model gpt-neo-125m --nodes 1 --gpus_per_node 1 --bf16 false: 7.5 of 80 GiB a GPU

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/[^/ ]*\.sh\( .*\)\{0,1\}$||p;q}')/common.sh"
train "$root/launch/recipes/gpt-neo-125m.yaml" "$@"
