"""The memory that a run takes on a host without GPUs, and the micro-batch that fits into it.

Everything is in one memory there, the engines' part too, and the kernel kills a process of a run
that takes more than there is. So the default micro-batch is what the memory has room for."""

from dataclasses import dataclass
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.host_memory import free_bytes
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.config.parallel import DEFAULT_TOKENS
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.teacher import TeacherEngineConfig
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import HFConfig, sparse_layers
from megatron_r1.models.hf_config_file import load_raw_hf_config
from megatron_r1.models.memory import (
    BYTES,
    checkpoint_bytes,
    count_parameters,
    engine_bytes,
    head_bytes,
    layer_activations,
    persistent_bytes,
    reference_bytes,
)
from megatron_r1.models.weights import Shard, num_parameters, parameter_layout
from megatron_r1.models.weights.adapter_table import adapter_table
from megatron_r1.models.weights.layout import layout_from_table
from megatron_r1.models.weights.table import weight_table

RANK_BYTES, ENGINE_BYTES, OTHER_BYTES = 500 << 20, 700 << 20, 500 << 20
"""Memory of a trainer rank and of an engine rank without a model, and of the controller with its
graders: mostly libraries, whose pages processes share."""
MAX_ACTIVATION_BYTES, MIN_TOKENS = 3 << 29, 512
"""Limits of a default micro-batch: its activations and its tokens. Larger ones are not faster.
SmolLM2-135M cut to 6 layers, 4,096 tokens, one core: 7.0 to 7.5 CPU seconds in micro-batches of
4,096, 2,048 or 1,024 tokens, 8.3 in micro-batches of 512, 9.3 in micro-batches of 256."""
MAX_MEMORY_FRACTION = 0.9
"""The part of the free memory that a default micro-batch may fill."""


@dataclass(frozen=True)
class CPUMemory:
    """Bytes on this host.

    Attributes:
        weight_bytes: weights on all ranks, with gradients, optimizer state, reference, critic and
            the buffers that a checkpoint is written from.
        engine_weight_bytes: weights on the engines, with their receive buffers, and on a teacher's
            engines.
        other_bytes: KV caches, the loss head, processes.
        bytes_per_token: activations of a token of every rank's micro-batch, and its states in the
            head.
        free_bytes: free memory before the run."""

    weight_bytes: int
    engine_weight_bytes: int
    other_bytes: int
    bytes_per_token: int
    free_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no setting of the micro-batch changes."""
        return self.weight_bytes + self.engine_weight_bytes + self.other_bytes

    @property
    def largest_microbatch(self) -> int:
        """Tokens of a micro-batch that fit next to the fixed part."""
        return (
            max(0, int(MAX_MEMORY_FRACTION * self.free_bytes) - self.fixed_bytes)
            // self.bytes_per_token
        )

    def microbatch_tokens(self, requested: int | None) -> int:
        """Return the limit of a micro-batch in tokens.

        Args:
            requested: the recipe's limit, None by default.

        Raises:
            UserError: the weights and a micro-batch alone need more than is free; `other_bytes` do
                not count for that, because processes share parts of them."""
        max_tokens = min(DEFAULT_TOKENS, MAX_ACTIVATION_BYTES // self.bytes_per_token)
        tokens = requested or max(MIN_TOKENS, min(max_tokens, self.largest_microbatch))
        num_bytes = self.weight_bytes + self.engine_weight_bytes + tokens * self.bytes_per_token
        if num_bytes <= self.free_bytes:
            return tokens
        key = "parallel.processes"
        remedy = (
            "lower parallel.processes or rollout.engines, set checkpoint.asynchronous: false or "
            "parallel.recompute: full, or take a machine with more memory"
        )
        if requested and self.largest_microbatch >= MIN_TOKENS:
            key = "parallel.tokens_per_microbatch"
            max_tokens = self.largest_microbatch
            remedy = f"leave parallel.tokens_per_microbatch out, or lower it to {max_tokens:,}"
        raise UserError(f"{self.describe(tokens)}: {remedy}", key=key, cause=Cause.TOO_LARGE)

    def describe(self, tokens: int) -> str:
        """Return a sentence on the run's memory with micro-batches of `tokens`."""
        total_bytes = self.fixed_bytes + tokens * self.bytes_per_token
        parts = (
            f"weights with optimizer {_gib_text(self.weight_bytes)}",
            *(
                [f"engines' {_gib_text(self.engine_weight_bytes)}"]
                if self.engine_weight_bytes
                else []
            ),
            f"activations of {tokens:,} tokens {_gib_text(tokens * self.bytes_per_token)}",
            f"caches and processes {_gib_text(self.other_bytes)}",
        )
        return (
            f"the run takes about {_gib_text(total_bytes)} GiB of memory ({', '.join(parts)}), and "
            f"{_gib_text(self.free_bytes)} are free"
        )


