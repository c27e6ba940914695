"""The weight table of Llama, and of all decoders with grouped-query attention."""

from megatron_r1.weights.rules import QueryGroups, Rule, Source, Table, gated, rows, weight, whole


def table(hf: dict) -> Table:
    """Return the rules for this `config.json`."""
    return decoder(hf, qkv_bias=False)


def decoder(hf: dict, qkv_bias: bool) -> Table:
    """Return the rules of a decoder with grouped-query attention and a SwiGLU in every layer."""
    head = "model.embed_tokens" if hf.get("tie_word_embeddings") else "lm_head"
    layer = _attention(hf, qkv_bias) + dense_mlp(hf)
    return Table.of_decoder(hf, head, [layer] * hf["num_hidden_layers"])


def _attention(hf: dict, qkv_bias: bool) -> list[Rule]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    size = hf.get("head_dim") or hidden // heads
    heights = {"q": heads * size, "k": groups * size, "v": groups * size}
    weights = tuple(Source(f"self_attn.{x}_proj.weight", (n, hidden)) for x, n in heights.items())
    biases = tuple(Source(f"self_attn.{x}_proj.bias", (n,)) for x, n in heights.items())
    qkv, split = "self_attention.linear_qkv", QueryGroups(groups)
    out = (hidden, heads * size)
    return [
        weight("input_layernorm", "input_layernorm", (hidden,), whole, f"{qkv}.layer_norm_weight"),
        Rule(f"{qkv}.weight", weights, split),
        *([Rule(f"{qkv}.bias", biases, split)] if qkv_bias else []),
        weight("self_attention.linear_proj", "self_attn.o_proj", out, rows),
    ]


def dense_mlp(hf: dict) -> list[Rule]:
    """Return the rules of a SwiGLU and the norm before it."""
    hidden, norm = hf["hidden_size"], "mlp.linear_fc1.layer_norm_weight"
    return [
        weight("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), whole, norm),
        *gated("mlp", "mlp", hidden, hf["intermediate_size"]),
    ]
