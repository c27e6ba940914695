"""Bytes of memory that training and sampling take: of a parameter, a token, a chunk of logits.

The planner, the estimate for hosts without GPUs, `init`, `check-model` and `rl --dry-run` count
with these functions. No torch.

Activations are counted as by Korthikanti et al. (arXiv 2205.05198, section 4.1): every tensor that
an operation needs in the backward pass, once; here for multi-head latent attention, routed experts
and flash attention, which keeps its output and one fp32 number per head and token instead of
scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING

from megatron_r1.config import Config, ParallelConfig
from megatron_r1.models.hf_config import HFConfig, head_sizes, key_value_heads

if TYPE_CHECKING:
    from megatron_r1.models.weights.layout import LayoutEntry

BYTES = {"float32": 4, "bfloat16": 2}
FP32_BYTES = 4
# Of r1_kernels.linear_head; not imported, as that would import torch.
GPU_CHUNK_TOKENS = 8192
GPU_CHUNK_ELEMENTS = 1 << 27
CPU_CHUNK_ELEMENTS = 1 << 24
_INSIDE_MOE = {"moe_act", "shared_experts"}


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of one trained parameter.

    Attributes:
        value: on every replica.
        gradient: on every replica.
        optimizer: master copy and moments, on one replica."""

    value: int
    optimizer: int
    gradient: int = FP32_BYTES

    @property
    def total(self) -> int:
        """Bytes per parameter of value, gradient and optimizer state together."""
        return self.value + self.gradient + self.optimizer


def parameter_bytes(dtype: str, moments: str = "float32") -> ParameterBytes:
    """Return the bytes of one trained parameter: two moments, and an fp32 copy of a bf16 one."""
    master = FP32_BYTES if dtype == "bfloat16" else 0
    return ParameterBytes(BYTES[dtype], master + 2 * BYTES[moments])


def engine_bytes(values: float, dtype: str, *, receives: bool = True) -> float:
    """Return bytes of an engine's weights, with the receive buffer of pushes (docs/push.md).

    Args:
        values: the number of weights.
        dtype: the engine's.
        receives: whether there is a receive buffer."""
    return values * BYTES[dtype] * (1 + receives)


