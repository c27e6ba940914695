"""The engines' weights and KV cache on a GPU, seconds of a rollout, bytes of its samples; the
teacher's engines of on-policy distillation."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.config import Config
from megatron_r1.engines.server.from_recipe import positions
from megatron_r1.engines.server.recipe_checks import check_ranks
from megatron_r1.models.experts import routing_shape
from megatron_r1.models.hf_config import key_value_heads, load_config, read_hf_config
from megatron_r1.models.memory import BYTES, cache_bytes_per_token
from megatron_r1.plan.counts import ModelCounts, decode_flops, forward_flops
from megatron_r1.plan.exchange import BACKENDS, NCCL, ExpertExchange, Links
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import (
    drafts,
    in_fp8,
    planned_engine_layout,
    planned_rank_bytes,
    receive_buffer_bytes,
)
from megatron_r1.plan.quantity import Quantity, Section, in_bytes
from megatron_r1.plan.routing_replay import ReplayTraffic, replays
from megatron_r1.push.plan.planner import PredictedLayout
from megatron_r1.reporting.wording import counted

ID = LOGPROB = 4
"""Bytes of a token's id and of its log-probability in trainer/training_sample.py."""
LOGITS = 4
"""Bytes of a logit; logits and their log-softmax exist at once."""


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

    @cached_property
    def counts(self) -> ModelCounts:
        """The numbers of the model's parameters."""
        return ModelCounts(self.job.hf)

    @property
    def mtp_layers(self) -> int:
        """Number of layers that draft."""
        return len(self.job.weight_table.mtp) if drafts(self.job) else 0

    @property
    def drafted(self) -> int:
        """Tokens that a pass verifies next to the one that follows anyway. 0 for drafts from text:
        their acceptance is not known before a run."""
        return self.job.config.rollout.speculative.tokens if self.mtp_layers else 0

    @property
    def tokens_a_pass(self) -> float:
        """Mean tokens of a sequence in a pass: a draft counts while all before it were right."""
        right = self.job.assumptions.draft_acceptance
        return sum(right**n for n in range(self.drafted + 1))

    @cached_property
    def whole_shared(self) -> bool:
        """Whether each GPU has the shared experts whole."""
        return PredictedLayout(self.job.hf, planned_engine_layout(self.job)).whole_shared

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
        sequences = self.cache / (self.token_bytes * self._cached)
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
    def _cached(self) -> float:
        """Mean number of cached tokens of a sequence over its lifetime."""
        return self.job.assumptions.prompt_tokens + self.job.response_tokens / 2

    def step_seconds(self, sequences: float) -> float:
        """Return seconds of one token for each of `sequences` in a group: the longer of reading
        weights and caches, and computing; and each layer's small kernels and exchanges. With drafts
        a pass computes all of them, and an MTP layer runs once for each."""
        job, hardware, assumed = self.job, self.job.hardware, self.job.assumptions
        layers = job.hf["num_hidden_layers"]
        passes = layers + self.drafted * (self.mtp_layers > 0)  # in layers
        read = self._weights_read(sequences) + sequences * self._cached * self.token_bytes
        flops = sequences * decode_flops(job.hf, self._cached, self._speedup) / self.tensor
        flops *= (1 + self.drafted) * passes / layers
        latency = self.exchange_seconds(sequences)
        if job.engine_gpus > 1:
            latency += assumed.decode_latency_per_layer * passes
        if job.config.rollout.vllm.get("enforce_eager"):
            latency += assumed.eager_latency_per_layer * passes
        seconds = latency + max(
            read / (hardware.memory_bandwidth * assumed.bandwidth_efficiency),
            flops / (hardware.bf16 * assumed.compute_efficiency),
        )
        return seconds / self.tokens_a_pass

    @property
    def _speedup(self) -> float:
        """Rate of the products with weights over bf16's."""
        return self.job.assumptions.fp8_speedup if in_fp8(self.job) else 1.0

    @cached_property
    def backend(self) -> str:
        """The name in vLLM of what exchanges the tokens of routed experts."""
        return self.job.config.rollout.vllm.get("all2all_backend", NCCL)

    @cached_property
    def experts(self) -> ExpertExchange:
        """The exchange of a layer's routed experts; within one rank where engines have none."""
        job, layout = self.job, planned_engine_layout(self.job)
        spread = layout.expert_parallel and layout.data > 1 and job.has_experts
        nodes = job.hf.get("topk_group") or math.inf  # groups of experts are laid out node by node
        return ExpertExchange(
            Links(job.hardware, job.assumptions),
            ranks=job.engine_gpus if spread else 1,
            hidden=job.hf["hidden_size"],
            chosen=job.hf.get("num_experts_per_tok", 1),
            most_nodes=nodes,
            value=1 if in_fp8(job) else 2,
        )

    def layer_exchange(self, sequences: float, backend: str) -> float:
        """Return seconds of the exchange of routed experts in one layer of a decoding pass."""
        tokens = sequences * (1 + self.drafted) / self.tensor
        return self.experts.seconds(backend, tokens)

    def exchange_seconds(self, sequences: float) -> float:
        """Return seconds of a pass's exchanges: two sums over tensor ranks in each layer, and that
        of routed experts in those that have them."""
        job = self.job
        drafting = self.drafted * (self.mtp_layers > 0)
        num_bytes = sequences * (1 + self.drafted) * job.hf["hidden_size"] * self.value
        sums = 2 * self.experts.links.all_reduce(self.tensor, num_bytes)
        exchange = self.layer_exchange(sequences, self.backend)
        layers, sparse = job.hf["num_hidden_layers"], sum(job.sparse)
        return (layers + drafting) * sums + (sparse + drafting) * exchange

    def _weights_read(self, sequences: float) -> float:
        """Return weight bytes read in a step; experts, and copies of them, without tokens are
        not read."""
        routed = self.counts.routed + (self.counts.mtp_routed if self.mtp_layers else 0)
        if not routed:
            return self.weights
        experts, chosen = self.job.hf["n_routed_experts"], self.job.hf["num_experts_per_tok"]
        held = experts + planned_engine_layout(self.job).redundant_experts  # tokens spread evenly
        together = sequences * self.job.engine_gpus / self.tensor * (1 + self.drafted)
        idle = (1 - chosen / held) ** together
        value = 1 if in_fp8(self.job) else self.value
        return self.weights - routed * held / experts / self.job.engine_gpus * value * idle

    @property
    def in_flight(self) -> int:
        """Rollouts that are sampled at once: with `rl.staleness` k, on GPUs of their own, the one
        that the trainer waits for and k later ones, which fill the engines meanwhile
        (controller/rollouts/step_sampler.py)."""
        rl = self.job.config.rl
        return 1 + rl.staleness if self.job.rollout_gpus and self.job.verb == "rl" else 1

    @property
    def longest_seconds(self) -> float:
        """Seconds of the longest response, which decides the end of a rollout: among others as long
        as a mean one, then alone, when their experts are idle; among others to its end where later
        rollouts fill the engines."""
        mean, longest = self.job.response_tokens, self.job.longest_response
        among = self.step_seconds(self.at_once)
        return mean * among + (longest - mean) * self._last_step_seconds

    @property
    def _last_step_seconds(self) -> float:
        """Seconds of one token of the longest response when its rollout's others have ended."""
        alone = min(self.at_once, 1.0) if self.in_flight == 1 else self.at_once
        return self.step_seconds(alone)

    @property
    def prefill_seconds(self) -> float:
        """Seconds in which a group computes the prompts of its sequences."""
        job, prompt = self.job, self.job.assumptions.prompt_tokens
        compute = job.hardware.bf16 * job.assumptions.compute_efficiency * self.tensor
        return self.sequences * prompt * forward_flops(job.hf, prompt, self._speedup) / compute

    @property
    def throughput_seconds(self) -> float:
        """Seconds in which the engines, full to their limits, sample as many tokens as a rollout
        has."""
        tokens, together = self.sequences * self.job.response_tokens, self.at_once
        return self.prefill_seconds + tokens / together * self.step_seconds(together)

    def seconds(self) -> tuple[float | None, str]:
        """Return (seconds from the beginning to the end of one rollout, formula); None without room
        for a sequence's cache."""
        job, together = self.job, self.at_once
        if not self.max_concurrency:
            return None, "no room for a sequence's cache"
        mean, longest = job.response_tokens, job.longest_response
        first, several = self.prefill_seconds, ""
        throughput = self.throughput_seconds
        last = first + self.longest_seconds
        if self.in_flight > 1:
            several = f" ({self.in_flight} rollouts in flight)"
        text = (
            f"prefill {first:.2g} s + the longer of: {_short(self.sequences)} x "
            f"{counted(mean, 'token')} on {counted(self.tensor, 'GPU')}, "
            f"{_short(together)} at once{several}, {_short(self.step_seconds(together) * 1e3)} ms "
            f"a token: {_short(throughput - first)} s; one response of {longest:,}, the first "
            f"{mean:,} tokens at that, the others at {_short(self._last_step_seconds * 1e3)} ms: "
            f"{_short(last - first)} s{self._drafting()}"
        )
        return max(throughput, last), text

    def _drafting(self) -> str:
        method = self.job.config.rollout.speculative.method
        if method == "none":
            return ""
        if not self.drafted:
            return f"; nothing is saved by rollout.speculative.method={method}: not predictable"
        return (
            f"; {_short(self.tokens_a_pass)} tokens a pass with {self.drafted} drafted, each right "
            f"in {self.job.assumptions.draft_acceptance:.0%} (draft_acceptance)"
        )