def cpu_memory(config: Config, world_size: int, *, has_engines: bool) -> CPUMemory:
    """Return the memory of a run.

    Args:
        config: the recipe.
        world_size: trainer ranks, all on this host.
        has_engines: whether engines of the recipe run at the same time as them."""
    hf_config = read_hf_config(config.model.path, config.model.head)
    parallel, rollout = config.parallel, config.rollout
    weight_bytes = _state_bytes(config, hf_config, world_size, with_reference=has_engines)
    if has_engines and find_rules(config.rl.algorithm).critic:
        critic = config.critic_run_config()
        score_config = read_hf_config(critic.model.path, "score", "critic.path")
        weight_bytes += _state_bytes(critic, score_config, world_size, with_reference=False)
    shape = weight_table(hf_config).head[0].sources[0].shape
    has_experts, are_sparse = bool(hf_config.get("n_routed_experts")), sparse_layers(hf_config)

    def head(tokens: int) -> int:
        return head_bytes(shape, config, tokens, on_gpu=False, has_experts=has_experts)[0]

    # A chunk's part is that of any long micro-batch; hidden states grow with the tokens.
    state_bytes = (head(2 * DEFAULT_TOKENS) - head(DEFAULT_TOKENS)) // DEFAULT_TOKENS
    chunk_bytes = head(DEFAULT_TOKENS) - DEFAULT_TOKENS * state_bytes
    other_bytes, engine_weight_bytes = OTHER_BYTES + world_size * (RANK_BYTES + chunk_bytes), 0
    if has_engines and rollout.placement == "local":
        num_values = num_parameters(hf_config, with_mtp=rollout.drafts_by_mtp)
        receives = not config.push.adapter_only  # of adapters little compared with the model
        bytes_per_engine = engine_bytes(num_values, rollout.dtype, receives=receives)
        engine_weight_bytes = round(rollout.engines * rollout.data_parallel * bytes_per_engine)
        other_bytes += _engines_other_bytes(rollout)
    for key, teacher in config.teacher.sections.items():
        if has_engines and not teacher.url:
            num_values = _num_stored_parameters(teacher.path, f"{key}.path")
            teacher_bytes = engine_bytes(num_values, teacher.dtype, receives=False)
            engine_weight_bytes += round(teacher.engines * teacher.data_parallel * teacher_bytes)
            other_bytes += _engines_other_bytes(teacher)
    layers = {
        kind: layer_activations(hf_config, config, 1, sparse=kind, local=True)
        for kind in {*are_sparse}
    }
    saved_bytes = sum(layers[kind].saved_bytes(parallel) for kind in are_sparse)
    working_bytes = max(layer.total - layer.saved_bytes(parallel) for layer in layers.values())
    bytes_per_token = world_size * (saved_bytes + working_bytes + state_bytes)
    return CPUMemory(
        weight_bytes=weight_bytes,
        engine_weight_bytes=engine_weight_bytes,
        other_bytes=other_bytes,
        bytes_per_token=bytes_per_token,
        free_bytes=free_bytes(),
    )


def _engines_other_bytes(engines: RolloutConfig | TeacherEngineConfig) -> int:
    """Return bytes of KV caches and processes of all engines."""
    ranks = (
        engines.engines
        * engines.data_parallel
        * engines.tensor_parallel
        * engines.pipeline_parallel
    )
    return ranks * (ENGINE_BYTES + (engines.kv_cache_gib << 30))


def _state_bytes(
    config: Config, hf_config: HFConfig, world_size: int, *, with_reference: bool
) -> int:
    """Return the bytes on all ranks of a model: parameters, gradients, optimizer state, reference,
    and buffers for a checkpoint, if they are kept. Moments are fp32 on a CPU
    (`trainer.construction`)."""
    parallel, lora = config.parallel, config.model.lora
    shard = Shard(
        tuple(range(hf_config["num_hidden_layers"])),
        mtp=config.model.mtp != "none",
        tp=(0, parallel.tensor),
        ep=(0, parallel.expert),
        etp=(0, parallel.expert_tensor),
    )
    adapters = layout_from_table(adapter_table(hf_config, lora), shard) if lora else None
    counts = count_parameters(parameter_layout(hf_config, shard), config.model.mtp, adapters)
    ranks = world_size // parallel.pipeline  # stages have the layers once, all together
    optimizer_shards = (
        ranks // parallel.tensor,
        ranks // (parallel.expert * parallel.expert_tensor),
    )
    num_bytes = sum(persistent_bytes(config, counts, optimizer_shards, "float32").values())
    has_reference = with_reference and config.uses_reference
    if has_reference:
        num_bytes += reference_bytes(config, counts)
    if config.checkpoint.asynchronous:
        num_bytes += checkpoint_bytes(
            config, counts, optimizer_shards, with_reference=has_reference
        )
    return num_bytes * ranks


def _num_stored_parameters(folder: str, key: str) -> int:
    """Return the number of parameters in a model folder of any architecture, by its files' size.

    Args:
        folder: the model folder.
        key: the folder's key in the recipe, for messages."""
    hf_config = load_raw_hf_config(folder, key)
    width = BYTES.get(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16", 2)
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) // width


def _gib_text(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
