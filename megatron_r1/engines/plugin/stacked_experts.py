"""Loads the experts of a gpt-oss model one by one, as a push names them.

vLLM 0.32's loader (model_executor/models/gpt_oss.py: `GptOssModel._load_weights_other`) takes all
experts of a layer as one tensor and transposes it, which is no copy of rectangles. Its parameters
have gate and up in alternate rows; ranks that share experts by tensor parallelism leave the second
layer's bias to the first of them. The kernel of the experts keeps the tensors of both biases that
it was built with."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_BIASES = ("w13_bias", "w2_bias")


def load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Have `model` load (name, tensor) pairs; it may be of any architecture."""
    if type(model).__name__ == "GptOssForCausalLM":
        weights = _without_experts(model, weights)
        # Its loader reads a key of this, even where --hf-overrides has made it None.
        for config in (model.config, model.model.config):
            if getattr(config, "quantization_config", 0) is None:
                del config.quantization_config
    model.load_weights(weights)


def is_left_out(parameter: str, layer: Any) -> bool:
    """Whether this rank loads nothing into a layer's parameter, which is zero."""
    return parameter == "w2_bias" and layer.moe_config.moe_parallel_config.tp_rank > 0


def load_biases(
    layer: torch.nn.Module,
    received: Mapping[str, torch.Tensor],
    in_use: Mapping[str, torch.Tensor],
) -> None:
    """Write the biases of a layer's experts into the tensors in use, and give it these.

    A kernel that is built again, on a CPU, would otherwise compute with views of the receive
    buffer. A bias that this rank leaves out is set to zero; dummy weights are not."""
    for name in _BIASES:
        if name in in_use:
            kept = in_use[name]
            if name in received:
                kept.data.copy_(received[name])
            else:
                kept.data.zero_()
            setattr(layer, name, kept)


def _without_experts(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the experts among the weights; yield the others."""
    layers = dict(model.named_modules())
    for name, tensor in weights:
        if found := _EXPERT.fullmatch(name):
            prefix, expert, kind, ending = found.groups()
            # Of a layer on another pipeline stage there is none.
            if layer := layers.get(f"{prefix}.routed_experts"):
                _load(layer, int(expert), kind, ending, tensor)
        else:
            yield name, tensor


def _load(layer: Any, expert: int, kind: str, ending: str, tensor: torch.Tensor) -> None:
    local = layer._map_global_expert_id_to_local_expert_id(expert)
    rank = layer.moe_config.moe_parallel_config.tp_rank
    if local == -1:
        return
    if kind == "down":
        target = getattr(layer, f"w2_{ending}")[local]
        if ending == "weight":
            tensor = tensor.narrow(1, rank * target.shape[1], target.shape[1])
        elif rank > 0:
            return
    else:
        target = getattr(layer, f"w13_{ending}")[local][int(kind == "up") :: 2]
        tensor = tensor.narrow(0, rank * target.shape[0], target.shape[0])
    target.copy_(tensor)
