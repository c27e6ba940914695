"""Checks whether a model folder can be trained: `megatron-r1 check-model HF_FOLDER [--json FILE]`.

Prints what the folder holds, the memory that training it takes, and the largest difference of
Megatron's (`--parallel.key value` is its layout) and vLLM's log-probabilities from transformers',
on a few texts and random tokens. Exit status 0: they agree, within 1e-4 in float32, within
transformers' own rounding in bfloat16 (`--model.dtype bfloat16`); 1: they do not, or nothing could
be compared; 2: the model or its files cannot be used, for the reason in the message. A folder
without a tokenizer is checked on token ids."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from megatron_r1.base.errors import RunError, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.processes.children import die_with_parent
from megatron_r1.base.processes.host_memory import free_bytes
from megatron_r1.commands.check_model.comparisons import compare_with_megatron, compare_with_vllm
from megatron_r1.commands.check_model.results import (
    ModelCheckResult,
    NotCompared,
    ReferenceFailure,
    ReferenceResult,
)
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.data.end_tokens import describe_end_tokens, end_tokens
from megatron_r1.evaluation.model_folder import require_weights
from megatron_r1.models.hf_config_file import describe_config_changes, read_hf_config
from megatron_r1.models.memory import engine_bytes, parameter_bytes
from megatron_r1.models.parallel_checks import check_divisions
from megatron_r1.models.support_checks import check_supported
from megatron_r1.models.weights.layout import num_parameters, recipe_stages

ARGUMENTS = ("HF_FOLDER",)
SETTINGS = ("parallel", "rollout", "model.dtype", "model.mtp")
IMPLIED_SETTINGS = {"model.dtype": "float32"}
OPTIONS = {"json": "FILE"}


def _training_bytes(dtype: str = "float32") -> int:
    """Return bytes of RL per parameter: weights, gradients, optimizer, reference and engine, but no
    activations, KV caches and processes (`parts.cpu_memory` counts them)."""
    sizes = parameter_bytes(dtype)
    return sizes.total + sizes.value + round(engine_bytes(1, dtype))


def _bytes_of_check(dtype: str) -> int:
    """Return bytes of this check per parameter at its peak: the trainer, with its optimizer, and
    the weights that it reads."""
    sizes = parameter_bytes(dtype)
    return sizes.total + sizes.value


def run(config: Config, folder: str, json: str | None = None) -> None:
    """Check the folder and print the findings.

    Args:
        config: the settings given on the command line.
        folder: the Hugging Face folder.
        json: the file to write the result to, if any.

    Raises:
        UserError: the model is not supported.
        RunError: the implementations disagree, or too little memory is free to compare them."""
    try:
        result = _check_model(config, folder)
    except (UserError, RunError) as error:
        _write_result(json, {"folder": folder, "agree": False, "problem": str(error)})
        raise
    print(_format_findings(result, config.parallel))
    _write_result(json, result)
    if result.problem is not None:
        raise RunError(f"{folder}: {result.problem}")


def _write_result(path: str | None, result: ModelCheckResult | dict[str, Any]) -> None:
    """Write what was found as JSON, if asked to: also a failure, so that no older file stays."""
    if path is not None:
        atomic_write(path, msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")


def _check_model(config: Config, folder: str) -> ModelCheckResult:
    """Compare the folder's model in transformers, Megatron and vLLM, and return the findings.

    Raises:
        UserError: the model is not supported.
        RunError: too little memory is free to compare anything.
    """
    hf_config = read_hf_config(folder, key="HF_FOLDER")
    check_supported(hf_config)
    require_weights(Path(folder), "HF_FOLDER")
    config = _config_of_check(config, folder)
    check_divisions(hf_config, config.parallel, transformer_engine=False)
    recipe_stages(config, hf_config)
    parameters = num_parameters(hf_config, with_mtp=config.model.mtp != "none")
    free = free_bytes()
    required_bytes = parameters * _bytes_of_check(config.model.dtype)
    if required_bytes > free:
        raise RunError(
            f"{folder}: {hf_config['architectures'][0]} is supported, but nothing was compared: "
            f"its {parameters:,} parameters need about {required_bytes / 1e9:,.0f} GB, "
            f"{free / 1e9:,.0f} are free; check a folder with fewer layers, or on a larger machine"
        )
    with tempfile.TemporaryDirectory() as scratch:
        plain_folder = Path(scratch) / "plain"
        reference = _run_reference(config, plain_folder, Path(scratch))
        megatron = asyncio.run(compare_with_megatron(config, reference, Path(scratch)))
        source = plain_folder if plain_folder.exists() else Path(folder)
        vllm = asyncio.run(compare_with_vllm(source, config, reference, Path(scratch)))
    problem = _describe_problem(megatron, vllm, reference.tolerance)
    return ModelCheckResult(
        folder=folder,
        architecture=hf_config["architectures"][0],
        dtype=config.model.dtype,
        config_changes=describe_config_changes(folder, "HF_FOLDER"),
        parameters=parameters,
        memory_bytes=parameters * _training_bytes(),
        free_bytes=free,
        tensors=reference.num_tensors,
        tokens=reference.num_tokens,
        template=reference.template,
        compared=sum(map(len, reference.logprobs)),
        tolerance=reference.tolerance,
        megatron=megatron,
        vllm=vllm if isinstance(vllm, float) else str(vllm),
        agree=problem is None,
        end_tokens=describe_end_tokens(end_tokens(folder, "HF_FOLDER")),
        problem=problem,
    )


def _config_of_check(config: Config, folder: str) -> Config:
    """Return the recipe of the check: this folder, as few processes as the layout takes, an engine
    of the trainer's dtype."""
    parallel = config.parallel
    ranks = parallel.pipeline * max(
        parallel.tensor * parallel.context, parallel.expert * (parallel.expert_tensor or 1)
    )
    return config.with_changes(
        model={"path": folder},
        parallel={"processes": max(parallel.processes, ranks)},
        rollout={"dtype": config.model.dtype},
    )


