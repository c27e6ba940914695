"""Tiny models with random weights for a real engine, and what transformers says of them.

The functions are for a process of their own, see the fixture `oracle` in test_engine.py.
"""

import functools
import json

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
PLAIN_YARN = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
# vLLM's MLA kernel for the CPU wants kv_lora_rank 512 and qk_rope_head_dim 64. Without topk_method
# and scoring_func, which transformers does not write and the engine is given.
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 67,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": YARN,
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
PLAIN_ROPE = DEEPSEEK | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
DRAFTING = DEEPSEEK | {"num_nextn_predict_layers": 1}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 67,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
QWEN3 = QWEN | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
    "attention_bias": False,
}
ROUTED = {"moe_intermediate_size": 64, "num_experts_per_tok": 2, "norm_topk_prob": True}
QWEN3_MOE = {
    **{**QWEN3, **ROUTED, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
}
ONE_GROUP = {
    **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_experts_per_tok": 3},
}
GLM = {
    **{**QWEN3, **ROUTED, **ONE_GROUP, "num_nextn_predict_layers": 0, "attention_bias": True},
    **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "use_qk_norm": True},
    **{"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
}
# An epsilon that tells whether the latent norms have their own.
GLM_LITE = {
    **{
        **DEEPSEEK,
        **ONE_GROUP,
        "rms_norm_eps": 1e-3,
        "rope_parameters": PLAIN_ROPE["rope_parameters"],
    },
    **{"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"},
}
KIMI = {**DEEPSEEK, **ONE_GROUP, "rms_norm_eps": 1e-3}
DEEPSEEK_V2 = {
    **{**DEEPSEEK, "num_experts_per_tok": 3, "norm_topk_prob": False, "topk_group": 1},
    **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    **{"scoring_func": "softmax", "topk_method": "group_limited_greedy"},
}

# vLLM's experts on a CPU want widths that 32 divides.
GPT_OSS = {
    **{**QWEN, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 32},
    **{"attention_bias": True, "tie_word_embeddings": False, "intermediate_size": 64},
    **{"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 8},
    "rms_norm_eps": 1e-5,  # vLLM has no other
    "rope_parameters": PLAIN_YARN | {"truncate": False},
}


def write_model(folder, config, seed):
    """Write random weights of `config` as transformers would, under per-expert names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.requires_grad and tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=draw))
            elif tensor.requires_grad:
                tensor.copy_(0.08 * torch.randn(tensor.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))


def write_drafting_model(folder, seed, config=DRAFTING):
    """Write a DeepSeek model with one MTP layer, whose draft is often right, but not always.

    The next token depends on the last one above all, since embeddings are large compared with what
    layers add; the MTP layer hands that token's embedding on (eh_proj = [1, 0]). Its other weights
    are random and small, but for the norm, which is the model's."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_r1.models.weights.layout import hf_tensors
    from megatron_r1.models.weights.table import weight_table

    write_model(folder, config, seed)
    vocabulary, size = config["vocab_size"], config["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(seed + 100)
    tensors["model.embed_tokens.weight"] = torch.randn(vocabulary, size, generator=draw)
    tensors["lm_head.weight"] = 0.2 * torch.randn(vocabulary, size, generator=draw)
    # Signs of the model's own, which make another model's drafts wrong.
    tensors["model.norm.weight"] *= torch.randint(0, 2, (size,), generator=draw) * 2 - 1
    copies = weight_table(config).duplicate_of
    for name, (shape, _) in hf_tensors(config).items():
        if name in copies:
            tensors[name] = tensors[copies[name]].clone()
        elif name not in tensors:
            spread = 0.2 if len(shape) == 1 else 0.03
            tensors[name] = spread * torch.randn(shape, generator=draw) + (len(shape) == 1)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    tensors[mtp + "eh_proj.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    tensors[mtp + "shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors[mtp + "mlp.gate.e_score_correction_bias"] = 0.01 * torch.randn(8, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@functools.cache
def load_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logprobs(folder, prompt, responses, temperature):
    """log softmax(logits / temperature) of each response's tokens, by transformers in fp32."""
    import torch

    model = load_model(folder)
    answers = []
    with torch.no_grad():
        for response in responses:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            table = torch.log_softmax(logits.float() / temperature, -1)
            answers.append(table.gather(1, torch.tensor(response)[:, None])[:, 0].tolist())
    return answers


NEAR_TIE = 1e-5
"""Relative noise of a router's input under which experts that are almost equally good change
places; engines and transformers differ there by rounding, a tenth of that."""


def logprobs_before_near_ties(folder, prompt, responses, temperature):
    """As `reference_logprobs`, of each response's tokens before the first whose experts two right
    implementations may choose differently."""
    import torch

    model = load_model(folder)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    draw = torch.Generator().manual_seed(0)
    answers = reference_logprobs(folder, prompt, responses, temperature)
    if not gates:
        return answers

    def noisy(_, arguments):
        hidden = arguments[0]
        noise = torch.randn(hidden.shape, generator=draw) * NEAR_TIE
        return hidden * (1 + noise), *arguments[1:]

    def chosen_experts(tokens):
        chosen = []
        hooks = [g.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for g in gates]
        with torch.no_grad():
            model(tokens)
        for hook in hooks:
            hook.remove()
        return torch.stack([each.view(tokens.shape[1], -1).sort(-1).values for each in chosen])

    for index, response in enumerate(responses):
        tokens = torch.tensor([prompt + response])
        chosen = chosen_experts(tokens)
        hooks = [gate.register_forward_pre_hook(noisy) for gate in gates]
        differs = [(chosen_experts(tokens) != chosen).any(-1).any(0) for _ in range(8)]
        for hook in hooks:
            hook.remove()
        ties = torch.stack(differs).any(0).nonzero()[:, 0].tolist()
        if ties:
            answers[index] = answers[index][: max(0, ties[0] - len(prompt) + 1)]
    return answers


def reference_rows(folder, prompt, responses, temperature):
    """log softmax(logits / temperature) [tokens, vocabulary] at each response's tokens, by
    transformers in fp32."""
    import torch

    model = load_model(folder)
    with torch.no_grad():
        return [
            (model(torch.tensor([prompt + each])).logits[0, len(prompt) - 1 : -1] / temperature)
            .log_softmax(-1)
            .tolist()
            for each in responses
        ]


def greedy_tokens(folder, prompt, responses):
    """Of each response the likeliest tokens after the prompt and the tokens before, by
    transformers."""
    import torch

    model = load_model(folder)
    with torch.no_grad():
        return [
            model(torch.tensor([prompt + response]))
            .logits[0, len(prompt) - 1 : -1]
            .argmax(-1)
            .tolist()
            for response in responses
        ]


def next_token_logprobs(folder, contexts):
    """log softmax(logits) after each of these contexts, all of one length, by transformers."""
    import torch

    with torch.no_grad():
        return [
            row.tolist()
            for part in torch.tensor(contexts).split(512)
            for row in torch.log_softmax(load_model(folder)(part).logits[:, -1].float(), -1)
        ]


def reference_routing(folder, prompt, responses):
    """Per response, token (but the last) and MoE layer the experts that transformers chooses,
    sorted."""
    import torch

    model = load_model(folder)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    chosen = []
    hooks = [g.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for g in gates]
    answers = []
    with torch.no_grad():
        for response in responses:
            chosen.clear()
            model(torch.tensor([prompt + response[:-1]]))
            answers.append(torch.stack(chosen, 1).sort(-1).values.tolist())
    for hook in hooks:
        hook.remove()
    return answers


def write_nan(source, target, name):
    """Copy a weights file with one tensor that is not a number anywhere."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    tensors[name].fill_(float("nan"))
    save_file(tensors, target)
