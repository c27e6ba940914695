"""The weight table: which Hugging Face tensors form each Megatron parameter, and how it is split
over ranks; `weight_table` has that of every architecture in `models.families`. No torch.

A rule maps one Megatron parameter to the Hugging Face tensors in it (`weight_rule` and
`_gated_rules` make the usual ones), and names the split (`models.weights.splits`) that turns it
and a rank into pieces. Import, export, the push to the engines and the memory planner all work on
pieces; nothing else reads parameter names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_r1.models.attention_fields import has_qk_norm, has_qkv_bias
from megatron_r1.models.hf_config import (
    HFConfig,
    has_score_head,
    model_family,
    num_mtp_layers,
    sparse_layers,
)
from megatron_r1.models.weights.splits import (
    QueryGroups,
    Shape,
    Source,
    Split,
    column_parallel,
    replicated,
    row_parallel,
    vocab_parallel,
)

SCORE = "score.weight"
"""Name of a score model's head, in Hugging Face and in Megatron."""


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter (or buffer) and the HF tensors in it.

    `{e}` in a name is an expert: its local index in Megatron's, its global one in HF's.

    Attributes:
        megatron_name: the parameter's name relative to its layer, with Megatron's own layers.
        sources: the HF tensors, in the order in which `split` places their rows.
        split: which rows or columns of them a tensor-parallel rank has, and where.
        te_name: its name with Transformer Engine's layers, if that differs.
        dtype: the tensor's dtype, if it is not the model's.
    """

    megatron_name: str
    sources: tuple[Source, ...]
    split: Split
    te_name: str | None = None
    dtype: str | None = None

    @property
    def is_expert(self) -> bool:
        """Whether there is one such parameter for every expert."""
        return "{e}" in self.megatron_name


@dataclass(frozen=True)
class WeightTable:
    """All rules of a model, by part.

    Attributes:
        embedding: rules of the embedding.
        layers: layers[i] are the rules of decoder layer i (Megatron `decoder.layers.`, HF
            `model.layers.i.`).
        final_norm: rules of the norm after the last decoder layer.
        head: rules of the output head.
        mtp: mtp[k] are the rules of MTP layer k (Megatron `mtp.layers.k.`, HF
            `model.layers.<num_layers + k>.`).
        duplicate_of: by the name of an HF tensor that repeats another, that one's name; the
            duplicate is written on export, ignored on import.
        num_experts: the number of routed experts of a layer, 0 for a dense model."""

    embedding: list[WeightRule]
    layers: list[list[WeightRule]]
    final_norm: list[WeightRule]
    head: list[WeightRule]
    mtp: list[list[WeightRule]] = field(default_factory=list)
    duplicate_of: dict[str, str] = field(default_factory=dict)
    num_experts: int = 0


def weight_rule(
    megatron_name: str, hf_name: str, shape: Shape, split: Split, te_name: str | None = None
) -> WeightRule:
    """Return the rule of one `.weight` that is one HF `.weight`; names without the ending, except
    `te_name`.

    Args:
        megatron_name: the parameter's name.
        hf_name: the Hugging Face tensor's name.
        shape: the shape of the Hugging Face tensor.
        split: the rule by which a rank gets its part of it.
        te_name: the parameter's name in Transformer Engine's layers, where that differs.
    """
    return WeightRule(
        f"{megatron_name}.weight", (Source(f"{hf_name}.weight", shape),), split, te_name
    )


def _gated_rules(
    megatron: str, name: str, hidden: int, intermediate: int, te_name: tuple[str, str] = ("", "")
) -> list[WeightRule]:
    """Return the rules of a SwiGLU: gate and up are one Megatron parameter.

    Args:
        megatron: prefix of Megatron's names.
        name: prefix of the HF names.
        hidden: features of the input.
        intermediate: features of gate and of up.
        te_name: Transformer Engine's names of both parameters where they differ."""
    gate_up = tuple(
        Source(f"{name}.{part}_proj.weight", (intermediate, hidden)) for part in ("gate", "up")
    )
    return [
        WeightRule(f"{megatron}.linear_fc1.weight", gate_up, column_parallel, te_name[0] or None),
        weight_rule(
            f"{megatron}.linear_fc2",
            f"{name}.down_proj",
            (hidden, intermediate),
            row_parallel,
            te_name[1] or None,
        ),
    ]


