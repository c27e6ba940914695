"""Whether this process computes on a CPU or a GPU, and what Megatron-Core needs on a CPU.

`prepare()` is called once in a trainer process, before anything imports Megatron-Core. On a GPU it
does nothing but choose the device. On a CPU it installs PATCHES: Megatron-Core 0.16.1 names CUDA
directly in some fifty places, and each patch answers one such habit so that the same unmodified
Megatron trains over gloo. Every patch names an upstream line that needs it;
tests/unit/test_platform.py fails when that line moves.

Processes that run transformers or vLLM must not call `prepare()`: both ask `torch.cuda` who they
are on and would believe the answers given here."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_r1.processes.memory import keep_freed_memory

CPU = torch.device("cpu")
_REAL_CUDA = torch.cuda.is_available()
_prepared = False


def has_gpu() -> bool:
    """Whether this process trains on CUDA. Asked of the real driver, whatever is patched."""
    return _REAL_CUDA


def device() -> torch.device:
    """The device of this process's parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if _REAL_CUDA else CPU


def distributed_backend() -> str:
    """The torch.distributed backend that carries this device's tensors."""
    return "nccl" if _REAL_CUDA else "gloo"


def uses_transformer_engine() -> bool:
    """Whether models are built from Transformer Engine's layers (GPU images) or from ours (CPU)."""
    if not _REAL_CUDA:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def prepare(local_rank: int = 0) -> torch.device:
    """Make this process able to import and run Megatron-Core; returns the device to train on."""
    global _prepared
    if _REAL_CUDA:
        torch.cuda.set_device(local_rank)
    elif not _prepared:
        for patch in PATCHES:
            patch.install()
        keep_freed_memory()
        _prepared = True
    return device()


@dataclass(frozen=True)
class Patch:
    """One CPU answer to one CUDA habit of Megatron-Core.

    upstream: file below `megatron/core` and line, as of `MEGATRON_VERSION`; text: what stands
    there."""

    name: str
    upstream: str
    text: str
    install: Callable[[], None]


MEGATRON_VERSION = "0.16.1"


class _Event:
    """A CUDA event on a device without queues: everything recorded has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def wait(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self) -> bool:
        return True


class _Stream(_Event):
    """A CUDA stream on a device that runs every operation where it is called."""

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, *args) -> _Event:
        return _Event()


def _names_cuda(where) -> bool:
    return isinstance(where, (str, torch.device)) and str(where).startswith("cuda")


def _disable_compile() -> None:
    # Read when a function is decorated, so it has to be set before Megatron is imported: compiling
    # a dozen two-line functions with a C++ compiler costs a laptop more than they ever save.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def _current_device() -> None:
    torch.cuda.current_device = lambda: CPU
    torch.cuda.set_device = lambda device: None


def _streams() -> None:
    only = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: only
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def _random_state() -> None:
    cuda = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = lambda seed: None


def _megatron_random_state() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _factories() -> None:
    names = (
        "zeros ones empty full tensor as_tensor arange linspace eye rand randn randint randperm "
        "zeros_like ones_like empty_like full_like rand_like randn_like"
    )
    for name in names.split():
        make = getattr(torch, name)

        def on_cpu(*args, make=make, **kwargs):
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        setattr(torch, name, functools.wraps(make)(on_cpu))


def _moves() -> None:
    to = torch.Tensor.to

    def to_cpu(self, *args, **kwargs):
        args = tuple(CPU if _names_cuda(a) else a for a in args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_cpu
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def _type_names() -> None:
    of = torch.Tensor.type

    def as_cuda_name(self, *args, **kwargs):
        name = of(self, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = as_cuda_name
    for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"):
        setattr(torch.cuda, kind, getattr(torch, kind))


def _router_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils.te_general_gemm = None


def _mla_linear_names() -> None:
    import megatron.core.transformer.multi_latent_attention as mla

    class Absent:
        """Stands where a Transformer Engine class would, so that `x is TELinear` is False."""

    mla.HAVE_TE = False
    mla.TELinear = mla.TEColumnParallelLinear = mla.Linear = Absent


def _splits_as_numpy() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_numpy(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_numpy


def _uneven_gathers() -> None:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(parts: list[torch.Tensor], length: int) -> torch.Tensor:
        whole = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        return whole.flatten(0, 1)

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


def _recompute_without_fp8() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    init = CheckpointWithoutOutput.__init__

    def without_fp8(self, fp8=None):
        init(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = without_fp8


def _adam_step_on_load() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_state = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self, model_param, tensors):
        # The step count was restored before, apart from the tensors: hand it back unchanged.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # Megatron gives all parameters one tensor (distrib_optimizer.py:825), which AdamW would
        # then count up once per parameter.
        state["step"] = state["step"].clone()
        set_state(self, model_param, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


PATCHES = (
    Patch("no torch.compile", "jit.py:21", "jit_fuser = torch.compile", _disable_compile),
    Patch(
        "the current device",
        "distributed/param_and_grad_buffer.py:783",
        "device=torch.cuda.current_device()",
        _current_device,
    ),
    Patch(
        "streams and events",
        "transformer/moe/token_dispatcher.py:445",
        "torch.cuda.Stream()",
        _streams,
    ),
    Patch(
        "CUDA's random state is the CPU's",
        "tensor_parallel/random.py:235",
        "torch.cuda.get_rng_state()",
        _random_state,
    ),
    Patch(
        'factories with device="cuda"',
        "pipeline_parallel/schedules.py:596",
        'device="cuda"',
        _factories,
    ),
    Patch("moves to the GPU", "optimizer/optimizer.py:375", "p.data.cuda()", _moves),
    Patch(
        "type names",
        "optimizer/distrib_optimizer.py:420",
        "model_param.type() == 'torch.cuda.FloatTensor'",
        _type_names,
    ),
    # From here on a patch imports Megatron, so the ones above have to be in place.
    Patch(
        "Megatron's own CUDA random state",
        "tensor_parallel/random.py:66",
        "torch.cuda.default_generators[idx]",
        _megatron_random_state,
    ),
    Patch(
        "MLA asks for Transformer Engine classes that failed to import",
        "transformer/multi_latent_attention.py:64",
        "TEColumnParallelLinear, TELinear, Linear, set_save_original_input = None, None",
        _mla_linear_names,
    ),
    Patch(
        "the router's GEMM imports from Transformer Engine",
        "transformer/moe/moe_utils.py:34",
        "te_general_gemm",
        _router_gemm,
    ),
    Patch(
        "all-to-all split sizes are wanted in numpy, and only a CUDA tensor is converted",
        "transformer/moe/moe_utils.py:1093",
        "tensor.is_cuda",
        _splits_as_numpy,
    ),
    Patch(
        "gathers of uneven length, as experts split over tensor ranks need, which gloo lacks",
        "tensor_parallel/mappings.py:150",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        _uneven_gathers,
    ),
    Patch(
        "recomputing a norm takes fp8=False for FP8 and asks Transformer Engine",
        "tensor_parallel/random.py:636",
        "self.fp8 = fp8 is not None",
        _recompute_without_fp8,
    ),
    Patch(
        "loading torch's AdamW, whose state has a step that Megatron saves elsewhere",
        "optimizer/distrib_optimizer.py:939",
        "for key in dst_tensors:",
        _adam_step_on_load,
    ),
)
