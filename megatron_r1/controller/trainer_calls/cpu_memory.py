"""The memory that a run takes on a host without GPUs, and the micro-batch that fits into it.

Everything is in one memory there, the engines' part too, and the kernel kills a process of a run
that takes more than there is. So the default micro-batch is what the memory has room for."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import rules_of
from megatron_r1.config.training import DEFAULT_TOKENS
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import (
    head_sizes,
    key_value_heads,
    load_config,
    sparse_layers,
)
from megatron_r1.models.weights import num_parameters
from megatron_r1.models.weights.adapter_table import num_adapter_parameters

VALUE = {"float32": 4, "bfloat16": 2}
FP32 = 4
RANK_BYTES, ENGINE_BYTES, OTHER_BYTES = 500 << 20, 700 << 20, 500 << 20
"""Memory of a trainer rank and of an engine rank without a model, and of the controller with its
graders: mostly libraries, whose pages processes share."""
CHUNK_LOGITS = 1 << 24
"""Logits that the loss head has in memory at once on a CPU (r1_kernels)."""
MOST_BYTES, FEWEST_TOKENS = 3 << 29, 512
"""Limits of a default micro-batch: its activations and its tokens. Larger ones are not faster.
SmolLM2-135M cut to 6 layers, 4,096 tokens, one core: 7.0 to 7.5 CPU seconds in micro-batches of
4,096, 2,048 or 1,024 tokens, 8.3 in micro-batches of 512, 9.3 in micro-batches of 256."""
USED = 0.9
"""The part of the free memory that a default micro-batch may fill."""


@dataclass(frozen=True)
class CPUMemory:
    """Bytes on this host.

    weights: those of all ranks, with gradients, optimizer state, reference, critic and the buffers
        that a checkpoint is written from.
    engine_weights: those of the engines, with their receive buffers, and of a teacher's engines.
    others: KV caches, the loss head, processes.
    per_token: activations of a token of every rank's micro-batch.
    free: free memory before the run."""

    weights: int
    engine_weights: int
    others: int
    per_token: int
    free: int

    @property
    def fixed(self) -> int:
        """Bytes that no setting of the micro-batch changes."""
        return self.weights + self.engine_weights + self.others

    @property
    def room(self) -> int:
        """Tokens of a micro-batch that fit next to the fixed part."""
        return max(0, int(USED * self.free) - self.fixed) // self.per_token

    def microbatch(self, wanted: int | None) -> int:
        """Return the limit of a micro-batch in tokens. wanted: the recipe's, None by default.

        Raises UserError where the weights and a micro-batch alone need more than is free; `others`
        do not count for that, because processes share parts of them."""
        most = min(DEFAULT_TOKENS, MOST_BYTES // self.per_token)
        tokens = wanted or max(FEWEST_TOKENS, min(most, self.room))
        if self.weights + self.engine_weights + tokens * self.per_token <= self.free:
            return tokens
        key = "parallel.processes"
        remedy = (
            "lower parallel.processes or rollout.engines, set checkpoint.asynchronous: false or "
            "parallel.recompute: full, or take a machine with more memory"
        )
        if wanted and self.room >= FEWEST_TOKENS:
            key = "parallel.tokens_per_microbatch"
            remedy = f"leave parallel.tokens_per_microbatch out, or lower it to {self.room:,}"
        raise UserError(f"{self.describe(tokens)}: {remedy}", key=key, cause=Cause.TOO_LARGE)

    def describe(self, tokens: int) -> str:
        """Return a sentence on the run's memory with micro-batches of `tokens`."""
        total = self.fixed + tokens * self.per_token
        parts = (
            f"weights with optimizer {_gib(self.weights)}",
            *([f"engines' {_gib(self.engine_weights)}"] if self.engine_weights else []),
            f"activations of {tokens:,} tokens {_gib(tokens * self.per_token)}",
            f"caches and processes {_gib(self.others)}",
        )
        return (
            f"the run takes about {_gib(total)} GiB of memory ({', '.join(parts)}), and "
            f"{_gib(self.free)} are free"
        )


