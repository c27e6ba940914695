"""The whole estimate of a job: every section, and what does not fit."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_r1.plan.communication import communication_section
from megatron_r1.plan.communicators import COMMUNICATORS
from megatron_r1.plan.counts import parameter_section
from megatron_r1.plan.engine_buffers import DEEPEP_BUFFERS, exchange_backend
from megatron_r1.plan.engine_communication import LOW_LATENCY
from megatron_r1.plan.engine_memory import EngineMemory, rollout_section
from megatron_r1.plan.exchange_overlap_time import StepEstimate, exchange_choice, unpaired_fraction
from megatron_r1.plan.expert_balancer import moved_experts_section
from megatron_r1.plan.flops import flops_section
from megatron_r1.plan.hardware import described_fields, unit_of
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.memory import RECEIVE_BUFFER, RankMemory, memory_section, rank_memory
from megatron_r1.plan.offload import OFFLOADED_MEMORY, offload_disk
from megatron_r1.plan.pass_memory import NOT_ASKED, decoded_tokens, not_asked
from megatron_r1.plan.push_costs import push_section, receive_buffer_bytes, reused_kv_cache_bytes
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.plan.rollout import exchange_section
from megatron_r1.plan.sample_traffic import ROUTED_EXPERTS, samples_section
from megatron_r1.plan.step_time import StepTime
from megatron_r1.plan.teacher import teacher_section
from megatron_r1.plan.time_ranges import narrowing_section, with_range
from megatron_r1.plan.timing import time_section
from megatron_r1.reporting.formatting import format_count

KIND_MEANINGS = {
    RECEIVE_BUFFER: ", weights on their way into an engine",
    ROUTED_EXPERTS: ", of the longest responses, while samples are loaded",
}
"""Additions to the formula of kinds of host memory whose name is unclear."""
SMALLER_RECEIVE_BUFFER = "give each engine more GPUs"
"""The remedy that makes an engine rank's receive buffer smaller."""
FEWER_BUFFERED_TOKENS = "lower max_num_batched_tokens of rollout.vllm"
"""The remedy that makes workspaces, and DeepEP's buffers of low latency, smaller."""


def estimate_step(job: PlannedJob) -> StepEstimate:
    """Return what a job's optimizer step takes."""
    times = StepTime(job, EngineMemory(job))
    rank = times.busiest_rank
    peak = max(memory.peak_bytes for memory in rank_memory(job))
    return StepEstimate(
        times.optimizer_step_seconds(),
        times.expert_exchange_seconds(rank),
        unpaired_fraction(job, rank),
        peak,
    )


