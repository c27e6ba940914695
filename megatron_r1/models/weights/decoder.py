"""The weight table of every architecture in `models.families`: which tensors a decoder has."""

from dataclasses import replace

from megatron_r1.models.attention_fields import has_qk_norm, has_qkv_bias
from megatron_r1.models.hf_config import has_score_head, model_family, num_mtp_layers, sparse_layers
from megatron_r1.models.weights.rules import (
    QueryGroups,
    Rule,
    Source,
    Table,
    column_parallel,
    gated,
    row_parallel,
    vocab_parallel,
    weight,
    whole,
)


def table(hf: dict) -> Table:
    """Return the rules for this `config.json`, MTP layers included; UserError for an unknown
    architecture."""
    dense = [*_attention(hf), *_dense_mlp(hf)]
    sparse = [*_attention(hf), *_experts(hf)] if hf.get("n_routed_experts") else []
    kinds = sparse_layers(hf)
    layers = [sparse if is_sparse else dense for is_sparse in kinds]
    num_layers, num_mtp = len(layers), num_mtp_layers(hf)
    head = "model.embed_tokens" if hf.get("tie_word_embeddings") else "lm_head"
    copies = {}
    for layer in range(num_layers, num_layers + num_mtp):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = f"{head}.weight"
    vocab, hidden = hf["vocab_size"], hf["hidden_size"]
    embedding = "embedding.word_embeddings"
    last = weight("output_layer", head, (vocab, hidden), vocab_parallel)
    if has_score_head(hf):
        last = weight("score", "score", (1, hidden), whole)
    return Table(
        embedding=[weight(embedding, "model.embed_tokens", (vocab, hidden), vocab_parallel)],
        layers=layers,
        final_norm=[weight("decoder.final_layernorm", "model.norm", (hidden,), whole)],
        head=[last],
        # An MTP layer has the structure of the last decoder layer.
        mtp=[_mtp(hf, layers[-1])] * num_mtp,
        copies=copies,
        num_experts=hf.get("n_routed_experts") or 0,
    )


def _attention(hf: dict) -> list[Rule]:
    return _latent(hf) if model_family(hf).latent else _grouped_query(hf)


def _grouped_query(hf: dict) -> list[Rule]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    size = hf.get("head_dim") or hidden // heads
    heights = {"q": heads * size, "k": groups * size, "v": groups * size}
    weights = tuple(Source(f"self_attn.{x}_proj.weight", (n, hidden)) for x, n in heights.items())
    biases = tuple(Source(f"self_attn.{x}_proj.bias", (n,)) for x, n in heights.items())
    m = "self_attention."
    qkv, split = f"{m}linear_qkv", QueryGroups(groups)
    norms = ("q", "k") if has_qk_norm(hf) else ()
    family, sinks = model_family(hf), (Source("self_attn.sinks", (heads,)),)
    return [
        weight("input_layernorm", "input_layernorm", (hidden,), whole, f"{qkv}.layer_norm_weight"),
        Rule(f"{qkv}.weight", weights, split),
        *([Rule(f"{qkv}.bias", biases, split)] if has_qkv_bias(hf) else []),
        *(weight(f"{m}{x}_layernorm", f"self_attn.{x}_norm", (size,), whole) for x in norms),
        weight(f"{m}linear_proj", "self_attn.o_proj", (hidden, heads * size), row_parallel),
        *([_bias(f"{m}linear_proj", "self_attn.o_proj", hidden)] if family.biases else []),
        *(
            [Rule(f"{m}core_attention.softmax_offset", sinks, column_parallel)]
            if family.sinks
            else []
        ),
    ]


def _bias(megatron: str, name: str, size: int, te: str | None = None) -> Rule:
    """Return the rule of a bias that every rank holds whole; names as for `weight`."""
    return Rule(f"{megatron}.bias", (Source(f"{name}.bias", (size,)),), whole, te)


