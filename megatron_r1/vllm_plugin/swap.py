"""Landed weights go live: layer by layer from checkpoint form to the form vLLM's kernels use.

What vLLM's layerwise reload does (model_loader/reload/layerwise.py), without its loaders: the
parameters of a layer are views of the landing memory, vLLM's own post-processing runs on them, and
its result is copied into the tensors that the engine computes with, whose addresses stay. MLA's
absorbed W_UK_T and W_UV follow in `finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise, meta
from vllm.model_executor.model_loader.reload.utils import (
    get_layer_params_buffers,
    get_layer_tensors,
)

from megatron_r1.vllm_plugin.cpu_patches import (
    forget_moe_kernel,
    is_only_looked_up,
    repack_output_head,
)
from megatron_r1.vllm_plugin.memory_layout import Placed


@torch.no_grad()
def load(
    model: torch.nn.Module,
    placed: Sequence[Placed],
    memory: torch.Tensor,
    *,
    keep: bool = False,
) -> None:
    """Bring these parameters, whole layers of the model, into use. The engine must not compute
    meanwhile; afterwards the memory may be written again.

    keep: it may not. The engine then computes with parameters that no post-processing changes where
    they lie, which is for engines that captured no addresses: on a CPU."""
    for _, group in groupby(placed, key=lambda at: id(at.parameter.layer)):
        of_layer = list(group)
        for at in of_layer:
            if at.parameter.is_live:
                # Its storage stays its own, by which the recorder knows it from others.
                getattr(at.parameter.layer, at.parameter.name).copy_(at.value(memory))
        arrived = {
            at.parameter.name: at.value(memory) for at in of_layer if not at.parameter.is_live
        }
        if arrived:
            _load_layer(model, of_layer[0].parameter.layer, arrived, keep)


@torch.no_grad()
def finish(model: torch.nn.Module, config: ModelConfig) -> None:
    """What depends on several layers' weights."""
    for layer in model.modules():
        if is_deferred_attention_layer(layer):
            layer.process_weights_after_loading(config.dtype)
    repack_output_head(model)


def _load_layer(
    model: torch.nn.Module, layer: torch.nn.Module, arrived: dict[str, torch.Tensor], keep: bool
) -> None:
    info = layerwise.get_layerwise_info(layer)
    in_use = get_layer_params_buffers(layer)
    info.kernel_tensors = in_use
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    meta.restore_layer_on_meta(layer, info)
    waiting = get_layer_tensors(layer)
    for name, tensor in waiting.items():
        if tensor.is_meta:
            setattr(layer, name, _materialized(tensor, arrived.get(name), info.restore_device))
    if not is_only_looked_up(layer, model):
        _post_process(layer)
    for name, tensor in (in_use[0] | in_use[1]).items():
        # What neither arrived nor was made of what arrived keeps its value.
        if name in arrived or name not in waiting:
            made = getattr(layer, name)
            if keep and name in arrived and made.data_ptr() == arrived[name].data_ptr():
                tensor.data = made.data
            else:
                tensor.data.copy_(made)
    layerwise._place_kernel_tensors(layer, info)
    info.reset()


def _materialized(
    form: torch.Tensor, values: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """`values`, or undefined ones, with the class and attributes of a parameter in checkpoint
    form."""
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
    # The first loading left this mark, with which nothing would be done again.
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        del layer._already_called_process_weights_after_loading
    method.process_weights_after_loading(layer)
    # Parameters made anew carry the rank of the whole group, also those that are replicated.
    if hasattr(layer, "update_param_tp_status"):
        layer.update_param_tp_status()
