"""Model folders with random weights, without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.models.weights import hf_tensors


def write_random(
    folder: Path, hf_config: dict, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write norms around 1 and other weights of deviation 0.1; return the folder."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    weights = {}
    for name, (shape, _) in hf_tensors(resolve_aliases(hf_config)).items():
        values = 0.1 * torch.randn(shape, generator=draw) + name.endswith("norm.weight")
        weights[name] = values.to(dtype)
    for name in weights:  # an MTP layer's copies
        if name.endswith("embed_tokens.weight"):
            weights[name] = weights["model.embed_tokens.weight"].clone()
        elif name.endswith("shared_head.head.weight"):
            weights[name] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
