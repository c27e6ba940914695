"""Model folders as the hub has them, but small: a released `config.json` with all of its keys and
smaller sizes, random weights that transformers wrote, and a tokenizer.

`write` is for a process of its own, see the fixture `oracle`."""

import json
from pathlib import Path

import command_line

VOCABULARY = 280
LAYERS = 4
SEED = 0
SIZES = {
    **{"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "hidden_size": 128},
    **{"intermediate_size": 96, "moe_intermediate_size": 64, "num_attention_heads": 4},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "first_k_dense_replace": 1},
    **{"sliding_window": 8, "max_window_layers": LAYERS, "n_shared_experts": 1},
    **{"n_routed_experts": 8, "num_experts": 8, "num_local_experts": 8},
    **{"num_experts_per_tok": 3, "experts_per_token": 3},
}
"""Where the released file has the key."""


def shrink(hf_config: dict) -> dict:
    """Return `hf_config` with smaller sizes. What vLLM's kernels for a CPU have once only stays:
    latent attention's kv_lora_rank and qk_rope_head_dim."""
    small = {
        **hf_config,
        **{key: size for key, size in SIZES.items() if hf_config.get(key) is not None},
    }
    if "kv_lora_rank" in hf_config:
        small |= {"num_key_value_heads": 4, "qk_nope_head_dim": 32, "v_head_dim": 32}
        small |= {"q_lora_rank": 96} if hf_config["q_lora_rank"] else {}
    else:
        small |= {"num_key_value_heads": 2} | ({"head_dim": 64} if "head_dim" in hf_config else {})
    if (hf_config.get("n_group") or 1) > 1:
        small |= {"n_group": 4, "topk_group": 2}
    for key in ("layer_types", "mlp_layer_types"):
        if hf_config.get(key):
            small[key] = hf_config[key][:LAYERS]
    if "GptOss" in hf_config["architectures"][0]:
        small["intermediate_size"] = 64  # vLLM's experts on a CPU want a multiple of 32
    return small


def write(folder: Path, hf_config: dict) -> None:
    """Write config.json as `hf_config` is, random weights and a tokenizer of 263 tokens with a chat
    template."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from megatron_r1.models.hf_config_names import resolve_aliases
    from megatron_r1.models.weights.formats import published_layout
    from megatron_r1.models.weights.formats.published_layout import published_tensors
    from megatron_r1.models.weights.table import weight_table

    command_line.write_model(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(hf_config))
    kind = getattr(transformers, hf_config["architectures"][0])
    config = kind.config_class.from_pretrained(folder)
    config.quantization_config = None
    config.model_type = kind.config_class.model_type  # Kimi-K2's own has no names of stored experts
    model = kind(config).float()
    draw = torch.Generator().manual_seed(SEED)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=draw)
        return 0.08 * values if len(shape) > 1 else name.endswith("norm.weight") + 0.2 * values

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.requires_grad or name.endswith("e_score_correction_bias"):
                tensor.copy_(drawn(name, tensor.shape))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config))
    # transformers has no MTP layers.
    tensors = load_file(folder / "model.safetensors")
    resolved = resolve_aliases(hf_config)
    for name, (shape, _) in published_tensors(resolved, with_mtp=True).items():
        if name not in tensors:
            original = weight_table(resolved).duplicate_of.get(name)
            tensors[name] = tensors[original].clone() if original else drawn(name, shape)
    form = hf_config.get("quantization_config", {}).get("quant_method")
    for name in [*tensors] if form else []:
        if form == "fp8" and published_layout.is_quantized(name):
            tensors |= _as_fp8(name, tensors[name])
        elif form == "mxfp4" and tensors[name].dim() == 3:
            tensors |= _as_mxfp4(name, tensors.pop(name).shape, draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _as_fp8(name: str, weight):
    """Return codes and scales in blocks of 128 x 128."""
    import torch

    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(codes.dtype)
    return {name: codes, f"{name}_scale_inv": scales}


def _as_mxfp4(name: str, shape: tuple[int, ...], draw):
    """Return random codes and exponents: numbers up to 0.1 and to 0.4."""
    import torch

    experts, columns, rows = shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw)
    scales = torch.randint(121, 124, (experts, rows, columns // 32), generator=draw)
    return {
        f"{name}_blocks": blocks.to(torch.uint8),
        f"{name}_scales": scales.to(torch.uint8),
    }
