"""Patches of Megatron-Core for a CPU: one for each use of CUDA in its code.

Megatron-Core names CUDA directly in some fifty places. Each `Patch` is the answer to one of these
places on a CPU; tests/unit/models/test_platform.py fails when its upstream line moves.
`platform.prepare_process()` installs the patches in the order of this file, before Megatron is
imported. `models.patches` lists the patches for all platforms, in the same form."""

import contextlib
import functools
import os
import sys
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_r1.models.patch_type import Patch, register_in

CPU_DEVICE = torch.device("cpu")
PATCHES: list[Patch] = []
_patch = register_in(PATCHES)


class _Event:
    """A CUDA event on a device without queues: everything recorded has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = synchronize = _do_nothing

    def query(self) -> bool:
        return True


class _Stream(_Event):
    """A CUDA stream on a device that runs every operation where it is called."""

    wait_stream = wait_event = _Event._do_nothing

    def record_event(self, *args: Any) -> _Event:
        return _Event()


def _names_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


@_patch("no torch.compile", "jit.py:enable_jit_fuser", "jit_fuser = torch.compile")
def _disable_compile() -> None:
    # Read when a function is decorated, so it has to be set before Megatron is imported. Compiling
    # a dozen two-line functions with a C++ compiler takes longer than the compiled code saves.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


@_patch(
    "no Transformer Engine",
    "optimizer/clip_grads.py",
    "from transformer_engine.pytorch.optimizers import",
)
def _hide_transformer_engine() -> None:
    # In an environment for GPUs it imports without one, and then its kernels fail.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]


@_patch(
    "the current device",
    "distributed/param_and_grad_buffer.py:_ParamAndGradBuffer.__init__",
    "device=torch.cuda.current_device()",
)
def _patch_current_device() -> None:
    torch.cuda.current_device = lambda: CPU_DEVICE
    torch.cuda.set_device = lambda device: None


@_patch(
    "streams and events",
    "transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher.__init__",
    "torch.cuda.Stream()",
)
def _patch_streams() -> None:
    only_stream = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: only_stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


@_patch(
    "ranges of a profile, and tensors that another stream uses",
    "pipeline_parallel/utils.py:ScheduleNode._forward",
    "input.record_stream(self.stream)",
)
def _patch_ranges_and_uses() -> None:
    # torch without CUDA has no NVTX, and memory of a CPU is not freed by stream.
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    torch.Tensor.record_stream = lambda self, stream: None


@_patch(
    "CUDA's random state is the CPU's",
    "tensor_parallel/random.py:CudaRNGStatesTracker.add",
    "torch.cuda.get_rng_state()",
)
def _patch_random_state() -> None:
    cuda = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = lambda seed: None


@_patch(
    'factories with device="cuda"',
    "pipeline_parallel/schedules.py:forward_backward_no_pipelining",
    'device="cuda"',
)
def _patch_factories() -> None:
    names = (
        "zeros ones empty full tensor as_tensor arange linspace eye rand randn randint randperm "
        "zeros_like ones_like empty_like full_like rand_like randn_like"
    )
    # torch collects the factories to which `with torch.device("meta")` applies at the first use.
    # Were the wrappers below collected, it would apply to none: transformers, which creates models
    # in it, would leave buffers such as inv_freq uninitialized.
    _device_constructors()
    for name in names.split():
        make = getattr(torch, name)

        def on_cpu(*args, make=make, **kwargs):
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU_DEVICE
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        setattr(torch, name, functools.wraps(make)(on_cpu))


@_patch(
    "moves to the GPU", "optimizer/optimizer.py:MegatronOptimizer.restore_from_cpu", "p.data.cuda()"
)
def _patch_moves() -> None:
    original_to = torch.Tensor.to

    def to_cpu(self, *args, **kwargs):
        args = tuple(CPU_DEVICE if _names_cuda(a) else a for a in args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU_DEVICE
        return original_to(self, *args, **kwargs)

    torch.Tensor.to = to_cpu
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


@_patch(
    "type names",
    "optimizer/distrib_optimizer.py:DistributedOptimizer._build_model_and_main_param_groups",
    "model_param.type() == 'torch.cuda.FloatTensor'",
)
def _patch_type_names() -> None:
    type_of = torch.Tensor.type

    def as_cuda_name(self, *args, **kwargs):
        name = type_of(self, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = as_cuda_name
    for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
        setattr(torch.cuda, kind, getattr(torch, kind))


# From here on a patch imports Megatron, so the ones above have to be in place.
@_patch(
    "Megatron's own CUDA random state",
    "tensor_parallel/random.py:_get_cuda_rng_state",
    "torch.cuda.default_generators[idx]",
)
def _patch_megatron_random_state() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@_patch(
    "the router's GEMM imports from Transformer Engine",
    "transformer/moe/moe_utils.py",
    "te_general_gemm",
)
def _patch_router_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils.te_general_gemm = None


@_patch(
    "all-to-all split sizes are wanted in numpy, and only a CUDA tensor is converted",
    "transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu",
    "tensor.is_cuda",
)
def _patch_splits_as_numpy() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_numpy(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_numpy


@_patch(
    "gathers of uneven length, as experts split over tensor ranks need, which gloo lacks",
    "tensor_parallel/mappings.py:_gather_along_first_dim",
    "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
)
def _patch_uneven_gathers() -> None:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(parts: list[torch.Tensor], length: int) -> torch.Tensor:
        stacked_parts = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
        for row, part in zip(stacked_parts, parts, strict=True):
            row[: len(part)] = part
        return stacked_parts.flatten(0, 1)

    def gather_uneven(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        rows = gather(padded([input_], max(sizes)), group).unflatten(0, (len(sizes), -1))
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def scatter_uneven(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        parts = padded(list(input_.split(sizes)), max(sizes))
        return scatter(parts, group)[: sizes[dist.get_rank(group)]].contiguous()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = scatter_uneven


@_patch(
    "recomputing a norm takes fp8=False for FP8 and asks Transformer Engine",
    "tensor_parallel/random.py:CheckpointWithoutOutput.__init__",
    "self.fp8 = fp8 is not None",
)
def _patch_recompute_without_fp8() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    init = CheckpointWithoutOutput.__init__
    CheckpointWithoutOutput.__init__ = lambda self, fp8=None: init(self, fp8 or None)


@_patch(
    "loading torch's AdamW, whose state has a step that Megatron saves elsewhere",
    "optimizer/distrib_optimizer.py:DistributedOptimizer._set_main_param_and_optimizer_states",
    "for key in dst_tensors:",
)
def _patch_adam_step_on_load() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_state = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self, model_param, tensors):
        # The step count was restored before, apart from the tensors; keep it.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # All parameters share one tensor (distrib_optimizer.py:1032), which AdamW would then
        # increment once per parameter.
        state["step"] = state["step"].clone()
        set_state(self, model_param, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
