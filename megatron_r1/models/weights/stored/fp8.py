"""The FP8 layout of DeepSeek's published checkpoints: its tensors, names and scales. No torch.

The weight W of a projection is stored as float8_e4m3fn, and next to it `W_scale_inv`, one fp32 per
128x128 block (the last ones cut off by the edge): W = q · scale_inv (deepseek-ai/DeepSeek-V3,
README_WEIGHTS.md). Other publishers store the scales in the types of SCALE_TYPES. The linear layers
of attention, MLPs, shared and routed experts are quantized, those of MTP too; embedding, head,
norms, the router and MTP's eh_proj are not (deepseek-ai/DeepSeek-V3, inference/model.py; in vLLM's
deepseek_mtp.py eh_proj is a plain Linear).
"""

import re

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models import quantization
from megatron_r1.models.hf_config import model_family

BLOCK = quantization.BLOCK
CONFIG = quantization.FP8_BLOCKS
STORED = "float8_e4m3fn"
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Types of safetensors in which scales can be read. F8_E8M0 are exponents alone, 2^(e - 127), and
U8 the same bytes, written by software that has no such type."""

_SCALE = "_scale_inv"
_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint holds the HF tensor `name` as FP8."""
    return bool(_PROJECTION.search(name))


def scale_name(name: str) -> str:
    """Return the name of the scales of `name`."""
    return name + _SCALE


def is_scale(name: str) -> bool:
    """Whether `name` holds the scales of another tensor."""
    return name.endswith(".weight" + _SCALE)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight of `shape`."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_layout(hf: dict) -> None:
    """Raise UserError for a model without this layout."""
    if model_family(hf).stacked:
        raise UserError(
            f"{hf['architectures'][0]} has no FP8 layout: its experts are stored as bf16 or MXFP4",
            key="fp8",
            cause=Cause.UNSUPPORTED,
        )
