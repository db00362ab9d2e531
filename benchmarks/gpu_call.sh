#!/usr/bin/env bash
# What is measured on a machine with a GPU that is had for minutes and has no network: made ready here, then two calls.
# gpu_call.sh pack DIR DATA: into DIR what the calls need beside a clone: site.tar.xz (the wheels of gpu_wheels.sh,
#   installed), data.tar.xz (of DATA, the published files), smollm2.gguf.a and .b (the model).
# gpu_call.sh steps DIR OUT SECONDS: there, the gradient test and OPT's steps; OUT gets tables, JSON and logs.
# gpu_call.sh real DIR OUT SECONDS [ARGUMENT...]: there, the experiment on a real model, 14 cells at a time.
# Where a call carries 64 MiB at most, the first takes all but smollm2.gguf.a, and the second that alone.
# PYTHON names the interpreter.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
python=${PYTHON:-python3}
place=/tmp/wpn-gpu

published=(pku_saferlhf_5k/derived default_pack tokenizer_opt tokenizer_gpt2 jailbreakeval
    llama_factory_demo/data/alpaca_en_demo.json attack_prompts_raw aart jailbreak_llms self_reminder latent_jailbreak
    llm_foundry_eval hellaswag copa)

pack() {
    local dir data
    dir=$(readlink -f "$1") data=$(readlink -f "$2")
    local made wheel
    made=$(mktemp -d)
    # shellcheck disable=SC2064  # its name is known now, and gone then
    trap "rm -r '$made'" EXIT
    "$root/benchmarks/gpu_wheels.sh" "$made/wheels"
    for wheel in "$made"/wheels/*.whl; do unzip -qo "$wheel" -d "$made/site"; done
    tar -C "$made/site" -cJf "$dir/site.tar.xz" .
    tar -C "$data/.." -cJf "$dir/data.tar.xz" "${published[@]/#/$(basename "$data")/}"
    "$root/benchmarks/gpu_wheels.sh" --model "$dir"
}

unpack() {
    if [[ ! -d $place ]]; then
        mkdir -p $place/site $place/shared
        tar -C $place/site -xJf "$1/site.tar.xz"
        tar -C $place/shared -xJf "$1/data.tar.xz"
    fi
    [[ ! -e $1/smollm2.gguf.b ]] || cp "$1/smollm2.gguf.b" $place/
    cd "$root"
    export PYTHONPATH=$root:$place/site WPN_DS_SHARED=$place/shared WPN_DS_CACHE=$place/cache HF_HUB_OFFLINE=1
    export TORCH_EXTENSIONS_DIR=$place/extensions PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
}

steps() {
    local dir=$1 out=$2 end=$((SECONDS + $3)) models left
    unpack "$dir"
    timeout 90 "$python" -m pytest tests/engine/test_gradient.py -p no:cacheprovider -k "every_layout and 1]" \
        &>"$out/gradient.log" || true
    tail -n 1 "$out/gradient.log"
    for models in "opt-2.7b opt-1.3b" opt-6.7b gpt-neo-2.7b "opt-6.7b --deepspeed zero1" "opt-1.3b --only f"; do
        left=$(((end - SECONDS) * 10 / 6))
        # shellcheck disable=SC2086  # several words
        "$python" -m benchmarks.gpu --output "$out/steps.json" --minutes "${left}e-2" --only b --models $models \
            &>"$out/steps.log" || true
    done
    tail -n 40 "$out/steps.log"
}

real() {
    local dir=$1 out=$2 seconds=$3
    shift 3
    unpack "$dir"
    cat "$dir/smollm2.gguf.a" $place/smollm2.gguf.b >$place/smollm2.gguf
    "$python" -c "from pathlib import Path; from wpn_ds.models.smollm2 import make
make(Path('$place/smollm2.gguf'), Path('$place/original'))"
    # Weights in memory: 14 trainings at a time would wait for a disk.
    OMP_NUM_THREADS=1 timeout "$seconds" "$python" -m benchmarks.real --model $place/original --work /dev/shm/real \
        --data $place/shared/data --json "$out/real.json" --batch_size 128 --jobs 14 "$@" &>"$out/real.log" || true
    tail -n 40 "$out/real.log"
}

case ${1:-} in
pack | steps | real) "$@" ;;
*) sed -n '2,/^set/{/^set/d;s/^# \?//p}' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