@dataclass(frozen=True)
class JobEstimate:
    """The estimate of a job that passes `check_trainer` and `check_engines_and_push`."""

    job: PlannedJob

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """The trainer's pipeline ranks; empty if nothing is trained."""
        return rank_memory(self.job) if self.job.trains else []

    @cached_property
    def peak_rank(self) -> RankMemory:
        """The memory of the rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @cached_property
    def engines(self) -> EngineMemory:
        """The engines, with what ranks on the same GPUs leave them."""
        shares_gpus = self.job.trains and not self.job.rollout_gpus
        # At least a byte where they share: 0 says that the GPUs are the engines' alone.
        resident_bytes = max(1, *(rank.resident_bytes for rank in self.ranks)) if shares_gpus else 0
        return EngineMemory(self.job, resident_bytes)

    @cached_property
    def times(self) -> StepTime:
        """The times of a step's phases."""
        return StepTime(self.job, self.engines)

    @property
    def step(self) -> Quantity:
        """The time of a whole step, in seconds, with its formula."""
        return time_section(self.times)["step"]

    def sections(self) -> dict[str, QuantityTable]:
        """Return the sections of a trainer, of engines, or of both, as the verb has them."""
        job = self.job
        sections = {"parameters": parameter_section(job)}
        if job.trains:
            title = f"memory of pipeline rank {self.peak_rank.rank}, the fullest"
            sections[title] = memory_section(job, self.peak_rank)
            sections["host memory of a node"] = self._host_memory()
            if disk := offload_disk(job):
                sections["local disk of a node"] = disk
        if job.generates:
            sections["engine memory of a GPU"] = rollout_section(self.engines)
            if host := self._engines_host():
                sections["host memory of an engines' node"] = host
        for key, teacher in job.config.teacher.sections.items():
            name = "engine memory of a teacher's GPU" + ("" if key == "teacher" else f", {key}")
            sections[name] = teacher_section(job, key, teacher)
        if job.trains and job.generates:
            sections["samples of a rollout"] = samples_section(job)
            push = push_section(job) | moved_experts_section(job)
            sections["push"] = {name: self._with_range(name, part) for name, part in push.items()}
        if job.trains:
            traffic = communication_section(job, self.peak_rank.rank)
            sections["sent by a rank per optimizer step"] = traffic
            if choice := exchange_choice(job, estimate_step):
                sections["exchange with experts, hidden or not"] = {
                    name: self._with_range("optimizer step", part) if part.unit == "s" else part
                    for name, part in choice.items()
                }
        sections["operations"] = flops_section(job)
        exchange = exchange_section(self.times.rollout) if job.generates else {}
        if exchange := {name: self._with_range(name, part) for name, part in exchange.items()}:
            sections["expert exchange of a layer"] = exchange
        sections["time"] = time_section(self.times)
        parts = sections["time"] | sections.get("push", {}) | exchange
        if measurements := narrowing_section(job, parts):
            sections["what would narrow the ranges"] = measurements
        sections["assumed"] = assumed_section(job)
        return sections

    def _with_range(self, name: str, quantity: Quantity) -> Quantity:
        """Return a quantity with the range of the part of a step that it belongs to."""
        return with_range(self.times, name, quantity)

    def problems(self) -> list[str]:
        """Return one sentence per limit that is exceeded: the number, the limit and the remedy."""
        problems, job = [], self.job
        if job.trains:
            problems = [
                self._gpu_problem(),
                self._host_problem(self._host_memory(), job.world_size),
            ]
            problems += [self._host_problem(self._engines_host(), job.rollout_gpus)]
        problems += (
            [self._engine_fraction(), self._cache_problem(), self._push_problem()]
            if job.generates
            else []
        )
        return [text for text in problems if text]

    def notes(self) -> list[str]:
        """Return a sentence for numbers not asked of vLLM, and one for a limit of time that an
        estimated time may exceed."""
        if not self.job.generates:
            return []
        names = ", ".join(not_asked(self.engines.passes))
        notes = [f"{NOT_ASKED} of vLLM, their rows say why: {names}"] if names else []
        if not self.engines.max_concurrency:
            return notes
        longest_seconds = Quantity(self.times.rollout.longest_seconds, "s")
        longest_response = with_range(self.times, "rollout", longest_seconds)
        limit = self.job.config.rollout.request_timeout_seconds
        if (longest_response.high or longest_response.number) > limit:
            notes.append(
                f"a response of {self.job.max_response_tokens:,} tokens is planned to take "
                f"{longest_response.limits or longest_response}, and "
                f"rollout.request_timeout_seconds={limit:g} would end it: raise that"
            )
        return notes

    def _gpu_problem(self) -> str | None:
        rank, memory = self.peak_rank, self.job.hardware.memory
        if rank.peak_bytes <= memory:
            return None
        is_training = sum(rank.training.values()) == rank.peak_bytes
        parts = rank.training if is_training else rank.logprobs
        is_reserved = parts["reserved"] >= memory
        kinds = parts if is_reserved else parts.keys() - {"reserved", COMMUNICATORS}
        largest_kind = max(kinds, key=parts.__getitem__)
        return (
            f"pipeline rank {rank.rank} needs {_byte_text(rank.peak_bytes)} of "
            f"{_byte_text(memory)} while it {'trains' if is_training else 'computes logprobs'}, "
            f"{_byte_text(parts[largest_kind])} of it {largest_kind}: "
            f"{self._memory_remedy(largest_kind)}"
        )

    def _memory_remedy(self, kind: str) -> str:
        """Return the remedy that lowers a kind of a rank's memory."""
        recomputes_all = self.job.parallel.recompute == "full"
        return {
            "activations": f"{'' if recomputes_all else 'set parallel.recompute to full, or '}"
            "raise parallel.context or .tensor",
            "layer in work": "raise parallel.context or .tensor, or lower "
            "parallel.tokens_per_microbatch",
            "loss head": "raise parallel.tensor or .context",
            "optimizer": "raise parallel.optimizer_offload, or use more GPUs",
            RECEIVE_BUFFER: SMALLER_RECEIVE_BUFFER,
            DEEPEP_BUFFERS: FEWER_BUFFERED_TOKENS,
            "reference": f"keep it away from the fullest rank: {self._split_remedy()}",
            "reserved": "use GPUs with more memory",
        }.get(kind, self._split_remedy())

    def _split_remedy(self) -> str:
        """Return the remedy that leaves a rank fewer parameters."""
        experts = "parallel.expert, .pipeline" if self.job.has_experts else "parallel.pipeline"
        return f"raise {experts} or .tensor"

    def _host_memory(self) -> QuantityTable:
        """Return the host memory of the fullest node; ranks of one pipeline stage share a node."""
        job = self.job
        fullest_rank = max(self.ranks, key=lambda rank: sum(rank.host.values()))
        kinds = dict(fullest_rank.host)
        if not job.rollout_gpus:
            kinds |= self._receive_buffer()
        return self._node_memory(kinds, job.world_size)

    def _engines_host(self) -> QuantityTable:
        """Return the host memory of a node with engines only."""
        gpus = self.job.rollout_gpus
        return self._node_memory(self._receive_buffer(), gpus) if gpus else {}

    def _receive_buffer(self) -> dict[str, int]:
        num_bytes = receive_buffer_bytes(self.job, "host")
        return {RECEIVE_BUFFER: num_bytes} if num_bytes else {}

    def _node_memory(self, kinds: dict[str, int], gpus: int) -> QuantityTable:
        """Return the sums over the ranks of one node, of `gpus` in all."""
        per_node = min(self.job.hardware.gpus_per_node, gpus)
        return {
            kind: byte_quantity(
                num_bytes * per_node,
                f"{format_count(per_node, 'rank')} x "
                f"{_byte_text(num_bytes)}{KIND_MEANINGS.get(kind, '')}",
            )
            for kind, num_bytes in kinds.items()
        }

    def _host_problem(self, parts: QuantityTable, gpus: int) -> str | None:
        """Return the problem of a node with these parts, of `gpus` in all, or None."""
        required_bytes = sum(part.number for part in parts.values())
        hardware = self.job.hardware
        memory = hardware.host_memory * min(hardware.gpus_per_node, gpus)
        if required_bytes <= memory:
            return None
        largest_kind = max(parts, key=lambda kind: parts[kind].number)
        fix = {
            "checkpoint being written": "set checkpoint.asynchronous to false, or ",
            "reference": "set parallel.reference_offload to device, or ",
            OFFLOADED_MEMORY: "set parallel.offload_between_phases to disk or none, or ",
            "optimizer": "lower parallel.optimizer_offload, or ",
            "critic's optimizer": "lower parallel.optimizer_offload, or ",
        }.get(largest_kind, "")
        remedy = (
            SMALLER_RECEIVE_BUFFER if largest_kind == RECEIVE_BUFFER else fix + self._split_remedy()
        )
        return (
            f"a host needs {_byte_text(required_bytes)} of {_byte_text(memory)}, "
            f"{parts[largest_kind]} of it {largest_kind}: {remedy}"
        )

    def _engine_fraction(self) -> str | None:
        """Return the problem of engines that take more of a GPU than trainer or receive buffer
        leave them, or None."""
        engines, rollout, memory = self.engines, self.job.config.rollout, self.job.hardware.memory
        has_trainer = rollout.colocated and engines.trainer_bytes
        has_receive_buffer = self.job.rollout_gpus and engines.receive_buffer_bytes
        if not (has_trainer or has_receive_buffer) or engines.free_bytes <= 0:
            return None
        fraction, free_fraction = rollout.gpu_memory, engines.free_bytes / memory
        if fraction is not None and fraction <= free_fraction:
            return None
        setting = f"={fraction:g}" if fraction else " is not set, and vLLM takes 0.92"
        holder = (
            "the trainer" if has_trainer else f"a push's {_byte_text(engines.receive_buffer_bytes)}"
        )
        return (
            f"rollout.gpu_memory{setting}: of each GPU's {_byte_text(memory)} {holder} leaves "
            f"engines {_byte_text(engines.free_bytes)}: set at most "
            f"{math.floor(100 * free_fraction) / 100}"
        )

    def _cache_problem(self) -> str | None:
        engines, job = self.engines, self.job
        required_bytes = engines.token_bytes * job.max_sample_tokens
        if engines.cache_bytes >= required_bytes:
            return None
        kinds = {"weights": engines.weight_bytes, RECEIVE_BUFFER: engines.receive_buffer_bytes}
        kinds |= engines.buffers | {"the trainer": engines.trainer_bytes}
        kinds |= {kind: round(part.number) for kind, part in engines.passes.items()}
        sizes = ", ".join(
            f"{_byte_text(count)} of {kind}" for kind, count in kinds.items() if count
        )
        occupants = f"next to {sizes} and {_byte_text(job.assumptions.reserved)} reserved"
        space = f"has {_byte_text(engines.cache_bytes)}"
        if engines.cache_bytes <= 0:
            space = (
                f"of {_byte_text(job.hardware.memory)} has no room, "
                f"{_byte_text(-engines.cache_bytes)} short,"
            )
        return (
            f"an engine GPU {space} for KV cache {occupants}; one sample of "
            f"{job.max_sample_tokens:,} tokens needs {_byte_text(required_bytes)}: "
            f"{self._more_room()}"
        )

    def _push_problem(self) -> str | None:
        """Return the problem of a push that arrives in the place of the KV cache, or None."""
        engines, memory = self.engines, self.job.hardware.memory
        required_bytes, cache_bytes = reused_kv_cache_bytes(self.job), max(0, engines.cache_bytes)
        if required_bytes <= cache_bytes:
            return None
        remedy, fraction = "", self.job.config.rollout.gpu_memory
        if fraction is not None:
            larger_fraction = (
                math.ceil(100 * (fraction + (required_bytes - engines.cache_bytes) / memory)) / 100
            )
            if larger_fraction <= engines.free_bytes / memory:
                remedy = f"set rollout.gpu_memory to {larger_fraction:g}, or "
        if fewer_tokens := self._fewer_tokens():
            remedy += f"{fewer_tokens}, or "
        return (
            f"a push over nccl needs {_byte_text(required_bytes)} of a GPU in the place of the KV "
            f"cache, which has {_byte_text(cache_bytes)}: {remedy}{SMALLER_RECEIVE_BUFFER}, or set "
            "push.transport to gloo"
        )

    def _fewer_tokens(self) -> str:
        """Return the remedy with the largest passes that leave the cache room for a sample and a
        push, "" where a pass could not even decode all sequences."""
        engines, job = self.engines, self.job
        buffer_bytes = engines.buffers.get(DEEPEP_BUFFERS)
        if buffer_bytes and exchange_backend(job) == LOW_LATENCY:
            return FEWER_BUFFERED_TOKENS if buffer_bytes > engines.weight_bytes else ""
        needed_bytes = max(engines.token_bytes * job.max_sample_tokens, reused_kv_cache_bytes(job))
        tokens = engines.tokens_that_free(needed_bytes - engines.cache_bytes)
        if tokens < decoded_tokens(self.job):
            return ""
        return f"{FEWER_BUFFERED_TOKENS} to {tokens:,}"

    def _more_room(self) -> str:
        """Return the remedies that leave an engine GPU more for its cache."""
        rollout = self.job.config.rollout
        note = ", fewer engines" if rollout.engines > 1 else ""
        # Data-parallel copies of a dense model are whole: only tensor parallelism shrinks them.
        axis = "data_parallel" if self.job.has_experts else "tensor_parallel"
        size = getattr(rollout, axis)
        remedies = [f"raise rollout.{axis}={size} (more GPUs for an engine{note})"]
        if fewer_tokens := self._fewer_tokens():
            remedies.insert(0, fewer_tokens)
        if rollout.tensor_parallel * rollout.data_parallel == 1:
            remedies = [f"lower rollout.engines={rollout.engines} (more GPUs each)"]
            remedies = remedies if rollout.engines > 1 else ["use more GPUs"]
        if self.engines.receive_buffer_bytes:
            remedies.append("set push.transport to gloo, which receives on the host")
        if self.engines.trainer_bytes:
            remedies += [
                self._split_remedy(),
                "give the engines GPUs of their own (--rollout-gpus)",
            ]
        elif self.engines.cache_bytes > 0:
            remedies.append("lower rollout.max_response_tokens")
        return ", or ".join(remedies)


def _byte_text(num_bytes: float) -> str:
    return str(byte_quantity(num_bytes))


def assumed_section(job: PlannedJob) -> QuantityTable:
    """Return every assumed number with its source: the docstring of its field, or the file."""
    section = {}
    for part in (job.assumptions, job.hardware):
        for name, info in described_fields(part).items():
            source = " ".join((info.description or "").split())
            if name in job.calibration.names:
                source = f"measured: {job.calibration.file}"
            section[name] = Quantity(getattr(part, name), unit_of(info), source)
    return section