def _short(value: float) -> str:
    """Whole from 10 on, two digits below."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def exchange_section(engines: Engines) -> Section:
    """Return seconds of a layer's exchange of routed experts by each backend, and its bytes."""
    job, together = engines.job, engines.at_once
    if engines.experts.ranks == 1 or not together:
        return {}
    section = {}
    for backend in BACKENDS:
        used = ", the engines'" if backend == engines.backend else ""
        section[backend] = Quantity(
            engines.layer_exchange(together, backend),
            "s",
            f"{_short(together * (1 + engines.drafted) / engines.tensor)} tokens a GPU to "
            f"{engines.experts.chosen} experts on {counted(engines.experts.ranks, 'GPU')} and back"
            f"{used}; {EXCHANGE_SOURCES[backend]}",
        )
    section["sums over tensor ranks"] = Quantity(
        engines.exchange_seconds(together)
        - (sum(job.sparse) + engines.drafted * (engines.mtp_layers > 0))
        * engines.layer_exchange(together, engines.backend),
        "s",
        f"of a pass: 2 a layer over {counted(engines.tensor, 'GPU')}, NCCL's own model",
    )
    return section


EXCHANGE_SOURCES = {
    BACKENDS[0]: "all tokens to all and back around NCCL's ring, by its own model",
    BACKENDS[1]: "DeepEP's measured latency",
    BACKENDS[2]: "DeepEP's measured rate + host_stall_seconds",
}


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
            + (", shared experts too" if engines.whole_shared else "")
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
            f"{_short(engines.sequences)} of the rollout",
        ),
    }


