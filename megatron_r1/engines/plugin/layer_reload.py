"""Replaces the engine's weights by received ones, layer by layer, in the form of vLLM's kernels.

This is vLLM's layerwise reload (model_loader/reload/layerwise.py) without its loaders: the
parameters of a layer are views of the receive buffer, vLLM's own post-processing runs on them, and
its result is copied into the tensors that the engine computes with, whose addresses stay. Kernels
keep these (`SavedKernelState`), never the receive buffer. MLA's absorbed W_UK_T and W_UV follow in
`recompute_shared_tensors`.

What vLLM keeps of a layer besides its parameters is the state of its quantization method.
model_executor/layers/quantization/fp8.py: `Fp8MoEMethod._init_moe_kernel` builds the kernel anew
in every post-processing, with the scales that are the layer's parameters at that moment. In a swap
these are views of the receive buffer, which the next push overwrites or which is freed. And CUDA
graphs have captured tensors of the first kernel, which would be freed with it. So the first state
is put back after each post-processing: it refers to the layer's tensors in use, whose addresses
stay and which get the new values; what was computed for the kernel alone is copied."""

import functools
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import meta
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from megatron_r1.engines.plugin.cpu_patches import (
    is_lookup_only,
    repack_output_head,
    reset_moe_kernel,
)
from megatron_r1.engines.plugin.loader_copies import load_biases, to_checkpoint_form, to_kernel_form
from megatron_r1.engines.plugin.memory_layout import PlacedParameter

NO_STATE = (torch.Stream, torch.Event)
"""Types of objects that any other of the type may replace."""
VALUE_TYPES = (bool, int, float, str, type(None))
"""Types of attributes that hold no weights: where only one state has such an attribute, the other
has not been asked for it (of FP8 experts `FusedMoEQuantConfig.ocp_mx_scheme`)."""
CONFIGURATION = "vllm.config"
"""The package of vLLM's settings, from which every layer of the model can be reached."""


class SavedKernelState:
    """What a layer has besides parameters and buffers, as it is when this is created.

    These are the attributes of its quantization method and of the objects that the method refers
    to, and the layer's other tensors (a kernel's workspace)."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._tensors = _plain_tensors(layer)
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}
        method = getattr(layer, "quant_method", None)
        if method is not None:
            self._save_attributes(method, is_root=True)

    def restore(self, in_use: Collection[torch.Tensor]) -> None:
        """Put this state back, with the values of the present one.

        Args:
            in_use: the layer's parameters and buffers, which have the new values.

        Raises:
            ValueError: where the present state has another form, or a value other than a tensor
                that has changed: the kernel would compute with the old one."""
        has_new_values = {_storage_id(tensor) for tensor in in_use}
        visited_ids: set[int] = set()
        states = [(vars(holder), values_before) for holder, values_before in self._objects.values()]
        for present_values, values_before in [
            (_plain_tensors(self._layer), self._tensors),
            *states,
        ]:
            for old_tensor, new_tensor in _changed_tensors(
                values_before, present_values, type(self._layer).__name__, visited_ids
            ):
                if _storage_id(old_tensor) not in has_new_values:
                    old_tensor.data.copy_(new_tensor)
        vars(self._layer).update(self._tensors)
        for present_values, values_before in states:
            for name in present_values.keys() - values_before.keys():
                del present_values[name]
            present_values.update(values_before)

    def _save_attributes(self, value: Any, *, is_root: bool = False) -> None:
        """Save the attributes of an object, and of all that it refers to."""
        if isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._save_attributes(item)
        elif (is_root or _has_state(value)) and id(value) not in self._objects:
            self._objects[id(value)] = value, dict(vars(value))
            self._save_attributes(vars(value))


def _plain_tensors(layer: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def _has_state(value: Any) -> bool:
    opaque_types = torch.Tensor, torch.nn.Module, FunctionType, MethodType, ModuleType, type
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, opaque_types)
        and not type(value).__module__.startswith(CONFIGURATION)
    )


def _changed_tensors(
    old: Any, new: Any, path: str, visited_ids: set[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tensor of the old state, tensor of the new) wherever they have different memory.

    Args:
        old: a value of the old state.
        new: the value at the same place of the new state.
        path: the attributes that lead there, for errors.
        visited_ids: the ids of the new objects that were visited; this call adds to it.

    Raises:
        ValueError: the two states differ in more than the values of tensors."""
    if old is new or id(new) in visited_ids or isinstance(new, NO_STATE):
        return
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{path}: {old.shape} {old.dtype} became {new.shape} {new.dtype}")
        if not new.is_meta and _storage_id(old) != _storage_id(new):
            yield old, new
        return
    if type(old) is not type(new):
        raise ValueError(f"{path}: {type(old).__name__} became {type(new).__name__}")
    old_parts, new_parts = _parts_by_name(old), _parts_by_name(new)
    if old_parts is None or new_parts is None:
        if old != new:
            raise ValueError(f"{path}: {old} became {new}")
        return
    visited_ids.add(id(new))
    all_parts = {**old_parts, **new_parts}
    # Kernels compute some values when they are first asked for, and keep them.
    late_names = {
        name
        for name in old_parts.keys() ^ new_parts.keys()
        if isinstance(all_parts[name], VALUE_TYPES)
    }
    if old_parts.keys() - late_names != new_parts.keys() - late_names:
        raise ValueError(f"{path}: {[*old_parts]} became {[*new_parts]}")
    for name, part in new_parts.items():
        if name not in late_names:
            yield from _changed_tensors(old_parts[name], part, f"{path}.{name}", visited_ids)


