"""Seconds of a rollout on its engines."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.plan.counts import ModelCounts
from megatron_r1.plan.engine_buffers import exchange_backend, spreads_experts
from megatron_r1.plan.engine_communication import (
    BACKENDS,
    HIGH_THROUGHPUT,
    LOW_LATENCY,
    NCCL,
    EngineInterconnect,
    ExpertExchange,
)
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.flops import decode_flops, forward_flops
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import planned_engine_layout, pushes_fp8
from megatron_r1.plan.quantity import Quantity, QuantityTable, round_number
from megatron_r1.reporting.formatting import format_count


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of the engines' passes, and of a rollout.

    Attributes:
        engines: the engines, with as many sequences at once as fit."""

    engines: EngineMemory

    @property
    def job(self) -> PlannedJob:
        """The job whose engines they are."""
        return self.engines.job

    @cached_property
    def counts(self) -> ModelCounts:
        """The numbers of the model's parameters."""
        return ModelCounts(self.job.hf_config)

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens of a sequence in a pass: a draft counts while all before it were right."""
        acceptance = self.job.assumptions.draft_acceptance
        return mean_pass_tokens(acceptance, self.engines.num_draft_tokens)

    def step_seconds(self, sequences: float) -> float:
        """Return seconds of one token for each of `sequences` in a group.

        They are the longer of reading weights and caches, and computing; each layer's small kernels
        and exchanges; and what the host does between passes. With drafts a pass computes all of
        them, and an MTP layer runs once for each."""
        job, hardware, assumptions = self.job, self.job.hardware, self.job.assumptions
        engines = self.engines
        layers = job.hf_config["num_hidden_layers"]
        passes = layers + engines.num_draft_tokens * (engines.mtp_layers > 0)  # in layers
        cached_tokens = engines.cached_tokens
        read_bytes = self._weights_read(sequences) + sequences * cached_tokens * engines.token_bytes
        flops = (
            sequences
            * decode_flops(job.hf_config, cached_tokens, self._matmul_speedup)
            / engines.tensor
        )
        flops *= (1 + engines.num_draft_tokens) * passes / layers
        latency = assumptions.pass_seconds + self.exchange_seconds(sequences)
        if job.engine_gpus > 1:
            latency += assumptions.decode_latency_per_layer * passes
        if job.config.rollout.vllm.get("enforce_eager"):
            latency += assumptions.eager_latency_per_layer * passes
        seconds = latency + max(
            read_bytes / (hardware.memory_bandwidth * assumptions.bandwidth_efficiency),
            flops / (hardware.bf16 * assumptions.compute_efficiency),
        )
        return seconds / self.tokens_per_pass

    @property
    def _matmul_speedup(self) -> float:
        """Rate of the products with weights over bf16's."""
        return self.job.assumptions.fp8_speedup if pushes_fp8(self.job) else 1.0

    @cached_property
    def backend(self) -> str:
        """The name in vLLM of what exchanges the tokens of routed experts."""
        return exchange_backend(self.job) or NCCL

    @cached_property
    def experts(self) -> ExpertExchange:
        """The exchange of a layer's routed experts; within one rank where engines have none."""
        job = self.job
        # Groups of experts are laid out node by node.
        max_nodes = job.hf_config.get("topk_group") or math.inf
        return ExpertExchange(
            EngineInterconnect(job.hardware, job.assumptions),
            ranks=job.engine_gpus if spreads_experts(job) else 1,
            hidden=job.hf_config["hidden_size"],
            topk=job.hf_config.get("num_experts_per_tok", 1),
            max_nodes=max_nodes,
            value=1 if pushes_fp8(job) else 2,
        )

    def layer_exchange(self, sequences: float, backend: str) -> float:
        """Return seconds of the exchange of routed experts in one layer of a decoding pass."""
        tokens = sequences * (1 + self.engines.num_draft_tokens) / self.engines.tensor
        return self.experts.seconds(backend, tokens)

    def exchange_seconds(self, sequences: float) -> float:
        """Return seconds of a pass's exchanges: two sums over tensor ranks in each layer, and that
        of routed experts in those that have them."""
        job, engines = self.job, self.engines
        draft_layers = engines.num_draft_tokens * (engines.mtp_layers > 0)
        num_bytes = (
            sequences
            * (1 + engines.num_draft_tokens)
            * job.hf_config["hidden_size"]
            * engines.parameter_bytes
        )
        sum_seconds = 2 * self.experts.links.all_reduce_seconds(engines.tensor, num_bytes)
        expert_seconds = self.layer_exchange(sequences, self.backend)
        layers, sparse_layers = job.hf_config["num_hidden_layers"], sum(job.is_sparse_layer)
        tensor_seconds = (layers + draft_layers) * sum_seconds
        return tensor_seconds + (sparse_layers + draft_layers) * expert_seconds

    @property
    def exchange_fraction(self) -> float:
        """The share (0 to 1) of a pass's seconds in which ranks exchange tokens."""
        sequences = self.engines.mean_concurrency
        if not sequences:
            return 0.0
        pass_seconds = self.step_seconds(sequences) * self.tokens_per_pass
        return self.exchange_seconds(sequences) / pass_seconds

    def _weights_read(self, sequences: float) -> float:
        """Return weight bytes read in a step; experts, and copies of them, without tokens are
        not read."""
        engines = self.engines
        routed_parameters = self.counts.num_routed + (
            self.counts.mtp_routed if engines.mtp_layers else 0
        )
        if not routed_parameters:
            return engines.weight_bytes
        experts = self.job.hf_config["n_routed_experts"]
        topk = self.job.hf_config["num_experts_per_tok"]
        # Tokens spread evenly.
        held_experts = experts + planned_engine_layout(self.job).redundant_experts
        tokens = sequences * self.job.engine_gpus / engines.tensor * (1 + engines.num_draft_tokens)
        idle_fraction = (1 - topk / held_experts) ** tokens
        value = 1 if pushes_fp8(self.job) else engines.parameter_bytes
        held_parameters = routed_parameters * held_experts / experts / self.job.engine_gpus
        return engines.weight_bytes - held_parameters * value * idle_fraction

    @property
    def longest_seconds(self) -> float:
        """Seconds of the longest response, which decides the end of a rollout.

        It is among others as long as a mean one, then alone, when their experts are idle; among
        others to its end where later rollouts fill the engines."""
        mean, longest = self.job.response_tokens, self.job.max_response_tokens
        token_seconds = self.step_seconds(self.engines.mean_concurrency)
        return mean * token_seconds + (longest - mean) * self._last_step_seconds

    @property
    def _last_step_seconds(self) -> float:
        """Seconds of one token of the longest response when its rollout's others have ended."""
        engines = self.engines
        concurrency = (
            min(engines.mean_concurrency, 1.0)
            if engines.rollouts_in_flight == 1
            else engines.mean_concurrency
        )
        return self.step_seconds(concurrency)

    @property
    def prefill_seconds(self) -> float:
        """Seconds in which a group computes the prompts of its sequences."""
        job, prompt = self.job, self.job.assumptions.prompt_tokens
        compute = job.hardware.bf16 * job.assumptions.compute_efficiency * self.engines.tensor
        flops = prompt * forward_flops(job.hf_config, prompt, self._matmul_speedup)
        return self.engines.sequences * flops / compute

    @property
    def throughput_seconds(self) -> float:
        """Seconds in which the engines, full to their limits, sample as many tokens as a rollout
        has."""
        tokens = self.engines.sequences * self.job.response_tokens
        concurrency = self.engines.mean_concurrency
        return self.prefill_seconds + tokens / concurrency * self.step_seconds(concurrency)

    def seconds(self) -> tuple[float | None, str]:
        """Return (seconds from the beginning to the end of one rollout, formula); None without room
        for a sequence's cache."""
        engines = self.engines
        job, concurrency = self.job, engines.mean_concurrency
        if not engines.max_concurrency:
            return None, "no room for a sequence's cache"
        mean, longest = job.response_tokens, job.max_response_tokens
        prefill_seconds, flight_note = self.prefill_seconds, ""
        throughput_seconds = self.throughput_seconds
        end_seconds = prefill_seconds + self.longest_seconds
        if engines.rollouts_in_flight > 1:
            flight_note = f" ({engines.rollouts_in_flight} rollouts in flight)"
        text = (
            f"prefill {prefill_seconds:.2g} s + the longer of: {round_number(engines.sequences)} x "
            f"{format_count(mean, 'token')} on {format_count(engines.tensor, 'GPU')}, "
            f"{round_number(concurrency)} at once{flight_note}, "
            f"{round_number(self.step_seconds(concurrency) * 1e3)} ms a token: "
            f"{round_number(throughput_seconds - prefill_seconds)} s; one response of "
            f"{longest:,}, the first {mean:,} tokens at that, the others at "
            f"{round_number(self._last_step_seconds * 1e3)} ms: "
            f"{round_number(end_seconds - prefill_seconds)} s{self._draft_note()}"
        )
        return max(throughput_seconds, end_seconds), text

    def _draft_note(self) -> str:
        method = self.job.config.rollout.speculative.method
        if method == "none":
            return ""
        if not self.engines.num_draft_tokens:
            return f"; nothing is saved by rollout.speculative.method={method}: not predictable"
        return (
            f"; {round_number(self.tokens_per_pass)} tokens a pass with "
            f"{self.engines.num_draft_tokens} drafted, "
            f"each right in {self.job.assumptions.draft_acceptance:.0%} (draft_acceptance)"
        )


