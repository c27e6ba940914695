"""Engine arguments that a recipe hands to vLLM (`rollout.vllm`, `teacher.vllm`), by the names that
`vllm serve --help` lists.

They get their form of the command line here, and are checked before anything starts. What this
project sets itself is refused with the recipe's key for it. All else vLLM's own parser reads, in
the Python of the engines, with the values of its nested configurations."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import msgspec

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config import RolloutConfig
from megatron_r1.config.teacher import TeacherEngineConfig

CHECKER = "megatron_r1.engines.plugin.argument_check"
"""What parses the arguments: a process of its own, as this one imports no vLLM."""

RESERVED_ARGUMENTS = {
    "model": "model.path",
    "dtype": "rollout.dtype",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "gpu_memory_utilization": "rollout.gpu_memory",
    "device_memory_utilization": "rollout.gpu_memory",
    "block_size": "rollout.kv_block_tokens",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "pipeline_parallel_size": "rollout.pipeline_parallel",
    "data_parallel_size": "rollout.data_parallel",
    "enable_expert_parallel": "rollout.expert_parallel",
    "speculative_config": "rollout.speculative",
    "spec_method": "rollout.speculative.method",
    "spec_model": "rollout.speculative",
    "spec_tokens": "rollout.speculative.tokens",
    "seed": "run.seed",
    "enable_return_routed_experts": "rl.routing_replay",
    "return_sampling_mask": "rollout.top_k",
    "enable_sleep_mode": "rollout.colocated",
    "weight_transfer_config": "push.transport",
    "enable_lora": "model.lora",
    "lora_modules": "model.lora",
    "additional_config": "rollout.plain_matrices",
}
"""Arguments of vLLM that another setting of the recipe decides → that setting."""

RESERVED_OF_TEACHER = {"max_num_batched_tokens": "teacher.max_num_batched_tokens"}
"""The same, of a teacher's engines."""

FIXED_ARGUMENTS = {
    "enable_prefix_caching": "a group shares its prompt, except with rl.routing_replay on a CPU",
    "logprobs_mode": "the trainer compares the log-probabilities of the sampled distribution",
    "generation_config": "the recipe's sampling settings are the only ones",
    "enable_scale_out": "the controller pauses and resumes engines by its calls",
    "skip_tokenizer_init": "requests and responses are token ids",
    "load_format": "weights come by the first push",
    "hf_overrides": "the model folder's config.json is read, as the trainer reads it",
    "served_model_name": "the controller names the model in its calls",
    "api_server_count": "a push is one call to one server",
    "middleware": "it checks the run's secret",
    "api_key": "the run has a secret of its own",
    "worker_extension_cls": "a push uses the plugin's own",
    "config": "it would name arguments that are not checked; write them under vllm:",
}
"""Arguments of vLLM that no setting changes → the reason."""

SERVER_ARGUMENTS = ("host", "port", "uds", "headless", "nnodes", "node_rank", "grpc", "root_path")
SERVER_PREFIXES = ("data_parallel_", "master_", "ssl_", "enable_ssl")
"""Arguments of addresses and hosts, which the fleet chooses for every engine."""


class ParsedArguments(msgspec.Struct):
    """What `CHECKER` replies.

    Attributes:
        names: every argument of this vLLM, with underscores.
        error: the parser's message, or "" where it accepts the values.
    """

    names: list[str]
    error: str = ""


