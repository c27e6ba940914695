"""Computes torch's own operators on the null GPU's tensors, by the CPU's kernels.

The memory of those tensors is the host's, so an operator can be given CPU tensors over the same
bytes. It computes when it is called, and first waits for what is queued on the stream that a kernel
would be queued on: what it reads has arrived, and what is queued later sees what it wrote. Copies
between CPU and GPU that need no kernel are CUDA's own, and are queued.

Operators of other libraries are computed where `KERNELS` has a function for them, and those that
are written in Python run as what they call. What stays without effect: products of Transformer
Engine (cuBLASLt), its kernels and Triton's, which do not go through torch's dispatcher."""

import ctypes
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ALLOCATES = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "_local_scalar_dense",
    "detach",
    "alias",
    "_unsafe_view",
    "lift_fresh",
    "is_same_size",
}
"""Operators that make, describe or read memory: CUDA's own work on the null GPU."""

NO_OPERATORS_OF_ITS_OWN = torch.Tensor.__torch_dispatch__


def _matrix_product(a, b, dtype, *, out=None):
    product = (a.float() @ b.float()).to(dtype)
    return product if out is None else out.copy_(product)


def _sum_with_product(c, a, b, dtype, *, beta=1, alpha=1, out=None):
    result = (beta * c.float() + alpha * (a.float() @ b.float())).to(dtype)
    return result if out is None else out.copy_(result)


KERNELS: dict[str, Callable[..., Any]] = {
    **{
        f"aten::{name}.dtype{end}": _matrix_product
        for name in ("mm", "bmm")
        for end in ("", "_out")
    },
    **{
        f"aten::{name}.dtype{end}": _sum_with_product
        for name in ("addmm", "baddbmm")
        for end in ("", "_out")
    },
}
"""Operator of another library, such as `_C::rms_norm`, or of torch that only GPUs have → a function
of CPU tensors."""
KERNEL_NAMESPACES = ("_C", "_C_cache_ops", "_moe_C", "_vllm_fa2_C", "_vllm_fa3_C")
"""Those of vLLM's compiled operators: what is not in `KERNELS` does nothing, with a warning."""
PYTHON_OPERATORS: dict[str, Callable[..., Any]] = {}
"""Operator that is written in Python → its function (`record_python_operators`)."""


@functools.cache
def runtime() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def drain(devices: set[int]) -> None:
    """Wait for what is queued on the current stream of each of these GPUs."""
    for device in devices:
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
        if runtime().null_gpu_drain(device, stream):
            raise RuntimeError(f"the null GPU {device} failed")


def read(devices: set[int]) -> None:
    """Wait as CUDA's operators do that need a number on the host; the null GPU counts it."""
    for device in devices:
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
        if runtime().null_gpu_read(device, stream):
            raise RuntimeError(f"the null GPU {device} failed")


DATA_DEPENDENT_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
"""Tags of operators whose result's shape, or whose Python number, depends on a tensor's numbers."""


