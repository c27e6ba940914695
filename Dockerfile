# GPU images.
#   docker build -t megatron-r1 .   trainer and engines in one image, by requirements/cuda.lock: what `make setup-cuda`
#                                   installs, and `make test-cuda` tests
# Or two images that share nothing but wires, so their dependencies never meet:
#   docker build --target trainer -t megatron-r1-trainer .
#   docker build --target engine  -t megatron-r1-engine .

# NVIDIA's PyTorch image brings torch, Transformer Engine, flash-attn and NVIDIA's Apex, built for each other.
# (The package called `apex` on PyPI is another project.)
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:26.09-py3
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# Python 3.11 or 3.12. The driver comes from the host, CUDA's libraries from the lock.
ARG PLAIN_IMAGE=debian:bookworm-slim

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
COPY grading grading
COPY megatron_r1 megatron_r1
COPY tools tools
COPY examples examples
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e kernels -e grading -e .
ENTRYPOINT ["megatron-r1"]

FROM ${VLLM_IMAGE} AS engine
WORKDIR /opt/megatron-r1
# The engine needs the plugin only, which imports torch, vllm and xxhash.
COPY setup.py pyproject.toml README.md ./
COPY kernels kernels
COPY grading grading
COPY megatron_r1 megatron_r1
# The versions of cpu.lock; msgspec and llvmlite are vLLM's own.
RUN pip install --no-cache-dir --no-deps xxhash==4.1.0
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e kernels -e grading -e .
ENTRYPOINT ["python3", "-m", "megatron_r1.engines.plugin.serve"]

FROM ${PLAIN_IMAGE} AS together
# The code reward's sandbox and compiler; g++ and Python's headers also build Transformer Engine and Triton's kernels.
RUN apt-get update && apt-get install -y --no-install-recommends \
    bubblewrap ca-certificates g++ make python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron-r1
COPY Makefile ./
COPY requirements requirements
RUN make cuda-packages
COPY setup.py pyproject.toml README.md ./
COPY kernels kernels
COPY grading grading
COPY megatron_r1 megatron_r1
COPY tools tools
COPY examples examples
RUN make setup-cuda
ENV PATH=/opt/megatron-r1/.venv-cuda/bin:$PATH
ENTRYPOINT ["megatron-r1"]
