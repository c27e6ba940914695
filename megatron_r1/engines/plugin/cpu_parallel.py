"""Patches of vLLM 0.32's CPU build for models over several processes.

Tensor parallelism works as it is, and so do data-parallel copies of a model without experts.
Pipeline stages, experts spread over ranks, data-parallel ranks that share experts, and their
routing do not. Without any one of the last four patches tests/system/test_engine_parallel.py fails;
the first one saves CPU time. Paths: below vllm/."""

import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

POLL_SECONDS = 0.0005
"""The pause between two checks for a message; a step of a small model takes 20 ms or more."""


def patch_cpu_parallelism() -> None:
    """Apply all five patches. On CPU, once."""
    _poll_with_pauses()
    _keep_intermediate_tensors()
    _compute_local_experts_only()
    _gather_uneven_shares()
    _gather_integers()


def _poll_with_pauses() -> None:
    """Let a process that waits for another's message sleep between two looks for it.

    Upstream: distributed/device_communicators/shm_broadcast.py: `SpinCondition.wait` and
    `MessageQueue.acquire_write`. Without it: for a second after each message it does nothing but
    look, and takes the cores of those that compute: four tenths of the CPU time of an engine of
    tensor 2 x data 2. Goes when: it can be set."""
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(POLL_SECONDS)


def _keep_intermediate_tensors() -> None:
    """Give every pipeline stage after the first its receive buffers.

    Upstream: v1/worker/gpu_model_runner.py: `GPUModelRunner._dummy_run`. Without it: only the
    profiling run creates them, which a CPU skips (cpu_worker.py, `_should_warm_up_model`) when it
    runs eagerly with a KV cache of given size. Goes when: they are created on loading."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.load_model

    def load_model(self: Any, *args: object, **kwargs: object) -> None:
        upstream(self, *args, **kwargs)
        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    CPUModelRunner.load_model = load_model


def _compute_local_experts_only() -> None:
    """Let a rank compute its own experts, and add nothing for those of other ranks.

    Upstream: model_executor/layers/fused_moe/experts/cpu_moe.py: `CPUUnquantizedExperts.apply` and
    `CPUExpertsFp8.apply` (of plain and of FP8 experts). Without it: `expert_map` is ignored, and
    the kernel reads past the end of this rank's weights. Goes when: `apply` maps expert numbers.
    Here a foreign expert becomes a local one of weight zero, spread over all so that no expert gets
    most of the tokens."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for experts in (cpu_moe.CPUUnquantizedExperts, cpu_moe.CPUExpertsFp8):
        experts.apply = _with_local_choice(experts.apply)


def _with_local_choice(upstream: Callable[..., None]) -> Callable[..., None]:
    def apply(
        self: object,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: object,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *further_arguments: object,
        **kwargs: object,
    ) -> None:
        if expert_map is not None:
            topk_ids, topk_weights = _local_choice(topk_ids, topk_weights, expert_map, len(w1))
        arguments = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation)
        upstream(self, *arguments, global_num_experts, expert_map, *further_arguments, **kwargs)

    return apply


def _local_choice(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same choice of experts in this rank's numbers.

    Args:
        topk_ids: the chosen experts of each token, [num_tokens, topk].
        topk_weights: their weights, [num_tokens, topk].
        expert_map: the number of each expert on this rank, or -1, [num_experts].
        num_local: the experts on this rank."""
    local_ids = expert_map[topk_ids.long()].to(topk_ids.dtype)
    is_foreign = local_ids < 0
    return torch.where(is_foreign, topk_ids % num_local, local_ids), topk_weights.masked_fill(
        is_foreign, 0
    )


def _gather_uneven_shares() -> None:
    """Exchange tokens between data-parallel ranks that share experts.

    Upstream: distributed/device_communicators/base_device_communicator.py:
    `DeviceCommunicatorBase.all_gatherv` and `DeviceCommunicatorBase.reduce_scatterv`. Without it:
    the CPU's communicator lacks `all_gatherv` and `reduce_scatterv`, which the all-to-all of such
    models (`AgRsAll2AllManager`) calls. Goes when: it has them. Shares are padded to the longest,
    since gloo needs equal ones."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(
        self: Any,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        assert dim == 0, f"all_gatherv over dimension {dim}"
        if isinstance(input_, list):
            return [cast(torch.Tensor, all_gatherv(self, tensor, dim, sizes)) for tensor in input_]
        sizes = sizes or [len(input_)] * self.world_size
        padded_input = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded_input[: len(input_)] = input_
        shares = [torch.empty_like(padded_input) for _ in sizes]
        # Over the communicator's own group: the ranks whose tokens are exchanged.
        dist.all_gather(shares, padded_input, group=self.device_group)
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    def reduce_scatterv(
        self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        assert dim == 0, f"reduce_scatterv over dimension {dim}"
        # Over the same group, and whole, since the shares may differ in size.
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        sizes = sizes or [len(total) // self.world_size] * self.world_size
        return total.split(sizes)[self.rank_in_group].contiguous()

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


def _gather_integers() -> None:
    """Gather integers from tensor ranks by gloo.

    Upstream: distributed/device_communicators/cpu_communicator.py:
    `_CPUSHMDistributed.all_gather_into_tensor`, whose kernel takes floating-point tensors only.
    Without it: an engine of tensor x data ranks that share experts dies on its first pass if it
    returns its routing, since each tensor rank has the experts of its part of the tokens. Goes
    when: the kernel takes integers."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    upstream = _CPUSHMDistributed.all_gather_into_tensor

    def all_gather_into_tensor(
        self: Any, output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup | None = None
    ) -> None:
        if input.is_floating_point():
            upstream(self, output, input, group)
        else:
            dist.all_gather_into_tensor(output, input.contiguous(), group=group)

    _CPUSHMDistributed.all_gather_into_tensor = all_gather_into_tensor
