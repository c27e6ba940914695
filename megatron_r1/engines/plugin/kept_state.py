"""What vLLM keeps of a layer besides its parameters: the state of its quantization method.

model_executor/layers/quantization/fp8.py: `Fp8MoEMethod._init_moe_kernel` builds the kernel anew in
every post-processing, with the scales that are the layer's parameters at that moment. In a swap
these are views of the receive buffer, which the next push overwrites or which is freed. And CUDA
graphs have captured tensors of the first kernel, which would be freed with it. So the first state
is put back after each post-processing: it refers to the layer's tensors in use, whose addresses
stay and which get the new values; what was computed for the kernel alone is copied."""

import functools
from collections.abc import Collection, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

NO_STATE = (torch.Stream, torch.Event)
"""Types of objects that any other of the type may replace."""
CONFIGURATION = "vllm.config"
"""The package of vLLM's settings, from which every layer of the model can be reached."""


class KeptState:
    """The attributes of a layer's quantization method and of the objects that it refers to, and the
    layer's tensors that are neither parameters nor buffers (a kernel's workspace), as they are when
    this is created."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._tensors = _plain_tensors(layer)
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}
        method = getattr(layer, "quant_method", None)
        if method is not None:
            self._note(method, is_root=True)

    def restore(self, in_use: Collection[torch.Tensor]) -> None:
        """Put this state back, with the values of the present one. in_use: the layer's parameters
        and buffers, which have the new values.

        Raises ValueError where the present state has another form, or a value other than a tensor
        that has changed: the kernel would compute with the old one."""
        has_new_values = {_storage(tensor) for tensor in in_use}
        seen: set[int] = set()
        states = [(vars(each), before) for each, before in self._objects.values()]
        for present, before in [(_plain_tensors(self._layer), self._tensors), *states]:
            for old, new in _changed_tensors(before, present, type(self._layer).__name__, seen):
                if _storage(old) not in has_new_values:
                    old.data.copy_(new)
        vars(self._layer).update(self._tensors)
        for present, before in states:
            for name in present.keys() - before.keys():
                del present[name]
            present.update(before)

    def _note(self, each: Any, *, is_root: bool = False) -> None:
        """Note the attributes of an object, and of all that it refers to."""
        if isinstance(each, dict | list | tuple):
            for item in each.values() if isinstance(each, dict) else each:
                self._note(item)
        elif (is_root or _has_state(each)) and id(each) not in self._objects:
            self._objects[id(each)] = each, dict(vars(each))
            self._note(vars(each))


def _plain_tensors(layer: torch.nn.Module) -> dict[str, Any]:
    return {name: each for name, each in vars(layer).items() if isinstance(each, torch.Tensor)}


def _has_state(each: Any) -> bool:
    opaque = torch.Tensor, torch.nn.Module, FunctionType, MethodType, ModuleType, type
    return (
        hasattr(each, "__dict__")
        and not isinstance(each, opaque)
        and not type(each).__module__.startswith(CONFIGURATION)
    )


def _changed_tensors(
    old: Any, new: Any, path: str, seen: set[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tensor of the old state, tensor of the new) wherever they have different memory."""
    if old is new or id(new) in seen or isinstance(new, NO_STATE):
        return
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{path}: {old.shape} {old.dtype} became {new.shape} {new.dtype}")
        if not new.is_meta and _storage(old) != _storage(new):
            yield old, new
        return
    if type(old) is not type(new):
        raise ValueError(f"{path}: {type(old).__name__} became {type(new).__name__}")
    old_parts, new_parts = _parts(old), _parts(new)
    if old_parts is None or new_parts is None:
        if old != new:
            raise ValueError(f"{path}: {old} became {new}")
        return
    seen.add(id(new))
    if old_parts.keys() != new_parts.keys():
        raise ValueError(f"{path}: {[*old_parts]} became {[*new_parts]}")
    for name, part in new_parts.items():
        yield from _changed_tensors(old_parts[name], part, f"{path}.{name}", seen)


def _parts(each: Any) -> dict[Any, Any] | None:
    """Return what an object consists of, by name; None for a value or an object without parts."""
    if isinstance(each, dict):
        return each
    if isinstance(each, list | tuple):
        return dict(enumerate(each))
    if isinstance(each, functools.partial):
        return {"func": each.func, "args": each.args, "keywords": each.keywords}
    if isinstance(each, MethodType):
        return {"self": each.__self__, "func": each.__func__}
    if isinstance(each, FunctionType):
        cells = (cell.cell_contents for cell in each.__closure__ or ())
        return {"code": each.__code__, "defaults": each.__defaults__, **dict(enumerate(cells))}
    return vars(each) if hasattr(each, "__dict__") and not isinstance(each, type) else None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
