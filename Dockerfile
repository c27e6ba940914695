# GPU images. `trainer` and `engine` share nothing but wires, so their dependencies never meet:
#   docker build --target trainer -t megatron-r1-trainer .
#   docker build --target engine  -t megatron-r1-engine .

# NVIDIA's PyTorch image brings torch, Transformer Engine, flash-attn and NVIDIA's Apex, built for each other.
# (The package called `apex` on PyPI is another project.)
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:26.09-py3
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTORCH_IMAGE} AS trainer
# The code reward's sandbox, its compiler and its interpreter.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap g++ python3 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron-r1
COPY requirements/trainer.txt requirements/
# The image's own torch and numpy are kept: --no-deps for everything that would replace them.
RUN pip install --no-cache-dir --no-deps -r requirements/trainer.txt
COPY setup.py pyproject.toml README.md ./
COPY kernels kernels
COPY megatron_r1 megatron_r1
COPY tools tools
COPY examples examples
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENTRYPOINT ["megatron-r1"]

FROM ${VLLM_IMAGE} AS engine
WORKDIR /opt/megatron-r1
# The engine needs the plugin only, which imports torch, vllm and xxhash.
COPY setup.py pyproject.toml README.md ./
COPY kernels kernels
COPY megatron_r1 megatron_r1
# The versions of cpu.lock; msgspec and llvmlite are vLLM's own.
RUN pip install --no-cache-dir --no-deps xxhash==4.1.0
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENTRYPOINT ["python3", "-m", "megatron_r1.vllm_plugin.serve"]
