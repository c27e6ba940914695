"""How published checkpoints store weights in FP8 blocks with scales (DeepSeek), and which tensors
their files have. No torch.

The weight W of a projection is stored as float8_e4m3fn, and next to it `W_scale_inv`, one fp32 per
128x128 block (the last ones cut off by the edge): W = q · scale_inv (deepseek-ai/DeepSeek-V3,
README_WEIGHTS.md). Other publishers store the scales in the types of SCALE_TYPES. The linear layers
of attention, MLPs, shared and routed experts are quantized, those of MTP too; embedding, head,
norms, the router and MTP's eh_proj are not (deepseek-ai/DeepSeek-V3, inference/model.py; in vLLM's
deepseek_mtp.py eh_proj is a plain Linear).

`published_tensors` lists the tensors as files have them: `stacked_experts` says where those differ
from the weight table's."""

import re
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models import support_checks
from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.weights.formats.stacked_experts import stacked_part
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.splits import Shape

FP8_BLOCK_SIZE = support_checks.FP8_BLOCK_SIZE
FP8_CONFIG = support_checks.FP8_BLOCKS
FP8_DTYPE = "float8_e4m3fn"
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Types of safetensors in which scales can be read. F8_E8M0 are exponents alone, 2^(e - 127), and
U8 the same bytes, written by software that has no such type."""

_SCALE = "_scale_inv"
_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")


def fp8_config(hf_config: HFConfig) -> dict[str, Any]:
    """Return the `quantization_config` of FP8 weights of the model `hf_config`: DeepSeek's, with
    the format of scales that its own names ("ue8m0", of DeepSeek-V3.1: powers of two).

    Args:
        hf_config: the model's `config.json`.
    """
    return {**FP8_CONFIG, **({"scale_fmt": "ue8m0"} if has_power_of_two_scales(hf_config) else {})}


def has_power_of_two_scales(hf_config: HFConfig) -> bool:
    """Return whether scales of FP8 weights of the model `hf_config`, its `config.json`, are rounded
    up to powers of two."""
    return (hf_config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint holds the HF tensor `name` as FP8."""
    return bool(_PROJECTION.search(name))


def scale_name(name: str) -> str:
    """Return the name of the tensor that has the FP8 scales of weight `name`."""
    return name + _SCALE


def is_scale(name: str) -> bool:
    """Whether `name` holds the scales of another tensor."""
    return name.endswith(".weight" + _SCALE)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an FP8 weight's scales: one for each block of `FP8_BLOCK_SIZE` in both
    dimensions, those at the edges included."""
    return tuple(-(-size // FP8_BLOCK_SIZE) for size in shape)


def check_fp8_layout(hf_config: HFConfig) -> None:
    """Raise UserError for a model without this layout."""
    if model_family(hf_config).stacked_experts:
        raise UserError(
            f"{hf_config['architectures'][0]} has no FP8 layout: its experts are stored as bf16 or "
            "MXFP4",
            key="fp8",
            cause=Cause.UNSUPPORTED,
        )


def published_tensors(hf_config: HFConfig, with_mtp: bool = True) -> dict[str, tuple[Shape, str]]:
    """Return name -> (shape, dtype) of every tensor of a checkpoint's files; see `hf_tensors`."""
    tensors = {}
    for name, (shape, dtype) in hf_tensors(hf_config, with_mtp=with_mtp).items():
        if part := stacked_part(hf_config, name):
            name = part.name
            shape = part.stored_shape(shape, hf_config["n_routed_experts"])
        tensors[name] = (shape, dtype)
    return tensors
