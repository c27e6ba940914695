"""The table of architectures: what distinguishes one from another. No torch.

A new architecture that is a combination of what is here is one entry of FAMILIES: configuration,
weights, conversion, planning and push follow from it (`attention_fields`, `experts`,
`models.weights.table`). What Hugging Face's `config.json` says about a model is read there.

Exceptions that name an architecture, in all of megatron_r1:

- `data.tokenizer`: the tokenizer's class, known without reading the tokenizer.
- `engines.server.recipe_checks`: what vLLM's classes of gpt-oss, DeepSeek-V3, GLM-4.5 and Qwen3-MoE
  need or cannot do.
- `engines.plugin.deepseek_patches`: vLLM's layers of DeepSeek, and its drafter of GLM-4.5.
- `engines.plugin.loader_copies`: vLLM's loader of gpt-oss, which takes all experts at once.

`push.matching.predicted_sharding` knows gpt-oss by `Family.stacked_experts`: its class in vLLM has
the embedding and the head on every pipeline stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """One architecture. A flag may also be a key of `config.json`, whose value decides.

    Attributes:
        latent_attention: multi-head latent attention (DeepSeek-V2), not grouped-query attention.
        qkv_bias: biases on query, key and value.
        qk_norm: RMS norms of each head's query and key.
        rope_types: supported values of rope_type.
        rotary_fraction: part of a head that is rotated, unless `config.json` has another.
        rope_theta: base of the rotary angles, unless `config.json` has another.
        attention_sinks: each head has a learned logit for no key in its softmax
            (`models.attention`).
        sliding_windows: every other layer, from the first, sees the last `sliding_window` tokens
            only.
        router_score: the function that turns router logits into scores; with "sigmoid" there is
            also a correction bias. None: the architecture has no experts.
        expert_size_key: the key of `config.json` with the number of an expert's inner features.
        clamped_swiglu: experts compute clamp(gate) sigmoid(1.702 gate) (clamp(up) + 1).
        linear_biases: whether the output projection, router and experts have biases.
        stacked_experts: a tensor of the checkpoint has all experts of a layer
            (`weights.formats.stacked_experts`).
        normalizes_topk: whether a token's expert weights sum to 1, unless `norm_topk_prob` is
            given.
        reads_mlp_layer_types: whether transformers reads mlp_layer_types instead of
            first_k_dense_replace.
        replicates_shared_experts: whether vLLM keeps shared experts whole on every rank of engines
            with tensor, data and expert parallelism (it splits tokens there,
            `use_sequence_parallel_moe`).
        required_keys: keys that must be given, because transformers has a default of its own.
        fixed_values: keys that may have one value only.
        ignored_keys: keys without an effect, given those values.
        implied_values: keys that vLLM reads, with the only values of the architecture, which
            transformers does not write.
        score_head: whether transformers has the architecture with a scalar head."""

    latent_attention: bool = False
    qkv_bias: bool | str = False
    qk_norm: bool | str = False
    rope_types: tuple[str, ...] = ("default",)
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    attention_sinks: bool = False
    sliding_windows: bool = False
    router_score: Literal["sigmoid", "softmax"] | None = None
    expert_size_key: str = "moe_intermediate_size"
    clamped_swiglu: bool = False
    linear_biases: bool = False
    stacked_experts: bool = False
    normalizes_topk: bool = False
    reads_mlp_layer_types: bool = False
    replicates_shared_experts: bool = False
    required_keys: tuple[str, ...] = ()
    fixed_values: Mapping[str, Any] = field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()
    implied_values: Mapping[str, Any] = field(default_factory=dict)
    score_head: bool = True


SWIGLU_LIMIT = 7.0
"""The limit to which gate and up are clamped where `clamped_swiglu` is set."""

_NO_MTP = {"num_nextn_predict_layers": 0}
_LLAMA = {**_NO_MTP, "attention_bias": False}
_WINDOW = {"use_sliding_window": False, "use_mrope": False}
_UNUSED_WINDOW = ("sliding_window", "max_window_layers")
_LATENT = {"attention_bias": False, "rope_interleave": True, "mlp_bias": False}
_ROUTED_EXPERT_FIELDS = {
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
_PLAIN_EXPERTS = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
_NOAUX = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_SIGMOID = {**_ROUTED_EXPERT_FIELDS, **_NOAUX}
_SIGMOID_NEEDS = (
    "first_k_dense_replace",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
)

FAMILIES = {
    "Llama": Family(
        rope_types=("default", "linear", "llama3", "yarn"),
        fixed_values={**_LLAMA, "mlp_bias": False, "rope_interleaved": False},
    ),
    "Qwen2": Family(
        qkv_bias=True,
        rope_types=("default", "linear", "yarn"),
        required_keys=("num_key_value_heads",),
        fixed_values={**_NO_MTP, **_WINDOW, "attention_bias": True},
        ignored_keys=_UNUSED_WINDOW,
    ),
    "Qwen3": Family(
        qk_norm=True,
        rope_types=("default", "linear", "yarn"),
        required_keys=("num_key_value_heads", "head_dim"),
        fixed_values=_LLAMA | _WINDOW,
        ignored_keys=_UNUSED_WINDOW,
    ),
    "Qwen3Moe": Family(
        qk_norm=True,
        rope_types=("default", "linear", "yarn"),
        router_score="softmax",
        required_keys=("num_key_value_heads", "norm_topk_prob"),
        fixed_values=_LLAMA
        | _WINDOW
        | _PLAIN_EXPERTS
        # Keys of Qwen3-Coder.
        | {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        ignored_keys=_UNUSED_WINDOW,
    ),
    "DeepseekV2": Family(
        latent_attention=True,
        rope_types=("default", "yarn"),
        router_score="softmax",
        replicates_shared_experts=True,
        required_keys=("first_k_dense_replace", "n_shared_experts", "routed_scaling_factor"),
        # The released code either normalizes or scales, transformers does not normalize.
        fixed_values={
            **_LATENT,
            **_ROUTED_EXPERT_FIELDS,
            **_NO_MTP,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
        },
    ),
    "DeepseekV3": Family(
        latent_attention=True,
        rope_types=("default", "yarn"),
        router_score="sigmoid",
        normalizes_topk=True,
        replicates_shared_experts=True,
        required_keys=_SIGMOID_NEEDS,
        fixed_values=_LATENT | _SIGMOID,
        implied_values=_NOAUX,
    ),
    "Glm4Moe": Family(
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        rotary_fraction=0.5,
        router_score="sigmoid",
        normalizes_topk=True,
        required_keys=("num_key_value_heads", *_SIGMOID_NEEDS),
        fixed_values=_SIGMOID,
        score_head=False,
    ),
    "Glm4MoeLite": Family(
        latent_attention=True,
        rope_types=("default", "yarn"),
        router_score="sigmoid",
        normalizes_topk=True,
        reads_mlp_layer_types=True,
        required_keys=_SIGMOID_NEEDS,
        fixed_values=_LATENT | _SIGMOID,
        score_head=False,
    ),
    "GptOss": Family(
        qkv_bias=True,
        rope_types=("yarn",),
        rope_theta=150_000.0,
        attention_sinks=True,
        sliding_windows=True,
        router_score="softmax",
        expert_size_key="intermediate_size",
        clamped_swiglu=True,
        linear_biases=True,
        stacked_experts=True,
        normalizes_topk=True,
        required_keys=("num_key_value_heads", "head_dim", "sliding_window"),
        fixed_values={
            **_NO_MTP,
            **_PLAIN_EXPERTS,
            # vLLM has the following values in its classes.
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": SWIGLU_LIMIT,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "norm_topk_prob": True,
        },
        ignored_keys=("initial_context_length",),
    ),
}
"""HF architecture, without ForCausalLM or ForSequenceClassification -> its entry."""
