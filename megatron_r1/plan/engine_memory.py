"""The engines' weights and KV cache on a GPU: what they hold, and how many sequences at once."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.models.hf_config import key_value_heads
from megatron_r1.models.memory import BYTES, cache_bytes_per_token
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import (
    drafts,
    in_fp8,
    planned_engine_layout,
    planned_rank_bytes,
    receive_buffer_bytes,
)
from megatron_r1.plan.quantity import Quantity, Section, in_bytes, rounded
from megatron_r1.push.plan.planner import PredictedSharding
from megatron_r1.reporting.wording import counted


@dataclass(frozen=True)
class Engines:
    """All engines of a job.

    Attributes:
        job: the recipe, the sizes of its model, and the GPUs.
        resident: bytes of the trainer that stay on the same GPU."""

    job: PlannedJob
    resident: int = 0

    @property
    def value(self) -> int:
        """Bytes of one of the engines' parameters."""
        return BYTES[self.job.config.rollout.dtype]

    @property
    def tensor(self) -> int:
        """Number of GPUs that share the attention of one sequence."""
        return planned_engine_layout(self.job).tensor

    @property
    def mtp_layers(self) -> int:
        """Number of layers that draft."""
        return len(self.job.weight_table.mtp) if drafts(self.job) else 0

    @property
    def drafted(self) -> int:
        """Tokens that a pass verifies next to the one that follows anyway. 0 for drafts from text:
        their acceptance is not known before a run."""
        return self.job.config.rollout.speculative.tokens if self.mtp_layers else 0

    @cached_property
    def replicates_shared_experts(self) -> bool:
        """Whether each GPU has the shared experts whole."""
        return PredictedSharding(
            self.job.hf, planned_engine_layout(self.job)
        ).replicates_shared_experts

    @property
    def weights(self) -> int:
        """Bytes of an engine's weights on one of its GPUs."""
        return planned_rank_bytes(self.job)

    @property
    def receive_buffer(self) -> int:
        """Bytes on one GPU for the weights of the next push."""
        return receive_buffer_bytes(self.job, "GPU")

    @property
    def reserved(self) -> float:
        """Bytes of `Assumptions.reserved` that are the engine's: half of it next to a trainer."""
        return self.job.assumptions.reserved / (2 if self.resident else 1)

    @property
    def free(self) -> float:
        """Bytes of a GPU that are not the trainer's, nor the receive buffer's."""
        others = self.job.assumptions.reserved - self.reserved + self.resident
        return self.job.hardware.memory - others - self.receive_buffer

    @property
    def cache(self) -> int:
        """Bytes left for KV cache on one GPU; negative if even the weights do not fit."""
        fraction = self.job.config.rollout.gpu_memory
        taken = (
            self.free if fraction is None else min(self.free, fraction * self.job.hardware.memory)
        )
        return round(taken - self.reserved - self.weights)

    @property
    def token_bytes(self) -> float:
        """Cache bytes of a token on each GPU that attends to it: latents whole, heads shared."""
        whole = cache_bytes_per_token(self.job.hf, self.value, self.mtp_layers)
        if self.job.latent_attention:
            return whole
        return whole / min(self.tensor, key_value_heads(self.job.hf))

    @property
    def sequences(self) -> float:
        """Sequences of a rollout for each group of `tensor` GPUs."""
        return self.job.num_responses * self.tensor / (self.job.rollout_gpus or self.job.world_size)

    @property
    def max_concurrency(self) -> float:
        """Sequences whose cache such a group can hold; less than one counts as 0."""
        sequences = self.cache / (self.token_bytes * self.cached_tokens)
        return sequences if sequences >= 1 else 0.0

    @property
    def at_once(self) -> float:
        """Mean number of sequences that such a group decodes together, limited by cache and
        settings. Of several rollouts (`in_flight`) most are in a part where only long responses
        are left."""
        wanted = self.sequences
        if self.in_flight > 1:
            fraction = self.job.response_tokens / self.job.longest_response
            wanted = max(min(1.0, wanted), wanted * self.in_flight * fraction)
        return min(wanted, self.max_concurrency, self.job.config.rollout.max_num_seqs)

    @property
    def cached_tokens(self) -> float:
        """Mean number of cached tokens of a sequence over its lifetime."""
        return self.job.assumptions.prompt_tokens + self.job.response_tokens / 2

    @property
    def in_flight(self) -> int:
        """Rollouts that are sampled at once: with `rl.staleness` k, on GPUs of their own, the one
        that the trainer waits for and k later ones, which fill the engines meanwhile
        (controller/rollouts/step_sampler.py)."""
        rl = self.job.config.rl
        return 1 + rl.staleness if self.job.rollout_gpus and self.job.verb == "rl" else 1


def rollout_section(engines: Engines) -> Section:
    """Return the memory of one engine GPU."""
    job = engines.job
    short = f"no room, {in_bytes(-engines.cache)} short: " if engines.cache < 0 else ""
    fraction = job.config.rollout.gpu_memory
    if fraction is not None:
        half = "half of " if engines.resident else ""
        left = f"rollout.gpu_memory={fraction:g} x memory - {half}reserved - weights"
    else:
        left = "memory - reserved - weights"
        if engines.receive_buffer:
            left += f" - receive buffer {in_bytes(engines.receive_buffer)}"
        left += f" - trainer's {in_bytes(engines.resident)}" if engines.resident else ""
    copies = planned_engine_layout(job).redundant_experts
    most = {}
    if engines.resident:
        most["share, at most"] = Quantity(
            math.floor(100 * engines.free / job.hardware.memory) / 100,
            "share",
            f"rollout.gpu_memory: memory - trainer's {in_bytes(engines.resident)} - half of "
            "reserved; an engine's weights, cache and activations",
        )
    return most | {
        "weights": in_bytes(
            engines.weights,
            f"its part of every tensor: attention over {counted(engines.tensor, 'GPU')}, routed "
            f"experts{f' and {copies} copies of a layer' * bool(copies)} over {job.engine_gpus}; "
            "norms, routers, latent down-projections whole"
            + (", shared experts too" if engines.replicates_shared_experts else "")
            + ("; the drafter's among them" if engines.mtp_layers else "")
            + ("; projections in FP8 (push.fp8)" if in_fp8(job) else ""),
        ),
        "KV cache of a token": in_bytes(
            cache_bytes_per_token(job.hf, engines.value, engines.mtp_layers),
            f"{job.hf['num_hidden_layers'] + engines.mtp_layers} layers x values a layer x "
            f"{engines.value} B" + ("; the MTP layers' among them" if engines.mtp_layers else ""),
        ),
        "KV cache": in_bytes(max(0, engines.cache), f"{short}{left}"),
        "tokens cached": Quantity(
            max(0, int(engines.cache / engines.token_bytes)), "tokens", "KV cache / a token's bytes"
        ),
        "sequences at once": Quantity(
            round(engines.at_once, 2),
            "",
            f"on {counted(engines.tensor, 'GPU')}; least of cache, rollout.max_num_seqs and its "
            f"{rounded(engines.sequences)} of the rollout",
        ),
    }