def cache_bytes_per_token(hf_config: HFConfig, value: int = 2, mtp_layers: int = 0) -> int:
    """Return KV cache bytes of one token in all layers, with those that draft.

    Latent attention caches the latent and the rotary key once for all heads (70,272 B for
    DeepSeek-V3 in bf16, as published: arXiv 2505.09343, table 1).

    Args:
        hf_config: the model's `config.json`.
        value: bytes of a number.
        mtp_layers: MTP layers that draft."""
    if hf_config.get("kv_lora_rank"):
        values = hf_config["kv_lora_rank"] + hf_config["qk_rope_head_dim"]
    else:
        values = key_value_heads(hf_config) * sum(head_sizes(hf_config))
    return (hf_config["num_hidden_layers"] + mtp_layers) * values * value


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of values on a rank.

    Attributes:
        dense: trained parameters whose gradients data parallelism reduces.
        expert: those of routed experts, whose gradients expert data parallelism reduces.
        frozen: parameters that are not trained, with model.lora all but the adapters.
        dense_padded: `dense` with every parameter padded to a multiple of 64, as in Megatron's
            gradient buffers (param_and_grad_buffer.py, _pad_start_of_param_if_needed).
        expert_padded: `expert` with every parameter padded to that multiple.
        buffers: fp32 values that are not parameters.
        frozen_expert: those of `frozen` that are of routed experts in frozen MTP layers."""

    dense: int = 0
    expert: int = 0
    frozen: int = 0
    dense_padded: int = 0
    expert_padded: int = 0
    buffers: int = 0
    frozen_expert: int = 0

    def __add__(self, addend: ParameterCounts) -> ParameterCounts:
        return ParameterCounts(*map(add, vars(self).values(), vars(addend).values()))

    def __mul__(self, times: int) -> ParameterCounts:
        return ParameterCounts(*(value * times for value in vars(self).values()))

    @property
    def trained(self) -> int:
        """Parameters that an optimizer updates."""
        return self.dense + self.expert

    @property
    def parameters(self) -> int:
        """All parameters, frozen ones included."""
        return self.trained + self.frozen


def count_parameters(
    entries: Mapping[str, LayoutEntry],
    mtp: str,
    adapters: Mapping[str, LayoutEntry] | None = None,
) -> ParameterCounts:
    """Return the counts of a rank's layout.

    Args:
        entries: the rank's layout, by the parameter's name.
        mtp: `model.mtp`.
        adapters: the layout of what alone is trained, if there is one."""

    def count(name: str, entry: LayoutEntry) -> ParameterCounts:
        values = math.prod(entry.shape)
        if entry.dtype:
            return ParameterCounts(buffers=values)
        if name.startswith("mtp.") and mtp == "frozen":
            return ParameterCounts(frozen=values, frozen_expert=values * entry.is_expert)
        num_padded = -(-values // 64) * 64
        if entry.is_expert:
            return ParameterCounts(expert=values, expert_padded=num_padded)
        return ParameterCounts(dense=values, dense_padded=num_padded)

    counts = sum((count(*item) for item in entries.items()), ParameterCounts())
    if adapters is None:
        return counts
    frozen_counts = ParameterCounts(frozen=counts.parameters, buffers=counts.buffers)
    return frozen_counts + count_parameters(adapters, mtp)


def persistent_bytes(
    config: Config, counts: ParameterCounts, optimizer_shards: tuple[int, int], moments: str
) -> dict[str, int]:
    """Return bytes of parameters, gradients and optimizer state on a rank.

    DDP's buffers pad each parameter to 64 values and the whole to a multiple of 128 and of the
    number of replicas; the optimizer state is sharded over the replicas.

    Args:
        config: the recipe.
        counts: the rank's parameters.
        optimizer_shards: the ranks that share dense parameters, and those that share experts.
        moments: the dtype of the moments on this device."""
    per_parameter = parameter_bytes(config.model.dtype, moments)
    num_dense, num_expert = _gradient_buffer_sizes(counts, optimizer_shards)
    num_sharded = num_dense / optimizer_shards[0] + num_expert / optimizer_shards[1]
    values = num_dense + num_expert + counts.frozen
    return {
        "parameters": values * per_parameter.value + FP32_BYTES * counts.buffers,
        "gradients": (num_dense + num_expert) * per_parameter.gradient,
        "optimizer": round(num_sharded * per_parameter.optimizer),
    }


def checkpoint_bytes(
    config: Config,
    counts: ParameterCounts,
    optimizer_shards: tuple[int, int],
    *,
    with_reference: bool,
) -> int:
    """Return bytes of the host buffers for checkpoints (`trainer.checkpoints.staging`) of the rank
    of a stage that writes most.

    Replicas share what they write: the weights, which the reference doubles, and the optimizer's
    fp32 master weights and moments. Those on other tensor ranks write no share of an expert.

    Args:
        config: the recipe.
        counts: the rank's parameters.
        optimizer_shards: the ranks that share dense parameters, and those that share experts.
        with_reference: whether a reference is kept."""
    num_dense_writers, num_expert_writers = optimizer_shards[0], min(optimizer_shards)
    num_trained = counts.dense / num_dense_writers + counts.expert / num_expert_writers
    num_written, num_buffers = num_trained, 0
    if config.model.lora is None:  # frozen MTP layers; next to adapters nothing frozen is written
        num_written += (counts.frozen - counts.frozen_expert) / num_dense_writers
        num_written += counts.frozen_expert / num_expert_writers
        num_buffers = counts.buffers
    weight_bytes = num_written * BYTES[config.model.dtype] + num_buffers * FP32_BYTES
    return round(3 * FP32_BYTES * num_trained + (1 + with_reference) * weight_bytes)


def reference_bytes(config: Config, counts: ParameterCounts) -> int:
    """Return bytes of a rank's reference: of all that may change, so not of frozen weights under
    adapters."""
    num_changing = counts.parameters if config.model.lora is None else counts.trained
    return num_changing * BYTES[config.model.dtype] + FP32_BYTES * counts.buffers


def _gradient_buffer_sizes(
    counts: ParameterCounts, optimizer_shards: tuple[int, int]
) -> tuple[int, int]:
    """Return the values in the gradient buffers of dense and of expert parameters."""
    multiples = (math.lcm(num_shards, 128) for num_shards in optimizer_shards)
    sizes = (counts.dense_padded, counts.expert_padded)
    num_dense, num_expert = (-(-n // m) * m for n, m in zip(sizes, multiples, strict=True))
    return num_dense, num_expert


@dataclass(frozen=True)
class LayerActivations:
    """Activation bytes that one layer keeps for one micro-batch, by module of
    `parallel.recompute_modules`: recomputing the module frees them.

    Attributes:
        input: the layer's input.
        always: kept unless recomputation is full.
        modules: `parallel.recompute_modules`' name of a module → bytes that its recomputation
            frees.
        dispatch: buffers of the token exchange while the layer runs.
    """

    input: int
    always: int
    modules: dict[str, int]
    dispatch: int

    @property
    def total(self) -> int:
        """Bytes that a layer keeps for its backward pass without recomputation."""
        return self.input + self.always + sum(self.modules.values())

    def saved_bytes(self, parallel: ParallelConfig) -> int:
        """Return the bytes kept from the forward pass to the backward pass."""
        if parallel.recompute == "full":
            return self.input
        dropped_modules = set(
            parallel.recompute_modules if parallel.recompute == "selective" else ()
        )
        if "moe" in dropped_modules:
            dropped_modules |= _INSIDE_MOE
        saved_sizes = (size for name, size in self.modules.items() if name not in dropped_modules)
        return self.input + self.always + sum(saved_sizes)

    def backward_bytes(self, parallel: ParallelConfig) -> int:
        """Return the bytes added during its backward pass, by recomputation and dispatch."""
        return self.total - self.saved_bytes(parallel) + self.dispatch


def layer_activations(
    hf_config: HFConfig,
    config: Config,
    tokens: float,
    *,
    sparse: bool,
    imbalance: float = 1.0,
    local: bool = False,
) -> LayerActivations:
    """Return the activations of a decoder layer on a rank.

    Two token counts: `split` tokens if sequence parallelism divides the sequence over the
    tensor-parallel ranks (norms, residuals, latents, routed experts), `all_tokens` if a rank has
    all tokens and its part of heads or features.

    Args:
        hf_config: the model's `config.json`.
        config: the recipe, for layout and dtype.
        tokens: the number of tokens of the micro-batch.
        sparse: whether the layer has routed experts, not a dense MLP.
        imbalance: tokens of the busiest rank's experts, over the mean.
        local: whether the layers are those without Transformer Engine (`models/layers.py`), which
            keep more: unfused products, copies of queries, keys and values in batches.
    """
    parallel, value = config.parallel, BYTES[config.model.dtype]
    tensor, num_extra = parallel.tensor, int(local)
    all_tokens = tokens / parallel.context
    divides = parallel.splits_sequences(bool(hf_config.get("n_routed_experts")))
    split = all_tokens / tensor if divides else all_tokens
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"] / tensor
    head_size, out_size = head_sizes(hf_config)
    modules = {"layernorm": 2 * hidden * split * value}
    always_bytes = hidden * split * value  # the residual between attention and MLP
    if key := hf_config.get("kv_lora_rank"):
        query = hf_config.get("q_lora_rank") or 0
        latents = ((2 + num_extra) * (query + key) + hf_config["qk_rope_head_dim"]) * split
        always_bytes += (latents + heads * out_size * all_tokens) * value
        # Local layers: the heads' rotary part; q, k and v in batches of one head size.
        copies = num_extra * (2 * head_size + out_size + 3 * max(head_size, out_size))
        modules["mla_up_proj"] = heads * (2 * head_size + out_size + copies) * all_tokens * value
    else:
        # With fewer key and value heads than ranks, several ranks have the same one.
        groups = max(key_value_heads(hf_config), tensor) / tensor
        # Local layers: q and k before and after their positions; q, k and v in batches.
        always_bytes += (2 + 3 * num_extra) * (heads + groups) * head_size * all_tokens * value
    modules["core_attn"] = 4 * heads * all_tokens
    dispatch = 0.0
    if sparse:
        num_routed = hf_config["num_experts_per_tok"] * split
        intermediate_size = hf_config["moe_intermediate_size"]
        at_expert = num_routed * imbalance * parallel.expert_tensor
        local_intermediate = intermediate_size / parallel.expert_tensor
        scores = (3 + num_extra) * FP32_BYTES * hf_config["n_routed_experts"] * split
        values_per_token = (1 + num_extra) * hidden + (2 + num_extra) * local_intermediate
        modules["moe"] = at_expert * values_per_token * value + scores
        modules["moe_act"] = at_expert * local_intermediate * value
        shared_size = intermediate_size * (hf_config.get("n_shared_experts") or 0)
        modules["shared_experts"] = (3 + num_extra) * shared_size / tensor * all_tokens * value
        # The sent and the received tokens, sorted by expert, exist at once.
        dispatch = 2 * at_expert * hidden * value
    else:
        modules["mlp"] = (
            (3 + num_extra) * hf_config["intermediate_size"] / tensor * all_tokens * value
        )
    module_bytes = {name: round(num_bytes) for name, num_bytes in modules.items()}
    return LayerActivations(
        round(hidden * split * value), round(always_bytes), module_bytes, round(dispatch)
    )


def head_bytes(
    shape: tuple[int, ...], config: Config, tokens: float, *, on_gpu: bool, has_experts: bool
) -> tuple[int, str]:
    """Return (bytes, formula) of a rank's fused loss head (docs/kernels.md).

    One chunk of fp32 logits and one of their gradient; the hidden states and their gradient, whole
    along the sequence; the weight's gradient in fp32 while it is summed over chunks, and its zeros
    in the parameter's dtype, with which Megatron's hook is called; on a CPU an fp32 copy of a bf16
    weight, for its products. An upper bound: the zeros are made when the chunks are freed.
    Measured on a CPU, 49,152 columns of 576: 0.23 GB in fp32, 0.42 to 0.47 in bf16. A score head
    has states in fp32 for the product and its gradient.

    Args:
        shape: (outputs, features) of the head.
        config: the recipe, for layout and dtype.
        tokens: the number of tokens of the micro-batch.
        on_gpu: whether chunks are those of a GPU.
        has_experts: whether the model has experts.
    """
    (outputs, hidden), parallel = shape, config.parallel
    rows, value = int(tokens) // parallel.context, BYTES[config.model.dtype]
    if outputs == 1:
        rows //= parallel.tensor if parallel.splits_sequences(has_experts) else 1
        return rows * hidden * 8, f"{rows} x {hidden} states x (4 + 4) B"
    columns = -(-outputs // parallel.tensor)
    max_rows = max(GPU_CHUNK_TOKENS, GPU_CHUNK_ELEMENTS // columns)
    chunk = min(rows, max_rows if on_gpu else max(16, CPU_CHUNK_ELEMENTS // columns))
    # In fp32, the gradient overwrites the logits where no other rank has a part of them.
    width = FP32_BYTES if value == FP32_BYTES and parallel.tensor == 1 else FP32_BYTES + value
    num_bytes = chunk * columns * width + rows * hidden * 2 * value
    formula = f"{chunk} x {columns} logits x {width} B + {rows} x {hidden} states x {2 * value} B"
    if not on_gpu and value != FP32_BYTES:
        num_bytes += columns * hidden * FP32_BYTES
    if config.model.lora is not None:
        return num_bytes, formula  # the head is frozen
    formula += f" + {columns} x {hidden} weight gradient x {FP32_BYTES + value} B"
    return num_bytes + columns * hidden * (FP32_BYTES + value), formula
