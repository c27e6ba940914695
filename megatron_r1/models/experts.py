"""Routed experts, from `config.json`: Megatron's configuration of them. No torch or Megatron."""

from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.families import SWIGLU_LIMIT
from megatron_r1.models.hf_config import HFConfig, model_family, require_keys, sparse_layers

GROUP_SCORES = {"sigmoid": 2, "softmax": 1}
"""The number of a group's best experts whose scores are summed to the score of the group: two in
DeepSeek-V3 (and its descendants), one in DeepSeek-V2."""

CLAMPED_SWIGLU = {"glu_linear_offset": 1.0, "activation_func_clamp_value": SWIGLU_LIMIT}


def expert_fields(hf_config: HFConfig) -> dict[str, Any]:
    """Return Megatron's fields of the experts; {} without any. UserError if not supported."""
    function = model_family(hf_config).router_score
    if not function:
        return {}
    require_keys(hf_config, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    _check_layer_types(hf_config)
    size, num_shared = hf_config["moe_intermediate_size"], hf_config.get("n_shared_experts") or 0
    return {
        "num_moe_experts": hf_config["n_routed_experts"],
        "moe_layer_freq": [int(sparse) for sparse in sparse_layers(hf_config)],
        "moe_ffn_hidden_size": size,
        "moe_shared_expert_intermediate_size": size * num_shared or None,
        "moe_router_topk": hf_config["num_experts_per_tok"],
        "moe_router_score_function": function,
        "moe_router_enable_expert_bias": function == "sigmoid",
        # With softmax Megatron normalizes the chosen scores unless this is set;
        # `models.expert_routing` reads it so with sigmoid too.
        "moe_router_pre_softmax": not _normalizes_topk(hf_config),
        "moe_router_topk_scaling_factor": hf_config.get("routed_scaling_factor") or 1.0,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        **(CLAMPED_SWIGLU if model_family(hf_config).clamped_swiglu else {}),
        **_group_fields(hf_config, GROUP_SCORES[function]),
    }


def _normalizes_topk(hf_config: HFConfig) -> bool:
    """Return whether the weights of a token's experts sum to 1, before they are scaled."""
    setting = hf_config.get("norm_topk_prob")
    return model_family(hf_config).normalizes_topk if setting is None else setting


def expert_divisions(hf_config: HFConfig) -> list[tuple[str, int, str]]:
    """Return (field, its value, the key of `parallel` that must divide it) triples."""
    if not hf_config.get("n_routed_experts"):
        return []
    size = hf_config["moe_intermediate_size"]
    shared_size = size * (hf_config.get("n_shared_experts") or 0)
    return [
        *(
            [("moe_intermediate_size * n_shared_experts", shared_size, "tensor")]
            if shared_size
            else []
        ),
        ("hidden_size", hf_config["hidden_size"], "tensor"),
        ("n_routed_experts", hf_config["n_routed_experts"], "expert"),
        ("moe_intermediate_size", size, "expert_tensor"),
    ]


def _check_layer_types(hf_config: HFConfig) -> None:
    """Raise UserError where `mlp_layer_types`, which transformers reads, disagrees with
    first_k_dense_replace, which vLLM and this project read."""
    if not model_family(hf_config).reads_mlp_layer_types:
        return
    default = ["dense"] + ["sparse"] * (hf_config["num_hidden_layers"] - 1)
    types = hf_config.get("mlp_layer_types") or default
    if types != ["sparse" if sparse else "dense" for sparse in sparse_layers(hf_config)]:
        raise UserError(
            f"config.json: mlp_layer_types={types} is not what first_k_dense_replace="
            f"{hf_config.get('first_k_dense_replace')} says; vLLM reads the latter, transformers "
            "the former: make them agree",
            key="mlp_layer_types",
            cause=Cause.CONFLICT,
        )


def _group_fields(hf_config: HFConfig, best: int) -> dict[str, int]:
    num_groups, group_topk = hf_config.get("n_group") or 1, hf_config.get("topk_group") or 1
    experts, topk = hf_config["n_routed_experts"], hf_config["num_experts_per_tok"]
    method = hf_config.get("topk_method") or "greedy"
    if best == 1 and method not in ("greedy", "group_limited_greedy"):
        raise UserError(
            f"topk_method={method!r} in config.json is not supported, only 'greedy' and "
            "'group_limited_greedy' are",
            key="topk_method",
            cause=Cause.UNSUPPORTED,
        )
    if best == 1 and method == "greedy" and num_groups > 1:
        raise UserError(
            f"config.json: n_group={num_groups} with topk_method='greedy', which has no groups: "
            "transformers and vLLM route tokens differently; set n_group to 1",
            key="n_group",
            cause=Cause.CONFLICT,
        )
    if experts % num_groups:
        raise UserError(
            f"config.json: n_routed_experts={experts} is not a multiple of n_group={num_groups}",
            key="n_routed_experts",
            cause=Cause.INDIVISIBLE,
        )
    if topk > experts:
        raise UserError(
            f"config.json: num_experts_per_tok={topk} is more than n_routed_experts={experts}",
            key="num_experts_per_tok",
            cause=Cause.CONFLICT,
        )
    if group_topk > num_groups:
        raise UserError(
            f"config.json: topk_group={group_topk} is more than n_group={num_groups}",
            key="topk_group",
            cause=Cause.CONFLICT,
        )
    if group_topk == num_groups:
        return {}
    if experts // num_groups < best or topk > experts // num_groups * group_topk:
        raise UserError(
            f"config.json: num_experts_per_tok={topk} experts cannot be chosen from topk_group="
            f"{group_topk} groups of {experts // num_groups} (n_routed_experts / n_group), each "
            f"scored by its best {best}",
            key="num_experts_per_tok",
            cause=Cause.CONFLICT,
        )
    return {"moe_router_num_groups": num_groups, "moe_router_group_topk": group_topk}
