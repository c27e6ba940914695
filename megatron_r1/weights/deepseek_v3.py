"""DeepSeek-V3: which Hugging Face tensors each Megatron parameter is made of."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1.weights.rules import Rule, Source, Table, columns, rows, vocabulary, whole

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def table(hf: dict) -> Table:
    """The rules for this `config.json`, MTP layers included."""
    vocab, hidden, num_layers = hf["vocab_size"], hf["hidden_size"], hf["num_hidden_layers"]
    num_mtp = hf.get("num_nextn_predict_layers") or 0
    dense, sparse = _attention(hf) + _mlp(hf), _attention(hf) + _experts(hf)
    num_dense = min(hf.get("first_k_dense_replace") or 0, num_layers)
    copies = {}
    for layer in range(num_layers, num_layers + num_mtp):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        copies[f"model.layers.{layer}.shared_head.head.weight"] = HEAD
    return Table(
        embedding=[
            _rule("embedding.word_embeddings.weight", EMBEDDING, (vocab, hidden), vocabulary)
        ],
        layers=[dense] * num_dense + [sparse] * (num_layers - num_dense),
        head=[
            _rule("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), whole),
            _rule("output_layer.weight", HEAD, (vocab, hidden), vocabulary),
        ],
        # An MTP layer is built like the last decoder layer.
        mtp=[_mtp(hf, sparse if num_dense < num_layers else dense)] * num_mtp,
        copies=copies,
        num_experts=hf["n_routed_experts"],
    )


def _rule(megatron, name, shape, split, **more) -> Rule:
    return Rule(megatron, (Source(name, shape),), split, **more)


def _attention(hf: dict) -> list[Rule]:
    hidden, heads, latent = hf["hidden_size"], hf["num_attention_heads"], hf["kv_lora_rank"]
    nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    m, h = "self_attention.", "self_attn."
    norm = "layer_norm_weight"
    query = [
        _rule(
            m + "linear_q_proj.weight",
            h + "q_proj.weight",
            (heads * (nope + rope), hidden),
            columns,
        )
    ]
    if rank := hf.get("q_lora_rank"):
        up, query_shape = m + "linear_q_up_proj.", (heads * (nope + rope), rank)
        query = [
            _rule(
                m + "linear_q_down_proj.weight",
                h + "q_a_proj.weight",
                (rank, hidden),
                whole,
            ),
            _rule(
                m + "q_layernorm.weight", h + "q_a_layernorm.weight", (rank,), whole, te=up + norm
            ),
            _rule(up + "weight", h + "q_b_proj.weight", query_shape, columns),
        ]
    down, up = m + "linear_kv_down_proj.", m + "linear_kv_up_proj."
    kv_a, kv_b = (latent + rope, hidden), (heads * (nope + value), latent)
    return [
        _rule("input_layernorm.weight", "input_layernorm.weight", (hidden,), whole),
        *query,
        _rule(down + "weight", h + "kv_a_proj_with_mqa.weight", kv_a, whole),
        _rule(
            m + "kv_layernorm.weight", h + "kv_a_layernorm.weight", (latent,), whole, te=up + norm
        ),
        _rule(up + "weight", h + "kv_b_proj.weight", kv_b, columns),
        _rule(m + "linear_proj.weight", h + "o_proj.weight", (hidden, heads * value), rows),
    ]


def _mlp(hf: dict) -> list[Rule]:
    post = "post_attention_layernorm.weight"
    return [
        _rule(
            "pre_mlp_layernorm.weight",
            post,
            (hf["hidden_size"],),
            whole,
            te="mlp.linear_fc1.layer_norm_weight",
        ),
        *_gated("mlp.", "mlp.", hf["hidden_size"], hf["intermediate_size"]),
    ]


def _gated(megatron: str, name: str, hidden: int, inner: int, te: str | None = None) -> list[Rule]:
    gate_up = tuple(Source(f"{name}{n}_proj.weight", (inner, hidden)) for n in ("gate", "up"))
    down = (Source(f"{name}down_proj.weight", (hidden, inner)),)
    return [
        Rule(
            megatron + "linear_fc1.weight", gate_up, columns, te=te and te.format(fc="linear_fc1")
        ),
        Rule(megatron + "linear_fc2.weight", down, rows, te=te and te.format(fc="linear_fc2")),
    ]


def _experts(hf: dict) -> list[Rule]:
    hidden, inner, experts = hf["hidden_size"], hf["moe_intermediate_size"], hf["n_routed_experts"]
    shared, bias = "mlp.shared_experts.", "mlp.gate.e_score_correction_bias"
    return [
        _rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,), whole),
        _rule("mlp.router.weight", "mlp.gate.weight", (experts, hidden), whole),
        _rule("mlp.router.expert_bias", bias, (experts,), whole, dtype="float32"),
        *_gated(
            "mlp.experts.local_experts.{e}.",
            "mlp.experts.{e}.",
            hidden,
            inner,
            "mlp.experts.{fc}.weight{{e}}",
        ),
        *_gated(shared, shared, hidden, inner * hf["n_shared_experts"]),
    ]


def _mtp(hf: dict, decoder_layer: list[Rule]) -> list[Rule]:
    hidden = hf["hidden_size"]
    inner = "transformer_layer."
    return [
        _rule("enorm.weight", "enorm.weight", (hidden,), whole),
        _rule("hnorm.weight", "hnorm.weight", (hidden,), whole),
        _rule("eh_proj.weight", "eh_proj.weight", (hidden, 2 * hidden), columns),
        *(replace(r, megatron=inner + r.megatron, te=r.te and inner + r.te) for r in decoder_layer),
        _rule("final_layernorm.weight", "shared_head.norm.weight", (hidden,), whole),
    ]
