"""Settings that are guessed for a recipe, each with its reason: sizes, from the model, the lengths
of the prompts and the node."""

import json
from typing import Any, NamedTuple

from megatron_r1.commands.parts.node_resources import NodeResources
from megatron_r1.config.yaml_text import format_value
from megatron_r1.models.hf_config import HFConfig, key_value_heads
from megatron_r1.models.memory import engine_bytes, parameter_bytes

GIB = 2**30
CPU_RESPONSE, GPU_RESPONSE = 256, 4096
MIN_RESPONSE = 32
DTYPE = "bfloat16"
"""Of model and engines on GPUs: the default."""
OVERHEAD = 0.1
"""The share of a GPU's memory that the contexts of two processes and NCCL take."""
GPU_FRACTION = 0.6
"""The share of a GPU's memory that weights, gradients and moments may take."""
LEARNING_RATES = ((20e6, 3e-5), (200e6, 2e-5), (float("inf"), 3e-6))
"""(less than so many parameters, rate); the last is DeepSeek-R1-Zero's."""


class Guess(NamedTuple):
    """A setting of the recipe, and why it has this value."""

    key: str
    value: Any
    reason: str


def yaml_value_text(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return format_value(value)


def guess_lengths(longest_prompt: int, positions: int, node: NodeResources) -> list[Guess]:
    """Return the settings that limit a response and a sequence, in tokens.

    Args:
        longest_prompt: the tokens of the longest prompt of the data.
        positions: the most tokens that a sequence of the model has.
        node: what the run has."""
    usual_length = CPU_RESPONSE if node.is_cpu else GPU_RESPONSE
    room = max(positions - longest_prompt, min(MIN_RESPONSE, positions // 2))
    response = min(usual_length, room)
    place = "a CPU" if node.is_cpu else "a GPU"
    reason = f"room to reason, as far as {place} allows; raise it where answers are cut off"
    if response < usual_length:
        reason = f"what the model's {positions:,} positions leave after the longest prompt"
    total = min(positions, -(-(longest_prompt + response) // 64) * 64)
    return [
        Guess("rollout.max_response_tokens", response, reason),
        Guess(
            "rollout.max_model_len",
            total,
            f"the longest prompt has {longest_prompt:,} tokens; longer questions are left out",
        ),
    ]


def guess_layout(hf_config: HFConfig, parameters: int, node: NodeResources) -> list[Guess]:
    """Return dtypes and the parallel layout; micro-batches fit themselves to a CPU's memory.

    Args:
        hf_config: the model's `config.json`.
        parameters: the number of the model's parameters.
        node: what the run has."""
    if node.is_cpu:
        reason = "this node has no GPU"
        return [Guess(key, "float32", reason) for key in ("model.dtype", "rollout.dtype")]
    tensor = tensor_parallel_size(hf_config, parameters, node)
    guesses = [
        Guess("rollout.colocated", True, "trainer and engines take turns on the same GPUs"),
        Guess(
            "rollout.gpu_memory",
            _engine_fraction(parameters, tensor, node),
            "what weights and moments of the trainer leave of a GPU; megatron-r1 plan computes it",
        ),
        Guess("rollout.engines", node.num_gpus // tensor, "as many as the GPUs have room for"),
        Guess("parallel.processes", node.num_gpus, "a trainer rank on each visible GPU"),
        Guess("push.transport", "cuda_ipc", "trainer and engines share the GPUs of this host"),
    ]
    if tensor > 1:
        load = f"{parameters / 1e9:.1f}B parameters in {node.free_bytes / GIB:.0f} GiB a GPU"
        guesses += [
            Guess("parallel.tensor", tensor, f"{load}; megatron-r1 plan computes it"),
            Guess("rollout.tensor_parallel", tensor, "as the trainer's"),
        ]
    return guesses


def _engine_fraction(parameters: int, tensor: int, node: NodeResources) -> float:
    """Return the share of a GPU that an engine may take next to a trainer rank and to the receive
    buffer of pushes. The trainer's gradients are freed meanwhile, and the buffer is no part of
    vLLM's share."""
    sizes = parameter_bytes(DTYPE)
    buffer = engine_bytes(1, DTYPE) - engine_bytes(1, DTYPE, receives=False)
    trainer_bytes = parameters * ((sizes.value + buffer) / tensor + sizes.optimizer / node.num_gpus)
    return max(5, int(20 * (1 - OVERHEAD - trainer_bytes / node.free_bytes)) * 5) / 100


def tensor_parallel_size(hf_config: HFConfig, parameters: int, node: NodeResources) -> int:
    """Return the least tensor-parallel size at which the trainer's state fits, or the largest that
    divides heads and GPUs.

    Args:
        hf_config: the model's config.json.
        parameters: the number of its parameters.
        node: the GPUs and their memory."""
    heads, kv_heads = hf_config["num_attention_heads"], key_value_heads(hf_config)
    sizes = [n for n in (1, 2, 4, 8) if not (node.num_gpus % n or heads % n or kv_heads % n)]
    bytes_of_kinds = parameter_bytes(DTYPE)
    for size in sizes:
        trainer_bytes = parameters * (
            (bytes_of_kinds.value + bytes_of_kinds.gradient) / size
            + bytes_of_kinds.optimizer / node.num_gpus
        )
        if trainer_bytes <= GPU_FRACTION * node.free_bytes:
            return size
    return sizes[-1]


def guess_batches(parameters: int, num_questions: int, node: NodeResources) -> list[Guess]:
    """Return the sizes of rollouts and updates, the learning rate and the number of steps.

    Args:
        parameters: the number of the model's parameters.
        num_questions: questions to train on.
        node: the node of the run."""
    num_rollout_questions, group_size, minibatches = (8, 8, 2) if node.is_cpu else (64, 16, 8)
    rate = next(rate for limit, rate in LEARNING_RATES if parameters < limit)
    responses = num_rollout_questions * group_size
    rollouts = num_questions / num_rollout_questions
    epochs = f"{num_questions:,} questions to train on are {rollouts:,.1f} rollouts"
    return [
        Guess("run.steps", 50, f"rollouts of {responses} responses; {epochs}"),
        Guess("checkpoint.every", 10, "steps that a kill loses at most"),
        Guess("rl.prompts_per_rollout", num_rollout_questions, "R1-Zero has 512"),
        Guess("rl.group_size", group_size, "responses to each question, which are compared"),
        Guess("rl.minibatches", minibatches, "updates per rollout"),
        Guess(
            "optimizer.learning_rate",
            rate,
            f"for {parameters / 1e6:,.1f}M parameters; R1-Zero's 671B have 3e-6",
        ),
    ]