def weight_table(hf_config: HFConfig) -> WeightTable:
    """Return the rules for this `config.json`, MTP layers included; UserError for an unknown
    architecture."""
    dense_rules = [*_attention_rules(hf_config), *_dense_mlp(hf_config)]
    sparse_rules = (
        [*_attention_rules(hf_config), *_expert_rules(hf_config)]
        if hf_config.get("n_routed_experts")
        else []
    )
    kinds = sparse_layers(hf_config)
    layers = [sparse_rules if is_sparse else dense_rules for is_sparse in kinds]
    num_layers, num_mtp = len(layers), num_mtp_layers(hf_config)
    head = "model.embed_tokens" if hf_config.get("tie_word_embeddings") else "lm_head"
    duplicate_of = {}
    for layer in range(num_layers, num_layers + num_mtp):
        duplicate_of[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        duplicate_of[f"model.layers.{layer}.shared_head.head.weight"] = f"{head}.weight"
    vocab, hidden = hf_config["vocab_size"], hf_config["hidden_size"]
    embedding = "embedding.word_embeddings"
    head_rule = weight_rule("output_layer", head, (vocab, hidden), vocab_parallel)
    if has_score_head(hf_config):
        head_rule = weight_rule("score", "score", (1, hidden), replicated)
    return WeightTable(
        embedding=[weight_rule(embedding, "model.embed_tokens", (vocab, hidden), vocab_parallel)],
        layers=layers,
        final_norm=[weight_rule("decoder.final_layernorm", "model.norm", (hidden,), replicated)],
        head=[head_rule],
        # An MTP layer has the structure of the last decoder layer.
        mtp=[_mtp_rules(hf_config, layers[-1])] * num_mtp,
        duplicate_of=duplicate_of,
        num_experts=hf_config.get("n_routed_experts") or 0,
    )


def _attention_rules(hf_config: HFConfig) -> list[WeightRule]:
    return (
        _latent_rules(hf_config)
        if model_family(hf_config).latent_attention
        else _grouped_query(hf_config)
    )


def _grouped_query(hf_config: HFConfig) -> list[WeightRule]:
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    groups = hf_config.get("num_key_value_heads") or heads
    size = hf_config.get("head_dim") or hidden // heads
    heights = {"q": heads * size, "k": groups * size, "v": groups * size}
    weights = tuple(Source(f"self_attn.{x}_proj.weight", (n, hidden)) for x, n in heights.items())
    biases = tuple(Source(f"self_attn.{x}_proj.bias", (n,)) for x, n in heights.items())
    m = "self_attention."
    qkv, split = f"{m}linear_qkv", QueryGroups(groups)
    norms = ("q", "k") if has_qk_norm(hf_config) else ()
    family, sinks = model_family(hf_config), (Source("self_attn.sinks", (heads,)),)
    return [
        weight_rule(
            "input_layernorm", "input_layernorm", (hidden,), replicated, f"{qkv}.layer_norm_weight"
        ),
        WeightRule(f"{qkv}.weight", weights, split),
        *([WeightRule(f"{qkv}.bias", biases, split)] if has_qkv_bias(hf_config) else []),
        *(
            weight_rule(f"{m}{x}_layernorm", f"self_attn.{x}_norm", (size,), replicated)
            for x in norms
        ),
        weight_rule(f"{m}linear_proj", "self_attn.o_proj", (hidden, heads * size), row_parallel),
        *(
            [_bias_rule(f"{m}linear_proj", "self_attn.o_proj", hidden)]
            if family.linear_biases
            else []
        ),
        *(
            [WeightRule(f"{m}core_attention.softmax_offset", sinks, column_parallel)]
            if family.attention_sinks
            else []
        ),
    ]


def _bias_rule(
    megatron_name: str, hf_name: str, size: int, te_name: str | None = None
) -> WeightRule:
    """Return the rule of a bias that every rank holds whole; names as for `weight`."""
    return WeightRule(
        f"{megatron_name}.bias", (Source(f"{hf_name}.bias", (size,)),), replicated, te_name
    )


def _latent_rules(hf_config: HFConfig) -> list[WeightRule]:
    """Return the rules of latent attention: queries and keys with values, each down and up
    projected."""
    hidden = hf_config["hidden_size"]
    heads = hf_config["num_attention_heads"]
    latent_size = hf_config["kv_lora_rank"]
    nope = hf_config["qk_nope_head_dim"]
    rope = hf_config["qk_rope_head_dim"]
    value = hf_config["v_head_dim"]
    query_height, kv_height = heads * (nope + rope), heads * (nope + value)
    q_norm, kv_norm = (f"self_attention.linear_{x}_up_proj.layer_norm_weight" for x in ("q", "kv"))

    def rule(
        megatron_name: str, hf_name: str, shape: Shape, split: Split, te_name: str | None = None
    ) -> WeightRule:
        names = f"self_attention.{megatron_name}", f"self_attn.{hf_name}"
        return weight_rule(*names, shape, split, te_name)

    if rank := hf_config.get("q_lora_rank"):
        query = [
            rule("linear_q_down_proj", "q_a_proj", (rank, hidden), replicated),
            rule("q_layernorm", "q_a_layernorm", (rank,), replicated, q_norm),
            rule("linear_q_up_proj", "q_b_proj", (query_height, rank), column_parallel),
        ]
    else:
        query = [rule("linear_q_proj", "q_proj", (query_height, hidden), column_parallel)]
    down_shape = (latent_size + rope, hidden)
    return [
        weight_rule("input_layernorm", "input_layernorm", (hidden,), replicated),
        *query,
        rule("linear_kv_down_proj", "kv_a_proj_with_mqa", down_shape, replicated),
        rule("kv_layernorm", "kv_a_layernorm", (latent_size,), replicated, kv_norm),
        rule("linear_kv_up_proj", "kv_b_proj", (kv_height, latent_size), column_parallel),
        rule("linear_proj", "o_proj", (hidden, heads * value), row_parallel),
    ]


def _dense_mlp(hf_config: HFConfig) -> list[WeightRule]:
    """Return the rules of a SwiGLU and the norm before it."""
    hidden, norm = hf_config["hidden_size"], "mlp.linear_fc1.layer_norm_weight"
    return [
        weight_rule("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), replicated, norm),
        *_gated_rules("mlp", "mlp", hidden, hf_config["intermediate_size"]),
    ]


def _expert_rules(hf_config: HFConfig) -> list[WeightRule]:
    hidden = hf_config["hidden_size"]
    intermediate_size = hf_config["moe_intermediate_size"]
    experts = hf_config["n_routed_experts"]
    bias = (Source("mlp.gate.e_score_correction_bias", (experts,)),)
    local_name, shared_name = "mlp.experts.local_experts.{e}", "mlp.shared_experts"
    grouped_names = ("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}")
    family, num_shared = model_family(hf_config), hf_config.get("n_shared_experts") or 0
    has_bias = family.router_score == "sigmoid"
    router = "mlp.router" if family.stacked_experts else "mlp.gate"
    return [
        weight_rule("pre_mlp_layernorm", "post_attention_layernorm", (hidden,), replicated),
        weight_rule("mlp.router", router, (experts, hidden), replicated),
        *(
            [WeightRule("mlp.router.expert_bias", bias, replicated, dtype="float32")]
            if has_bias
            else []
        ),
        *_gated_rules(local_name, "mlp.experts.{e}", hidden, intermediate_size, grouped_names),
        *(_expert_biases(hf_config, local_name, router) if family.linear_biases else []),
        *(
            _gated_rules(shared_name, shared_name, hidden, intermediate_size * num_shared)
            if num_shared
            else []
        ),
    ]


def _expert_biases(hf_config: HFConfig, local: str, router: str) -> list[WeightRule]:
    hidden = hf_config["hidden_size"]
    intermediate_size = hf_config["moe_intermediate_size"]
    name = "mlp.experts.{e}"
    gate_up = tuple(
        Source(f"{name}.{part}_proj.bias", (intermediate_size,)) for part in ("gate", "up")
    )
    te_name = ("mlp.experts.linear_fc1.bias{e}", "mlp.experts.linear_fc2.bias{e}")
    return [
        _bias_rule("mlp.router", router, hf_config["n_routed_experts"]),
        WeightRule(f"{local}.linear_fc1.bias", gate_up, column_parallel, te_name[0]),
        _bias_rule(f"{local}.linear_fc2", f"{name}.down_proj", hidden, te_name[1]),
    ]


def _mtp_rules(hf_config: HFConfig, decoder_layer: list[WeightRule]) -> list[WeightRule]:
    hidden, prefix = hf_config["hidden_size"], "mtp_model_layer."
    return [
        weight_rule("enorm", "enorm", (hidden,), replicated),
        weight_rule("hnorm", "hnorm", (hidden,), replicated),
        weight_rule("eh_proj", "eh_proj", (hidden, 2 * hidden), column_parallel),
        *(
            replace(
                rule,
                megatron_name=prefix + rule.megatron_name,
                te_name=prefix + rule.te_name if rule.te_name else None,
            )
            for rule in decoder_layer
        ),
        weight_rule("final_layernorm", "shared_head.norm", (hidden,), replicated),
    ]
