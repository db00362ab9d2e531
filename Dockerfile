# docker build -t wpn_ds .
# docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -e HOME=/work -v "$PWD:/work" wpn_ds wpn-ds demo
# The driver is the host's; without --gpus it runs on CPUs. For Slurm: docs/cluster.md.
# DeepSpeed compiles with the nvcc of this image, whose major version has to be that of torch's CUDA.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY wpn_ds /src/wpn_ds
COPY launch /src/launch
COPY ds_configs /src/ds_configs
COPY slurm /src/slurm
RUN python3 -m venv /opt/wpn_ds \
    && /opt/wpn_ds/bin/pip install --no-cache-dir --constraint /src/constraints.txt "/src[eval,wandb]" \
    && useradd --create-home wpn

ENV PATH=/opt/wpn_ds/bin:$PATH
USER wpn
WORKDIR /work
CMD ["wpn-ds", "--help"]