def _latent(hf: dict) -> list[Rule]:
    """Return the rules of latent attention: queries and keys with values, each down and up
    projected."""
    hidden, heads, latent = hf["hidden_size"], hf["num_attention_heads"], hf["kv_lora_rank"]
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    m, h = "self_attention.", "self_attn."
    query_height, kv_height = heads * (nope + rope), heads * (nope + value)
    q_norm, kv_norm = (f"{m}linear_{x}_up_proj.layer_norm_weight" for x in ("q", "kv"))
    if rank := hf.get("q_lora_rank"):
        query = [
            weight(m + "linear_q_down_proj", h + "q_a_proj", (rank, hidden), whole),
            weight(m + "q_layernorm", h + "q_a_layernorm", (rank,), whole, q_norm),
            weight(m + "linear_q_up_proj", h + "q_b_proj", (query_height, rank), column_parallel),
        ]
    else:
        query = [weight(m + "linear_q_proj", h + "q_proj", (query_height, hidden), column_parallel)]
    down = (latent + rope, hidden)
    return [
        weight("input_layernorm", "input_layernorm", (hidden,), whole),
        *query,
        weight(m + "linear_kv_down_proj", h + "kv_a_proj_with_mqa", down, whole),
        weight(m + "kv_layernorm", h + "kv_a_layernorm", (latent,), whole, kv_norm),
        weight(m + "linear_kv_up_proj", h + "kv_b_proj", (kv_height, latent), column_parallel),
        weight(m + "linear_proj", h + "o_proj", (hidden, heads * value), row_parallel),
    ]


def _dense_mlp(hf: dict) -> list[Rule]:
    """Return the rules of a SwiGLU and the norm before it."""
    hidden, norm = hf["hidden_size"], "mlp.linear_fc1.layer_norm_weight"
    return [
        weight("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), whole, norm),
        *gated("mlp", "mlp", hidden, hf["intermediate_size"]),
    ]


def _experts(hf: dict) -> list[Rule]:
    hidden, inner, experts = hf["hidden_size"], hf["moe_intermediate_size"], hf["n_routed_experts"]
    bias = (Source("mlp.gate.e_score_correction_bias", (experts,)),)
    local, shared = "mlp.experts.local_experts.{e}", "mlp.shared_experts"
    grouped = ("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}")
    family, num_shared = model_family(hf), hf.get("n_shared_experts") or 0
    has_bias, router = (
        family.router_score == "sigmoid",
        "mlp.router" if family.stacked else "mlp.gate",
    )
    return [
        weight("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), whole),
        weight("mlp.router", router, (experts, hidden), whole),
        *([Rule("mlp.router.expert_bias", bias, whole, dtype="float32")] if has_bias else []),
        *gated(local, "mlp.experts.{e}", hidden, inner, grouped),
        *(_expert_biases(hf, local, router) if family.biases else []),
        *(gated(shared, shared, hidden, inner * num_shared) if num_shared else []),
    ]


def _expert_biases(hf: dict, local: str, router: str) -> list[Rule]:
    hidden, inner, name = hf["hidden_size"], hf["moe_intermediate_size"], "mlp.experts.{e}"
    gate_up = tuple(Source(f"{name}.{part}_proj.bias", (inner,)) for part in ("gate", "up"))
    te = ("mlp.experts.linear_fc1.bias{e}", "mlp.experts.linear_fc2.bias{e}")
    return [
        _bias("mlp.router", router, hf["n_routed_experts"]),
        Rule(f"{local}.linear_fc1.bias", gate_up, column_parallel, te[0]),
        _bias(f"{local}.linear_fc2", f"{name}.down_proj", hidden, te[1]),
    ]


def _mtp(hf: dict, decoder_layer: list[Rule]) -> list[Rule]:
    hidden, inner = hf["hidden_size"], "transformer_layer."
    return [
        weight("enorm", "enorm", (hidden,), whole),
        weight("hnorm", "hnorm", (hidden,), whole),
        weight("eh_proj", "eh_proj", (hidden, 2 * hidden), column_parallel),
        *(replace(r, megatron=inner + r.megatron, te=r.te and inner + r.te) for r in decoder_layer),
        weight("final_layernorm", "shared_head.norm", (hidden,), whole),
    ]