def waits_on_a_gpu(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the host waits in CUDA's operator: for a number of the result's shape, for a mask's
    count, or for a copy between CPU and GPU that is not `non_blocking`."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # Masks become indices by `nonzero`, and indices on the CPU are copied.
        indices = [index for index in args[1] if index is not None]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        if len(masks) == len(indices) == 1 and masks[0].is_cuda and _is_fill(*args[2:]):
            return False
        return args[0].is_cuda and (bool(masks) or not all(index.is_cuda for index in indices))
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    if name == "copy_":
        crosses = args[0].is_cuda != args[1].is_cuda and args[1].dim() > 0
        return crosses and not (kwargs.get("non_blocking") or any(args[2:]))
    if name == "_to_copy" and kwargs.get("device") is not None:
        crosses = torch.device(kwargs["device"]).type != args[0].device.type
        return crosses and not kwargs.get("non_blocking")
    return bool(DATA_DEPENDENT_TAGS & set(func.tags))


def _is_fill(value: torch.Tensor | None = None, accumulate: bool = False, *_: Any) -> bool:
    """Return whether CUDA's `index_put` of one mask is `masked_fill`, which reads no mask.

    It is one for a number (`x[mask] = 0`), which Python hands on as a CPU tensor
    (`canDispatchToMaskedFill` in ATen/native/TensorAdvancedIndexingUtils.h). The host then reads no
    mask."""
    return (
        value is not None and value.numel() == 1 and value.device.type == "cpu" and not accumulate
    )


def is_transfer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator copies bytes between CPU and GPU as they are."""
    if name == "copy_":
        target, source = args[:2]
        is_alike = (target.dtype, target.shape) == (source.dtype, source.shape)
        contiguous = target.is_contiguous() and source.is_contiguous()
        return is_alike and contiguous and target.is_cuda != source.is_cuda
    if name != "_to_copy" or kwargs.get("device") is None:
        return False
    (source,) = args
    goes_over = torch.device(kwargs["device"]).type != source.device.type
    is_alike = kwargs.get("dtype") in (None, source.dtype)
    memory_format = kwargs.get("memory_format") in (None, torch.preserve_format)
    return goes_over and is_alike and memory_format and source.is_contiguous()


_generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}


def _generator_of_host(generator: torch.Generator) -> torch.Generator:
    """Return the CPU's generator that stands for one of a GPU, with the same seed."""
    if generator.device.type == "cpu":
        return generator
    if id(generator) not in _generators:
        cpu_generator = torch.Generator().manual_seed(generator.initial_seed())
        _generators[id(generator)] = generator, cpu_generator
    return _generators[id(generator)][1]


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the memory of one on the null GPU."""
    storage = tensor.untyped_storage()
    if not storage.nbytes() or not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    size, cpu = storage.nbytes(), torch.device("cpu")
    host_storage = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), cpu, size)
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(host_storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@functools.cache
def warn_of_no_effect(name: str) -> None:
    """Say once that an operator does nothing."""
    print(f"{name} has no effect on the null GPU", file=sys.stderr, flush=True)


def fill_with_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Write zeros to a new tensor, whose memory they hold only where something else is written."""
    if tensor.numel():
        address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        runtime().null_gpu_zero(address, size)
    return tensor


class HostCompute(TorchDispatchMode):
    """Within this context, operators of torch compute on the null GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if operator := PYTHON_OPERATORS.get(func._schema.name):
            with self:  # what it calls computes, too
                return operator(*args, **kwargs)
        if namespace == "aten" and func._can_decompose():  # in inference mode, as it was called
            with self:
                return func.decompose(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        device = kwargs.get("device")
        makes = device is not None and torch.device(device).type == "cuda"
        reads = any(tensor.is_cuda for tensor in tensors)
        # Transformer Engine's quantized tensors have operators of their own.
        is_plain = all(type(x).__torch_dispatch__ is NO_OPERATORS_OF_ITS_OWN for x in tensors)
        if kernel := KERNELS.get(func.name()):
            drain({tensor.get_device() for tensor in tensors if tensor.is_cuda})
            return self._compute_on_host(kernel, args, kwargs, stays=True)
        if reads and namespace in KERNEL_NAMESPACES:
            warn_of_no_effect(func.name())
        its_own = namespace != "aten" or name in ALLOCATES or func.is_view
        if its_own or not is_plain or not (makes or reads) or is_transfer(name, args, kwargs):
            return func(*args, **kwargs)
        devices = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
        if makes:  # its memory may be that of a freed tensor, for which something is queued
            index = torch.device(device).index
            devices.add(torch.cuda.current_device() if index is None else index)
        drain(devices)
        if waits_on_a_gpu(func, args, kwargs):
            read(devices)
        if func is torch.ops.aten.zeros.default:
            return fill_with_zeros(torch.empty(*args, **kwargs))
        return self._compute_on_host(func, args, kwargs, stays=device is None or makes)

    def _compute_on_host(self, func, args, kwargs, stays: bool):
        originals = {}

        def down(tensor):
            if not tensor.is_cuda:
                return tensor
            host = on_host(tensor)
            originals[id(host)] = (host, tensor)
            return host

        def up(result):
            if id(result) in originals:  # written in place
                return originals[id(result)][1]
            if not stays or result.is_cuda:
                return result
            gpu_result = torch.empty_strided(
                result.shape, result.stride(), dtype=result.dtype, device="cuda"
            )
            if result.numel():
                on_host(gpu_result).copy_(result)
            return gpu_result

        host_args, host_kwargs = tree_map_only(torch.Tensor, down, (args, kwargs))
        if "device" in kwargs and stays:
            host_kwargs["device"] = torch.device("cpu")
        host_args, host_kwargs = tree_map_only(
            torch.Generator, _generator_of_host, (host_args, host_kwargs)
        )
        host_args = tree_map_only(torch.device, lambda _device: torch.device("cpu"), host_args)
        host_kwargs.pop("pin_memory", None)
        try:
            result = func(*host_args, **host_kwargs)
        except NotImplementedError:  # an operator that CUDA alone has
            warn_of_no_effect(str(func))
            return func(*args, **kwargs)
        return tree_map_only(torch.Tensor, up, result)


def record_python_operators() -> None:
    """Keep the functions of operators that Python code registers for GPUs from now on."""
    register = torch.library.Library.impl

    def register_and_keep(library, op_name, fn, dispatch_key="", **kwargs):
        if isinstance(op_name, str) and dispatch_key == "CUDA" and inspect.isfunction(fn):
            qualified = op_name if "::" in op_name else f"{library.ns}::{op_name}"
            PYTHON_OPERATORS[qualified.partition(".")[0]] = fn
        return register(library, op_name, fn, dispatch_key, **kwargs)

    torch.library.Library.impl = register_and_keep


def compute_everywhere() -> None:
    """Have torch's operators compute in this thread, for good, and in all that it starts."""
    run = threading.Thread.run

    def run_on_host(thread: threading.Thread) -> None:
        with HostCompute():
            run(thread)

    threading.Thread.run = run_on_host
    HostCompute().__enter__()