def samples_section(job: PlannedJob) -> Section:
    """Return bytes of a rollout's samples: token ids, log-probabilities, routing."""
    prompt, response = job.assumptions.prompt_tokens, job.response_tokens
    section = {
        "ids, log-probabilities": in_bytes(
            job.num_responses * ((prompt + response) * ID + response * LOGPROB),
            f"{job.num_responses:,} samples x ({prompt + response:,} ids x {ID} B + {response:,} "
            f"log-probabilities x {LOGPROB} B)"
            + ("; rl.importance_cap reads these" if job.config.rl.importance_cap else ""),
        )
    }
    if replays(job):
        section |= ReplayTraffic(job).section()
    elif job.has_experts:
        shape = routing_shape(job.hf)
        section["routed experts"] = in_bytes(
            job.num_responses * (prompt + response) * shape.token_bytes,
            f"with rl.routing_replay: {job.num_responses:,} samples x {prompt + response:,} tokens "
            f"x {counted(len(shape.moe_layers), 'layer')} x {shape.topk} experts x "
            f"{shape.index_bytes} B",
        )
    return section


def check_teacher(config: Config) -> None:
    """Raise UserError for a teacher that does not exist, or that its ranks cannot share."""
    positions(config.teacher.path, "teacher.path")
    if not config.teacher.url:
        check_ranks(config.teacher, load_config(config.teacher.path, "teacher.path"), "teacher")


def teacher_section(job: PlannedJob) -> Section:
    """Return memory and scoring time on the teacher's own GPUs, if its model type is supported."""
    teacher = job.config.teacher
    try:
        hf = read_hf_config(teacher.path, key="teacher.path")
    except ValueError as error:
        return {"weights": in_bytes(None, f"cannot be counted: {error}")}
    ranks = teacher.tensor * teacher.pipeline * teacher.data
    gpus = (len(teacher.url) or teacher.engines) * ranks
    split, value = teacher.tensor * teacher.pipeline, BYTES[teacher.dtype]
    total, tokens = ModelCounts(hf).total, job.num_responses * job.sample_tokens
    flops = forward_flops(hf, job.sample_tokens)
    seconds = tokens * flops / (gpus * job.hardware.bf16 * job.assumptions.compute_efficiency)
    scoring = (
        f"{tokens:,} tokens x {flops:.2e} FLOP on {counted(gpus, 'GPU')}; while the students' "
        "other answers are sampled"
    )
    return {
        "weights": in_bytes(
            total * value / split, f"{total:,} x {value} B / {counted(split, 'GPU')} of an engine"
        ),
        "logits": in_bytes(
            2 * teacher.tokens_at_once * hf["vocab_size"] * LOGITS,
            f"2 x teacher.tokens_at_once={teacher.tokens_at_once} x {hf['vocab_size']} x {LOGITS} "
            "B, whole on each GPU",
        ),
        "scoring a rollout": Quantity(seconds, "s", scoring),
    }
