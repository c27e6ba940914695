"""Makes FP8 folders as DeepSeek publishes them; shares no code with the package."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

QUANTIZED = re.compile(
    r"(self_attn\.(q|k|v|o|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|(gate|up|down)_proj)\.weight$"
)


def blocks(matrix: torch.Tensor):
    for row in range(0, matrix.shape[0], 128):
        for column in range(0, matrix.shape[1], 128):
            yield slice(row, row + 128), slice(column, column + 128)


def quantize(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """kind: "amax" scales by amax / 448; "powers" by the power of two above; "odd" by a number that
    no rule gives back."""
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    generator = torch.Generator().manual_seed(weight.numel())
    for block in blocks(weight):
        scale = weight[block].float().abs().max().clamp(min=1e-4) / 448
        if kind == "powers":
            scale = 2 ** torch.ceil(torch.log2(scale))
        elif kind == "odd":
            scale = scale * (1 + torch.rand((), generator=generator))
        q[block] = (weight[block].float() / scale).to(torch.float8_e4m3fn)
        scales[block[0].start // 128, block[1].start // 128] = scale
    return q, scales


def dequantize(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32."""
    weight = q.float()
    for block in blocks(weight):
        weight[block] *= scales[block[0].start // 128, block[1].start // 128]
    return weight


def publish(source: Path, out: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write `source` as FP8 with everything else in bf16; returns the weights' values, fp32."""
    shutil.copytree(source, out)
    tensors, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if QUANTIZED.search(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor, kind)
            values[name] = dequantize(tensors[name], tensors[f"{name}_scale_inv"])
        else:
            keep = name.endswith("e_score_correction_bias")
            tensors[name] = tensor if keep else tensor.bfloat16()
            values[name] = tensors[name].float()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if kind == "powers":
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    (out / "config.json").write_text(json.dumps(config))
    return values
