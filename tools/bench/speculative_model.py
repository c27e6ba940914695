"""A model whose MTP layer often drafts what the model samples: a DeepSeek-V3 shape of 55 M
parameters.

Its weights are made, not trained: the next token depends on the last one above all, since
embeddings are large compared with what layers add, and the MTP layer hands that token's embedding
on (eh_proj = [1, 0]). With `SHARPNESS` of the head about 63% of its drafts are accepted at
temperature 1; of DeepSeek-V3's second token it is 85 to 90% (arXiv 2412.19437, section 5.4.3)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.models.weights.table import weight_table

HIDDEN, VOCABULARY, LAYERS = 512, 1024, 6
SHARPNESS = 0.8
SHAPE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "moe_intermediate_size": HIDDEN // 2,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}


def write_model(folder: Path) -> int:
    """Write config.json and weights; return the number of parameters, the MTP layer's included."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))
    draw, tensors = torch.Generator().manual_seed(0), {}
    copies = weight_table(SHAPE).duplicate_of
    for name, (shape, _) in hf_tensors(SHAPE).items():
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif name not in copies:
            tensors[name] = 0.02 * torch.randn(shape, generator=draw)
    tensors["model.embed_tokens.weight"] *= 50
    tensors["lm_head.weight"] *= SHARPNESS / 0.02
    mtp = f"model.layers.{LAYERS}.eh_proj.weight"
    tensors[mtp] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], 1)
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    tensors |= {name: tensors[original].clone() for name, original in copies.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return num_parameters