def _run_reference(config: Config, plain_folder: Path, scratch: Path) -> ReferenceResult:
    out, model = scratch / "reference.json", config.model
    folder = model.path
    arguments = [folder, model.dtype, model.mtp, str(plain_folder), str(out)]
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_r1.commands.check_model.reference",
            *arguments,
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    if process.returncode < 0:
        raise RunError(
            f"{folder}: transformers was ended by signal "
            f"{signal.Signals(-process.returncode).name}; SIGKILL is what the system sends where "
            "memory is short: free some, or check a folder with fewer layers"
        )
    if process.returncode:
        if not out.exists():
            lines = process.stderr.strip().splitlines()
            raise RunError(f"{folder}: transformers failed:\n" + "\n".join(lines[-8:]))
        failure = msgspec.json.decode(out.read_bytes(), type=ReferenceFailure)
        raise UserError(failure.message, key=failure.key, cause=failure.cause)
    return msgspec.json.decode(out.read_bytes(), type=ReferenceResult)


def _describe_problem(megatron: float, vllm: float | NotCompared, tolerance: float) -> str | None:
    """Return why the exit status is 1; None for 0."""
    if megatron > tolerance or (isinstance(vllm, float) and vllm > tolerance):
        return "transformers, Megatron and vLLM do not agree (see above)"
    if isinstance(vllm, NotCompared) and vllm.is_failure:
        return "transformers and Megatron agree, but vLLM could not be compared (see above)"
    return None


def _format_findings(result: ModelCheckResult, parallel: ParallelConfig) -> str:
    """Return the findings as lines."""

    def difference(value: float | str) -> str:
        if isinstance(value, str):
            return value
        verdict = "agrees" if value <= result.tolerance else "DIFFERS"
        return f"{verdict}: max |Δ log p| = {value:.1e} (at most {result.tolerance:.1e})"

    tokens = (
        "none in the folder, which training needs: tokenizer.json and tokenizer_config.json; "
        "checked on token ids"
    )
    if result.tokens is not None:
        template = "renders its chat template" if result.template else "has no chat template"
        tokens = f"{result.tokens:,} tokens; gives texts back, {template}"
    sizes = parallel.model_dump(exclude_defaults=True)
    layout = ", ".join(f"{key} {value}" for key, value in sizes.items()) or "one process"
    memory, free = result.memory_bytes / 1e9, result.free_bytes / 1e9
    rows = {
        "model": f"{result.architecture}: supported; {result.parameters:,} parameters",
        **({"config": "; ".join(result.config_changes)} if result.config_changes else {}),
        "weights": f"{result.tensors:,} tensors, each read once",
        "memory": f"RL in float32 takes about {memory:,.1f} GB for weights; {free:,.1f} free here",
        "tokenizer": tokens,
        "ends with": result.end_tokens or "no token that the folder names",
        "compared": f"{result.compared} tokens, {result.dtype}; transformers is the reference",
        "Megatron": f"{difference(result.megatron)}; {layout}",
        "vLLM": difference(result.vllm),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())
