#!/usr/bin/env bash
#SBATCH --job-name=opt-13b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# wpn-ds estimate --model opt-13b --nodes 2 --gpus_per_node 8 --bf16 true --gradient_checkpointing: 22.2 of 80 GiB a GPU

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/[^/ ]*\.sh\( .*\)\{0,1\}$||p;q}')/common.sh"
train "$root/launch/recipes/opt-13b.yaml" "$@"