def mean_pass_tokens(acceptance: float, num_drafts: int) -> float:
    """Return the mean tokens that a sequence gains in a pass.

    Args:
        acceptance: the probability with which a drafted token is accepted if all drafts before it
            are.
        num_drafts: drafted tokens of a pass."""
    return sum(acceptance**n for n in range(num_drafts + 1))


TENSOR_SUMS = "sums over tensor ranks"


def exchange_section(rollout: RolloutTime) -> QuantityTable:
    """Return seconds of a layer's exchange of routed experts by each backend, and of a pass's sums
    over tensor ranks. DeepEP's have their range: no rate of a link closes it."""
    engines = rollout.engines
    job, concurrency = engines.job, engines.mean_concurrency
    if rollout.experts.ranks == 1 or not concurrency:
        return {}
    section = {}
    for backend in BACKENDS:
        owner = ", the engines'" if backend == rollout.backend else ""
        quantity = Quantity(
            rollout.layer_exchange(concurrency, backend),
            "s",
            f"{round_number(concurrency * (1 + engines.num_draft_tokens) / engines.tensor)} tokens "
            f"a GPU to {rollout.experts.topk} experts on "
            f"{format_count(rollout.experts.ranks, 'GPU')} and back{owner}; "
            f"{EXCHANGE_SOURCES[backend]}",
        )
        section[backend] = (
            quantity if backend == NCCL else quantity.with_spread(job.assumptions.time_spread)
        )
    section[TENSOR_SUMS] = Quantity(
        rollout.exchange_seconds(concurrency)
        - (sum(job.is_sparse_layer) + engines.num_draft_tokens * (engines.mtp_layers > 0))
        * rollout.layer_exchange(concurrency, rollout.backend),
        "s",
        f"of a pass: 2 a layer over {format_count(engines.tensor, 'GPU')}, NCCL's own model",
    )
    return section


EXCHANGE_SOURCES = {
    NCCL: "all tokens to all and back around NCCL's ring, by its own model",
    LOW_LATENCY: "DeepEP's measured latency",
    HIGH_THROUGHPUT: "DeepEP's measured rate + host_stall_seconds",
}
