"""Llama: which Hugging Face tensors each Megatron parameter is made of."""

from __future__ import annotations

from megatron_r1.weights.rules import (
    Rule,
    Source,
    Table,
    columns,
    query_groups,
    rows,
    vocabulary,
    whole,
)


def table(hf: dict) -> Table:
    """The rules for this `config.json`."""
    return decoder(hf, qkv_bias=False)


def decoder(hf: dict, qkv_bias: bool) -> Table:
    """The rules of a decoder with grouped-query attention and a dense SwiGLU in every layer."""
    hidden, vocab = hf["hidden_size"], hf["vocab_size"]
    tied = bool(hf.get("tie_word_embeddings"))
    embedding = Source("model.embed_tokens.weight", (vocab, hidden))
    head = embedding if tied else Source("lm_head.weight", (vocab, hidden))
    return Table(
        embedding=[Rule("embedding.word_embeddings.weight", (embedding,), vocabulary)],
        layers=[_attention(hf, qkv_bias) + _mlp(hf)] * hf["num_hidden_layers"],
        head=[
            Rule(
                "decoder.final_layernorm.weight", (Source("model.norm.weight", (hidden,)),), whole
            ),
            Rule("output_layer.weight", (head,), vocabulary),
        ],
    )


def _attention(hf: dict, qkv_bias: bool) -> list[Rule]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    size = hf.get("head_dim") or hidden // heads
    heights = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
    weights = tuple(Source(f"self_attn.{n}.weight", (h, hidden)) for n, h in heights.items())
    biases = tuple(Source(f"self_attn.{n}.bias", (h,)) for n, h in heights.items())
    out = Source("self_attn.o_proj.weight", (hidden, heads * size))
    qkv, split = "self_attention.linear_qkv", query_groups(groups)
    return [
        Rule(
            "input_layernorm.weight",
            (Source("input_layernorm.weight", (hidden,)),),
            whole,
            te=f"{qkv}.layer_norm_weight",
        ),
        Rule(f"{qkv}.weight", weights, split),
        *([Rule(f"{qkv}.bias", biases, split)] if qkv_bias else []),
        Rule("self_attention.linear_proj.weight", (out,), rows),
    ]


def _mlp(hf: dict) -> list[Rule]:
    hidden, inner = hf["hidden_size"], hf["intermediate_size"]
    gate_up = tuple(Source(f"mlp.{n}_proj.weight", (inner, hidden)) for n in ("gate", "up"))
    return [
        Rule(
            "pre_mlp_layernorm.weight",
            (Source("post_attention_layernorm.weight", (hidden,)),),
            whole,
            te="mlp.linear_fc1.layer_norm_weight",
        ),
        Rule("mlp.linear_fc1.weight", gate_up, columns),
        Rule("mlp.linear_fc2.weight", (Source("mlp.down_proj.weight", (hidden, inner)),), rows),
    ]
