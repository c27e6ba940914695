"""Memory of the engines on a GPU: weights and KV cache, and the sequences that this holds at
once."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.models.hf_config import key_value_heads
from megatron_r1.models.memory import BYTES, cache_bytes_per_token
from megatron_r1.plan.engine_buffers import DEEPEP_BUFFERS, deepep_buffer_bytes, deepep_formula
from megatron_r1.plan.expert_balancer import BALANCER, balancer_bytes
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.pass_memory import pass_memory, pass_tokens
from megatron_r1.plan.push_costs import (
    drafts_with_mtp,
    planned_engine_layout,
    planned_rank_bytes,
    pushes_fp8,
    receive_buffer_bytes,
)
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity, round_number
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.reporting.formatting import format_count


@dataclass(frozen=True)
class EngineMemory:
    """All engines of a job.

    Attributes:
        job: the recipe, the sizes of its model, and the GPUs.
        trainer_bytes: bytes of the trainer that stay on the same GPU."""

    job: PlannedJob
    trainer_bytes: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one of the engines' parameters."""
        return BYTES[self.job.config.rollout.dtype]

    @property
    def tensor(self) -> int:
        """Number of GPUs that share the attention of one sequence."""
        return planned_engine_layout(self.job).tensor_parallel

    @property
    def mtp_layers(self) -> int:
        """Number of layers that draft."""
        return len(self.job.weight_table.mtp) if drafts_with_mtp(self.job) else 0

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that a pass verifies next to the one that follows anyway. 0 for drafts from text:
        their acceptance is not known before a run."""
        return self.job.config.rollout.speculative.tokens if self.mtp_layers else 0

    @cached_property
    def replicates_shared_experts(self) -> bool:
        """Whether each GPU has the shared experts whole."""
        return PredictedSharding(
            self.job.hf_config, planned_engine_layout(self.job)
        ).replicates_shared_experts

    @property
    def weight_bytes(self) -> int:
        """Bytes of an engine's weights on one of its GPUs."""
        return planned_rank_bytes(self.job)

    @property
    def receive_buffer_bytes(self) -> int:
        """Bytes on one GPU for the weights of the next push."""
        return receive_buffer_bytes(self.job, "GPU")

    @property
    def reserved_bytes(self) -> float:
        """Bytes of `Assumptions.reserved` that are the engine's: half of it, context and NCCL's
        buffers, as its activations are counted (`passes`)."""
        return self.job.assumptions.reserved / 2

    @property
    def free_bytes(self) -> float:
        """Bytes of a GPU that are not the trainer's, nor the receive buffer's."""
        other_bytes = self.trainer_bytes + self.reserved_bytes if self.trainer_bytes else 0
        return self.job.hardware.memory - other_bytes - self.receive_buffer_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes left for KV cache on one GPU; negative if even the weights do not fit."""
        fraction = self.job.config.rollout.gpu_memory
        engine_bytes = (
            self.free_bytes
            if fraction is None
            else min(self.free_bytes, fraction * self.job.hardware.memory)
        )
        used_bytes = self.weight_bytes + sum(self.buffers.values()) + self.pass_bytes()
        return round(engine_bytes - self.reserved_bytes - used_bytes)

    @cached_property
    def passes(self) -> QuantityTable:
        """What passes of the engine allocate, by kind."""
        return pass_memory(self.job, pass_tokens(self.job))

    def pass_bytes(self, tokens: int | None = None) -> float:
        """Return the bytes of `passes`, or of passes of so many tokens."""
        passes = self.passes if tokens is None else pass_memory(self.job, tokens)
        return sum(part.number for part in passes.values())

    def tokens_that_free(self, num_bytes: float) -> int:
        """Return the most tokens of a pass with which the cache has so many bytes more; at most 0
        if there are none."""
        tokens = pass_tokens(self.job)
        per_token = self.pass_bytes(tokens) - self.pass_bytes(tokens - 1)
        return tokens - math.ceil(num_bytes / per_token)

    @cached_property
    def buffers(self) -> dict[str, int]:
        """Bytes of a GPU for the balancer of experts and for DeepEP, by kind; without zeros."""
        sizes = {BALANCER: balancer_bytes(self.job), DEEPEP_BUFFERS: deepep_buffer_bytes(self.job)}
        return {kind: size for kind, size in sizes.items() if size}

    @property
    def token_bytes(self) -> float:
        """Cache bytes of a token on each GPU that attends to it: latents whole, heads shared."""
        num_bytes = cache_bytes_per_token(self.job.hf_config, self.parameter_bytes, self.mtp_layers)
        if self.job.latent_attention:
            return num_bytes
        return num_bytes / min(self.tensor, key_value_heads(self.job.hf_config))

    @property
    def sequences(self) -> float:
        """Sequences of a rollout for each group of `tensor` GPUs."""
        return self.job.num_responses * self.tensor / (self.job.rollout_gpus or self.job.world_size)

    @property
    def max_concurrency(self) -> float:
        """Sequences whose cache such a group can hold; less than one counts as 0."""
        sequences = self.cache_bytes / (self.token_bytes * self.cached_tokens)
        return sequences if sequences >= 1 else 0.0

    @property
    def mean_concurrency(self) -> float:
        """Mean number of sequences that such a group decodes together, limited by cache and
        settings. Of several rollouts (`rollouts_in_flight`) most are in a part where only long
        responses are left."""
        concurrency = self.sequences
        if self.rollouts_in_flight > 1:
            fraction = self.job.response_tokens / self.job.max_response_tokens
            concurrency = max(
                min(1.0, concurrency), concurrency * self.rollouts_in_flight * fraction
            )
        return min(concurrency, self.max_concurrency, self.job.config.rollout.max_num_seqs)

    @property
    def cached_tokens(self) -> float:
        """Mean number of cached tokens of a sequence over its lifetime."""
        return self.job.assumptions.prompt_tokens + self.job.response_tokens / 2

    @property
    def rollouts_in_flight(self) -> int:
        """Rollouts that are sampled at once.

        With `rl.staleness` k, on GPUs of their own, the one that the trainer waits for and k later
        ones, which fill the engines meanwhile (controller/rollouts/step_sampler.py)."""
        rl = self.job.config.rl
        return 1 + rl.staleness if self.job.rollout_gpus and self.job.verb == "rl" else 1


def rollout_section(engines: EngineMemory) -> QuantityTable:
    """Return the memory of one engine GPU."""
    job = engines.job
    shortage = (
        f"no room, {byte_quantity(-engines.cache_bytes)} short: " if engines.cache_bytes < 0 else ""
    )
    copies = planned_engine_layout(job).redundant_experts
    section = {}
    if engines.trainer_bytes:
        section["share, at most"] = Quantity(
            math.floor(100 * engines.free_bytes / job.hardware.memory) / 100,
            "share",
            f"rollout.gpu_memory: memory - trainer's {byte_quantity(engines.trainer_bytes)} - "
            "half of reserved; an engine's weights, buffers, cache and activations",
        )
    formulas = {
        BALANCER: "a layer's experts on their way, maps and loads of vLLM's"
        + "; the drafter's too" * bool(engines.mtp_layers),
        DEEPEP_BUFFERS: deepep_formula(job),
    }
    buffers = {kind: byte_quantity(n, formulas[kind]) for kind, n in engines.buffers.items()}
    return section | {
        "weights": byte_quantity(
            engines.weight_bytes,
            f"its part of every tensor: attention over {format_count(engines.tensor, 'GPU')}, "
            "routed "
            f"experts{f' and {copies} copies of a layer' * bool(copies)} over {job.engine_gpus}; "
            "norms, routers, latent down-projections whole"
            + (", shared experts too" if engines.replicates_shared_experts else "")
            + ("; the drafter's among them" if engines.mtp_layers else "")
            + ("; projections in FP8 (push.fp8)" if pushes_fp8(job) else ""),
        ),
        **buffers,
        **engines.passes,
        "KV cache of a token": byte_quantity(
            cache_bytes_per_token(job.hf_config, engines.parameter_bytes, engines.mtp_layers),
            f"{job.hf_config['num_hidden_layers'] + engines.mtp_layers} layers x values a layer x "
            f"{engines.parameter_bytes} B"
            + ("; the MTP layers' among them" if engines.mtp_layers else ""),
        ),
        "KV cache": byte_quantity(
            max(0, engines.cache_bytes), f"{shortage}{_cache_formula(engines)}"
        ),
        "tokens cached": Quantity(
            max(0, int(engines.cache_bytes / engines.token_bytes)),
            "tokens",
            "KV cache / a token's bytes",
        ),
        "sequences at once": Quantity(
            round(engines.mean_concurrency, 2),
            "",
            f"on {format_count(engines.tensor, 'GPU')}; least of cache, rollout.max_num_seqs and "
            f"its {round_number(engines.sequences)} of the rollout",
        ),
    }


def _cache_formula(engines: EngineMemory) -> str:
    """Return in words how the memory of the KV cache is computed."""
    fraction = engines.job.config.rollout.gpu_memory
    if fraction is not None:
        formula = f"rollout.gpu_memory={fraction:g} x memory - half of reserved - weights"
        return " - ".join([formula, *engines.buffers, *engines.passes])
    reserved = "reserved" if engines.trainer_bytes else "half of reserved"
    formula = " - ".join([f"memory - {reserved} - weights", *engines.buffers, *engines.passes])
    if engines.receive_buffer_bytes:
        formula += f" - receive buffer {byte_quantity(engines.receive_buffer_bytes)}"
    if engines.trainer_bytes:
        formula += f" - trainer's {byte_quantity(engines.trainer_bytes)}"
    return formula