def cpu_memory(config: Config, num_ranks: int, *, has_engines: bool) -> CPUMemory:
    """Return the memory of a run. num_ranks: trainer ranks, all on this host; has_engines: whether
    engines of the recipe run at the same time as them."""
    hf = read_hf_config(config.model.path, config.model.head)
    parallel, value = config.parallel, VALUE[config.model.dtype]
    parameters = num_parameters(hf)
    # A weight and its gradient are on as many ranks as there are replicas, at most: experts are on
    # fewer.
    replicas = num_ranks // (parallel.tensor * parallel.pipeline)
    lora = config.model.lora
    trained = num_adapter_parameters(hf, lora) if lora else parameters
    weights = _trained_bytes(config, trained, replicas)
    weights += parameters * replicas * value if lora else 0
    if has_engines and config.uses_reference:
        weights += trained * value * (replicas + config.checkpoint.asynchronous)
    if has_engines and rules_of(config.rl.algorithm).critic:
        critic = read_hf_config(config.of_critic().model.path, "score", "critic.path")
        weights += _trained_bytes(config, num_parameters(critic), replicas)
    columns = 1 if config.model.head == "score" else hf["vocab_size"]
    head = 3 * FP32 * CHUNK_LOGITS + 2 * FP32 * columns * hf["hidden_size"]
    others = OTHER_BYTES + num_ranks * (RANK_BYTES + min(head, 3 * FP32 * DEFAULT_TOKENS * columns))
    engine_weights, rollout = 0, config.rollout
    if has_engines and rollout.placement == "local":
        copies = rollout.engines * rollout.data
        engine_weights = 2 * copies * parameters * VALUE[rollout.dtype]
        ranks = copies * rollout.tensor * rollout.pipeline
        others += ranks * (ENGINE_BYTES + (rollout.kv_cache_gib << 30))
    teacher = config.teacher
    if has_engines and teacher.path and not teacher.url:
        copies = teacher.engines * teacher.data
        engine_weights += copies * _num_stored_parameters(teacher.path) * VALUE[teacher.dtype]
        ranks = copies * teacher.tensor * teacher.pipeline
        others += ranks * (ENGINE_BYTES + (teacher.kv_cache_gib << 30))
    kept = activation_bytes(hf, value)
    if parallel.recompute == "full":  # the inputs of all layers, and the rest of one
        kept = kept // hf["num_hidden_layers"] + value * hf["num_hidden_layers"] * hf["hidden_size"]
    per_token = kept * num_ranks // (parallel.tensor * parallel.context)
    return CPUMemory(
        weights=weights,
        engine_weights=engine_weights,
        others=others,
        per_token=per_token,
        free=free_bytes(),
    )


def _trained_bytes(config: Config, trained: int, replicas: int) -> int:
    """Return the bytes on all ranks of `trained` parameters: the parameters, gradients, optimizer
    state, and buffers for a checkpoint, if they are kept.

    Replicas share the optimizer state, whose moments are fp32 on a CPU (`trainer.construction`).
    Each replica gathers all master weights and moments for a checkpoint, and writes a part of the
    weights (`trainer.checkpoints.staging`)."""
    value = VALUE[config.model.dtype]
    master = FP32 if config.model.dtype == "bfloat16" else 0
    num_bytes = trained * (replicas * (value + FP32) + master + 2 * FP32)
    if config.checkpoint.asynchronous:
        num_bytes += trained * (replicas * 3 * FP32 + value)
    return num_bytes


def _num_stored_parameters(folder: str) -> int:
    """Return the number of parameters in a model folder of any architecture, by its files' size."""
    hf = load_config(folder, "teacher.path")
    width = VALUE.get(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16", 2)
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) // width


def activation_bytes(hf: dict, value: int) -> int:
    """Return the bytes that the layers of `models/layers.py` keep of a token for the backward pass,
    without recomputation. hf: config.json; value: bytes of a number."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    query, out = head_sizes(hf)
    if rank := hf.get("kv_lora_rank"):
        latent = 3 * (hf.get("q_lora_rank") or 0) + 3 * rank + hf["qk_rope_head_dim"]
        # Up-projections; heads with their rotary part; q, k and v in batches of one head size.
        widest = max(query, out)
        attention = latent + heads * (2 * query + out + 2 * query + 3 * widest + 2 * out)
    else:
        groups = key_value_heads(hf)
        # The projection; q and k with positions; q, k and v in batches; the output, and its copy.
        attention = query * (2 * (heads + 2 * groups) + heads + groups + 2 * heads)
    norms = 4 * hidden
    dense = 4 * hf["intermediate_size"]  # gate, up, activation, product
    sparse = sparse_layers(hf)
    total = len(sparse) * (norms + attention) + (len(sparse) - sum(sparse)) * dense
    if any(sparse):
        experts = hf["n_routed_experts"]
        inner, chosen = hf["moe_intermediate_size"], hf["num_experts_per_tok"]
        shared = hf.get("n_shared_experts") or 0
        routed = chosen * (2 * hidden + 4 * inner) + 4 * shared * inner + 4 * experts
        total += sum(sparse) * routed
    return total * value


def free_bytes() -> int:
    """Return the memory that this host, or the container, has left."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (
            int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # another system, or no limit ("max")
        return free
    # The kernel drops cached files before it kills a process.
    cached = int(stat["active_file"]) + int(stat["inactive_file"])
    return min(free, limit - used + cached)


CGROUP = Path("/sys/fs/cgroup")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