def _parts_by_name(value: Any) -> dict[Any, Any] | None:
    """Return what an object consists of, by name; None for a value or an object without parts."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, MethodType):
        return {"self": value.__self__, "func": value.__func__}
    if isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        return {"code": value.__code__, "defaults": value.__defaults__, **dict(enumerate(cells))}
    return vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else None


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def load_layers(
    model: torch.nn.Module,
    placements: Sequence[PlacedParameter],
    memory: torch.Tensor,
    *,
    in_place: bool = False,
) -> None:
    """Load these parameters, whole layers of the model. The engine must not compute meanwhile;
    afterwards the memory may be overwritten.

    Args:
        model: vLLM's model on this rank, which has these layers.
        placements: the parameters, with their offsets in the memory.
        memory: uint8, the memory that has their values.
        in_place: the memory may not be overwritten, because the engine computes there with
            parameters that post-processing leaves unchanged. For engines that captured no
            addresses: on a CPU."""
    for _, group in groupby(placements, key=lambda placement: id(placement.parameter.layer)):
        in_layer = list(group)
        layer = in_layer[0].parameter.layer
        received_tensors = {}
        for placement in in_layer:
            if placement.parameter.is_live:
                # It keeps its storage, by which `loader_copies` identifies it.
                getattr(layer, placement.parameter.name).copy_(placement.value(memory))
            else:
                received_tensors[placement.parameter.name] = placement.value(memory)
        if received_tensors:
            _load_layer(model, layer, received_tensors, in_place)


@torch.no_grad()
def recompute_shared_tensors(model: torch.nn.Module, config: ModelConfig) -> None:
    """Recompute the tensors that depend on several layers' weights."""
    for layer in model.modules():
        if is_deferred_attention_layer(layer):
            cast(Any, layer).process_weights_after_loading(config.dtype)
    repack_output_head(model)


def _load_layer(
    model: torch.nn.Module,
    layer: torch.nn.Module,
    received: dict[str, torch.Tensor],
    in_place: bool,
) -> None:
    """Load a layer from its received tensors in checkpoint form.

    vLLM converts them to its kernels' form; the result goes into the tensors in use, which CUDA
    graphs point to.

    Args:
        model: vLLM's model on this rank.
        layer: one of its layers.
        received: the received tensors of the layer, by name.
        in_place: whether the engine computes in the memory of `received`, as in `load_layers`."""
    saved_state = SavedKernelState(layer)
    info = to_checkpoint_form(layer)
    in_use = info.kernel_tensors
    in_checkpoint = get_layer_tensors(layer)
    for name, tensor in in_checkpoint.items():
        if tensor.is_meta:
            setattr(
                layer, name, _materialized_tensor(tensor, received.get(name), info.restore_device)
            )
    load_biases(layer, received, in_use[0])
    if not is_lookup_only(layer, model):
        _post_process(layer)
    for name, tensor in (in_use[0] | in_use[1]).items():
        # A tensor that was neither received nor computed by post-processing keeps its value.
        if name in received or name not in in_checkpoint:
            new_tensor = getattr(layer, name)
            if in_place and name in received and new_tensor.data_ptr() == received[name].data_ptr():
                tensor.data = new_tensor.data
            else:
                tensor.data.copy_(new_tensor)
    if not in_place:
        saved_state.restore([*in_use[0].values(), *in_use[1].values()])
    to_kernel_form(layer, info)


def _materialized_tensor(
    form: torch.Tensor, values: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return `values`, or undefined ones, with the class and attributes of a parameter in
    checkpoint form."""
    if values is None:
        with device:
            return meta.materialize_meta_tensor(form)
    values = values.to(device)
    values.__class__ = form.__class__
    values.__dict__ = form.__dict__.copy()
    return values


def _post_process(layer: torch.nn.Module) -> None:
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return
    reset_moe_kernel(method)
    # The first loading left this mark, with which post-processing would do nothing.
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        del layer._already_called_process_weights_after_loading
    method.process_weights_after_loading(layer)
    # New parameters carry the rank of the whole group, even if they are replicated.
    if hasattr(layer, "update_param_tp_status"):
        cast(Any, layer).update_param_tp_status()
