"""Replaces the engine's weights by received ones, layer by layer, in the form of vLLM's kernels.

This is vLLM's layerwise reload (model_loader/reload/layerwise.py) without its loaders: the
parameters of a layer are views of the receive buffer, vLLM's own post-processing runs on them, and
its result is copied into the tensors that the engine computes with, whose addresses stay. Kernels
keep these (`kept_state`), never the receive buffer. MLA's absorbed W_UK_T and W_UV follow in
`finish`."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import meta
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from megatron_r1.engines.plugin.cpu_patches import (
    forget_moe_kernel,
    is_lookup_only,
    repack_output_head,
)
from megatron_r1.engines.plugin.kept_state import KeptState
from megatron_r1.engines.plugin.memory_layout import PlacedParameter
from megatron_r1.engines.plugin.recorder import to_checkpoint_form, to_kernel_form
from megatron_r1.engines.plugin.stacked_experts import load_biases


@torch.no_grad()
def load(
    model: torch.nn.Module,
    placed: Sequence[PlacedParameter],
    memory: torch.Tensor,
    *,
    in_place: bool = False,
) -> None:
    """Load these parameters, whole layers of the model. The engine must not compute meanwhile;
    afterwards the memory may be overwritten.

    in_place: the memory may not be overwritten, because the engine computes there with parameters
    that post-processing leaves unchanged. For engines that captured no addresses: on a CPU."""
    for _, group in groupby(placed, key=lambda each: id(each.parameter.layer)):
        in_layer = list(group)
        layer = in_layer[0].parameter.layer
        received = {}
        for each in in_layer:
            if each.parameter.is_live:
                # It keeps its storage, by which the recorder identifies it.
                getattr(layer, each.parameter.name).copy_(each.value(memory))
            else:
                received[each.parameter.name] = each.value(memory)
        if received:
            _load_layer(model, layer, received, in_place)


@torch.no_grad()
def finish(model: torch.nn.Module, config: ModelConfig) -> None:
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
    """Give a layer its received tensors in checkpoint form, have vLLM convert them to its
    kernels' form, and put the result into the tensors in use, which CUDA graphs point to."""
    before = KeptState(layer)
    info = to_checkpoint_form(layer)
    in_use = info.kernel_tensors
    in_checkpoint = get_layer_tensors(layer)
    for name, tensor in in_checkpoint.items():
        if tensor.is_meta:
            setattr(layer, name, _materialized(tensor, received.get(name), info.restore_device))
    load_biases(layer, received, in_use[0])
    if not is_lookup_only(layer, model):
        _post_process(layer)
    for name, tensor in (in_use[0] | in_use[1]).items():
        # A tensor that was neither received nor computed by post-processing keeps its value.
        if name in received or name not in in_checkpoint:
            new = getattr(layer, name)
            if in_place and name in received and new.data_ptr() == received[name].data_ptr():
                tensor.data = new.data
            else:
                tensor.data.copy_(new)
    if not in_place:
        before.restore([*in_use[0].values(), *in_use[1].values()])
    to_kernel_form(layer, info)


def _materialized(
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
    forget_moe_kernel(method)
    # The first loading left this mark, with which post-processing would do nothing.
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        del layer._already_called_process_weights_after_loading
    method.process_weights_after_loading(layer)
    # New parameters carry the rank of the whole group, even if they are replicated.
    if hasattr(layer, "update_param_tp_status"):
        cast(Any, layer).update_param_tp_status()
