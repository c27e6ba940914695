"""What vLLM 0.32's CPU build lacks to run a model over several processes.

Tensor parallelism works as it is, and so do data-parallel copies of a model without experts. Three
things do not: pipeline stages, experts spread over ranks, and data-parallel ranks that share
experts. Each mend names the upstream lines it answers, and goes when upstream has it;
tests/system/test_engine_parallel.py fails without any one of them.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


def mend() -> None:
    """Apply all three. On CPU, once."""
    keep_what_stages_receive()
    compute_local_experts_only()
    gather_uneven_shares()


def keep_what_stages_receive() -> None:
    """Give every pipeline stage after the first its receive buffers.

    Answers vllm/v1/worker/gpu_model_runner.py:5801: they are made by the profiling run, which a CPU
    skips (cpu_worker.py, `_should_warm_up_model`) when it runs eagerly in a KV cache of given size.
    """
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    upstream = CPUModelRunner.load_model

    def load_model(self: CPUModelRunner, *args: object, **kwargs: object) -> None:
        upstream(self, *args, **kwargs)
        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    CPUModelRunner.load_model = load_model


def compute_local_experts_only() -> None:
    """Let a rank compute the experts it holds, and add nothing for those of other ranks.

    Answers vllm/model_executor/layers/fused_moe/experts/cpu_moe.py:266 and 526 (`apply`, of plain
    and of FP8 experts), which hands the
    kernel the model-wide numbers of the experts and ignores `expert_map`: the kernel then reads
    past the end of this rank's weights. Here a foreign expert becomes a local one of weight zero,
    spread over all so that no expert gets most of the tokens.
    """
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
        *others: object,
        **named: object,
    ) -> None:
        if expert_map is not None:
            topk_ids, topk_weights = local_choice(topk_ids, topk_weights, expert_map, len(w1))
        arguments = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation)
        upstream(self, *arguments, global_num_experts, expert_map, *others, **named)

    return apply


def local_choice(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same choice in this rank's numbers.

    topk_ids, topk_weights: [num_tokens, topk]. expert_map: [num_experts], the number of each expert
    here, or -1.
    """
    local = expert_map[topk_ids.long()].to(topk_ids.dtype)
    foreign = local < 0
    return torch.where(foreign, topk_ids % num_local, local), topk_weights.masked_fill(foreign, 0)


def gather_uneven_shares() -> None:
    """Exchange tokens between data-parallel ranks that share experts.

    Answers vllm/distributed/device_communicators/base_device_communicator.py:290 and 331: the CPU's
    communicator has neither `all_gatherv` nor `reduce_scatterv`, which the all-to-all of such
    models (`AgRsAll2AllManager`) is made of. Shares are padded to the longest, as gloo wants equal
    ones.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(
        self: CpuCommunicator,
        input_: torch.Tensor | list[torch.Tensor],
        dim: int = 0,
        sizes: list[int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        assert dim == 0, f"all_gatherv over dimension {dim}"
        if isinstance(input_, list):
            return [all_gatherv(self, one, dim, sizes) for one in input_]
        sizes = sizes or [len(input_)] * self.world_size
        mine = input_.new_zeros(max(sizes), *input_.shape[1:])
        mine[: len(input_)] = input_
        shares = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(shares, mine, group=self.device_group)
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    def reduce_scatterv(
        self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        assert dim == 0, f"reduce_scatterv over dimension {dim}"
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        sizes = sizes or [len(total) // self.world_size] * self.world_size
        return total.split(sizes)[self.rank_in_group].contiguous()

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