def argument_list(values: Mapping[str, Any]) -> list[str]:
    """Return vLLM's command line for `values`: True and False as the flag or its negation, mappings
    as JSON, lists as several words."""
    words: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Mapping):
            words += [f"--{option}", json.dumps(dict(value))]
        elif isinstance(value, list | tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


def compilation_config(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return vLLM's configuration of this name, which a recipe has as a mapping or as JSON."""
    value = arguments.get("compilation-config", arguments.get("compilation_config", {}))
    with contextlib.suppress(TypeError, ValueError):
        value = json.loads(value)
    if isinstance(value, Mapping):
        return value
    key = "rollout.vllm.compilation_config"
    text = f"{key}={value!r}: write a mapping, such as {{cudagraph_mode: NONE}}, or leave it out"
    raise UserError(text, key=key, cause=Cause.MALFORMED)


def check_reserved(engines: RolloutConfig | TeacherEngineConfig, section: str) -> None:
    """Raise UserError for an argument that this project sets, naming what sets it.

    Args:
        engines: the recipe's section.
        section: its key, such as "rollout" or "teacher".
    """
    owned_arguments = RESERVED_ARGUMENTS | (
        RESERVED_OF_TEACHER if isinstance(engines, TeacherEngineConfig) else {}
    )
    for argument in engines.vllm:
        key = f"{section}.vllm.{argument}"
        name = argument.replace("-", "_").removeprefix("no_")
        if name in owned_arguments:
            setting = re.sub(r"^(rollout|teacher)\b", lambda match: section, owned_arguments[name])
            raise UserError(
                f"{key}: set {setting}, which decides it", key=key, cause=Cause.CONFLICT
            )
        if name in FIXED_ARGUMENTS:
            raise UserError(
                f"{key}: it cannot be changed: {FIXED_ARGUMENTS[name]}; leave it out",
                key=key,
                cause=Cause.CONFLICT,
            )
        if name == "eplb_config" and "num_redundant_experts" in engines.vllm[argument]:
            raise UserError(
                f"{key}.num_redundant_experts: set rollout.redundant_experts, which the push and "
                "the plan count as well",
                key=key,
                cause=Cause.CONFLICT,
            )
        if name in SERVER_ARGUMENTS or name.startswith(SERVER_PREFIXES):
            raise UserError(
                f"{key}: the fleet chooses the addresses and hosts of every engine; leave it out",
                key=key,
                cause=Cause.CONFLICT,
            )


def check_arguments(engines: RolloutConfig | TeacherEngineConfig, section: str) -> None:
    """Raise UserError for arguments that vLLM does not have, or values that it does not accept.

    vLLM's parser takes 10 s on a CPU, most of it the import, so it runs only where there are
    arguments. Where engines run on other hosts, and vLLM is only there, it reads them when it
    starts.

    Args:
        engines: the recipe's section.
        section: its key, such as "rollout" or "teacher".
    """
    check_reserved(engines, section)
    has_engine_hosts = isinstance(engines, RolloutConfig) and engines.placement == "hosts"
    if not engines.vllm or (has_engine_hosts and find_spec("vllm") is None):
        return
    parse_result = _parse_with_vllm(argument_list(engines.vllm))
    for argument in engines.vllm:
        name = argument.replace("-", "_")
        if name not in parse_result.names:
            key = f"{section}.vllm.{argument}"
            raise UserError(
                f"{key}: vLLM has no such argument{did_you_mean(name, parse_result.names)}; "
                "`vllm serve --help=all` lists them",
                key=key,
                cause=Cause.UNKNOWN,
            )
    if parse_result.error:
        setting = next(
            (
                f"{section}.vllm.{name}"
                for name in engines.vllm
                if _has_name(parse_result.error, name)
            ),
            f"{section}.vllm",
        )
        raise UserError(
            f"{setting}: vLLM does not accept it: {parse_result.error}; correct it, or leave it "
            "out",
            key=setting,
            cause=Cause.MALFORMED,
        )


def _has_name(error: str, name: str) -> bool:
    return any(form in error for form in (name.replace("_", "-"), name.replace("-", "_")))


def _parse_with_vllm(words: list[str]) -> ParsedArguments:
    process = subprocess.run(
        [sys.executable, "-m", CHECKER],
        input=json.dumps(words),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last_lines = process.stderr.strip().splitlines()[-1:] or [
            f"exit status {process.returncode}"
        ]
        raise UserError(
            f"rollout.vllm: vLLM's parser could not be asked ({last_lines[0]}); is vLLM installed "
            f"in {sys.executable}?",
            key="rollout.vllm",
            cause=Cause.NOT_INSTALLED,
        )
    return msgspec.json.decode(process.stdout.rpartition("\n")[2], type=ParsedArguments)
