"""Small models with random weights as Hugging Face folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_folder(folder: Path, hf_config: dict, dtype: torch.dtype) -> Path:
    """A Hugging Face folder of `hf_config` with random weights, -0 and infinity among them."""
    from megatron_r1.models.hf_config_names import resolve_aliases
    from megatron_r1.models.weights.formats.published_layout import published_tensors

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(hf_config["architectures"][0]))
    tensors = {}
    known = {**resolve_aliases(hf_config), "dtype": "any", "torch_dtype": None}
    for name, (shape, own) in published_tensors(known).items():
        values = torch.randn(shape, generator=generator) * 0.1
        tensors[name] = values.to(dtype if own == "any" else getattr(torch, own))
    layer = f"model.layers.{hf_config['num_hidden_layers']}"
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        if f"{layer}.{copy}.weight" in tensors:
            tensors[f"{layer}.{copy}.weight"] = tensors[f"{original}.weight"].clone()
    tensors["model.norm.weight"][:2] = torch.tensor([-0.0, torch.inf])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in hf_config.items() if key != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder
