#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch slurm/evaluate.sh RUN [flags of wpn-ds evaluate]: report.json and report.html of a run, in its folder. Without
# files among the flags: on what it was trained with. One GPU must hold the model; more of them share the prompts:
# sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh RUN. Requeued, it goes on with the prompts that are left.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s|/[^/ ]*\.sh\( .*\)\{0,1\}$||p;q}')/common.sh"
run=$(home "${1:?usage: sbatch slurm/evaluate.sh RUN [flags of wpn-ds evaluate]}")
shift
[ -e "$run/DONE" ] || fail "$run has no DONE: its training has not ended well"
output=$(flag output_dir "$run" "$@")
rm -f "$output/report.json"
(step "$root/launch/evaluate.py" --model "$run" --baseline auto --output_dir "$run" "$@")
[ -s "$output/report.json" ] || fail "no report in $output"
say "done: $output/report.html"
