"""What vLLM keeps of a layer beside its parameters: the state of its quantization method.

model_executor/layers/quantization/fp8.py: `Fp8MoEMethod._init_moe_kernel` builds the kernel anew in
every post-processing, with the scales that are the layer's parameters at that moment. In a swap
these are views of the receive buffer, which the next push overwrites or which is freed. And CUDA
graphs have captured tensors of the first kernel, which would be freed with it. So the first state
is put back after each post-processing: it refers to the layer's tensors in use, whose addresses
stay and which get the new values; what was computed for the kernel alone is copied."""

from collections.abc import Collection, Iterator
from typing import Any

import torch

State = dict[str, Any]


def kept_state(layer: torch.nn.Module) -> State:
    """Return the attributes of a layer's quantization method, and the layer's tensors that are
    neither parameters nor buffers (a kernel's workspace)."""
    tensors = {name: each for name, each in vars(layer).items() if isinstance(each, torch.Tensor)}
    method = getattr(layer, "quant_method", None)
    return {"layer": tensors, "method": {} if method is None else dict(vars(method))}


def restore(layer: torch.nn.Module, before: State, in_use: Collection[torch.Tensor]) -> None:
    """Put back the state `before`, with the values of the present one. in_use: the layer's
    parameters and buffers, which have the new values.

    Raises ValueError where the present state has another form, or a number that was computed from
    weights: the kernel of `before` would compute with old values."""
    has_new_values = {_storage(tensor) for tensor in in_use}
    name = type(layer).__name__
    for old, new in _changed_tensors(before, kept_state(layer), name, set()):
        if _storage(old) not in has_new_values:
            old.data.copy_(new)
    vars(layer).update(before["layer"])
    method = getattr(layer, "quant_method", None)
    if method is not None:
        vars(method).clear()
        vars(method).update(before["method"])


def _changed_tensors(
    old: Any, new: Any, path: str, seen: set[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tensor of the old state, tensor of the new) wherever they have different memory."""
    if old is new or id(new) in seen:
        return
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{path}: {old.shape} {old.dtype} became {new.shape} {new.dtype}")
        if not new.is_meta and _storage(old) != _storage(new):
            yield old, new
    elif type(old) is not type(new):
        raise ValueError(f"{path}: {type(old).__name__} became {type(new).__name__}")
    elif isinstance(old, float):
        if old != new:
            raise ValueError(f"{path}: {old} became {new}")
    elif isinstance(old, dict):
        seen.add(id(new))
        for key in old.keys() & new.keys():
            yield from _changed_tensors(old[key], new[key], f"{path}.{key}", seen)
    elif isinstance(old, list | tuple):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _changed_tensors(*pair, f"{path}[{index}]", seen)
    elif hasattr(old, "__dict__") and not isinstance(old, type):
        yield from _changed_tensors(vars(old), vars(new), path, seen)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
