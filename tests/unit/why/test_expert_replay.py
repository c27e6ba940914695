"""Replayed experts in transformers' models, against models that cannot choose others."""

import copy

import pytest
import torch
import transformers

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.expert_replay import replayed_experts
from megatron_r1.why.policy.routed_experts import chosen_experts
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import TokenRow, rows_with_shifted_experts

VOCABULARY, LAYERS, EXPERTS, TOPK = 23, 2, 8, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "num_experts_per_tok": TOPK,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
GROUPS = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
FAMILIES = {
    "DeepseekV3": {**LATENT, **GROUPS, "v_head_dim": 4, "first_k_dense_replace": 0},
    "DeepseekV2": {
        **LATENT,
        **GROUPS,
        "v_head_dim": 4,
        "first_k_dense_replace": 0,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "Qwen3Moe": {"num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": EXPERTS, "head_dim": 8},
}


def random_model(family: str, **settings) -> torch.nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **(FAMILIES[family] | settings), architectures=[f"{family}ForCausalLM"]
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def random_row(num_tokens: int, experts: torch.Tensor | None = None) -> TokenRow:
    ids = torch.randint(VOCABULARY, (num_tokens,))
    is_sampled = torch.arange(num_tokens) > 1
    return TokenRow(
        ids, is_sampled, torch.zeros(num_tokens - 2), 0, 1.0, num_tokens - 2, experts=experts
    )


def with_experts(row: TokenRow, experts: torch.Tensor) -> TokenRow:
    return TokenRow(**(vars(row) | {"experts": experts.to(torch.int16)}))


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_own_choice_changes_nothing(family):
    model = random_model(family)
    rows = [random_row(length) for length in (9, 5)]
    every_token = [
        TokenRow(**(vars(row) | {"is_sampled": torch.arange(len(row.token_ids) + 1)[1:] > 0}))
        for row in rows
    ]
    layers = chosen_experts(model, every_token).values()
    replayed = []
    for number, row in enumerate(rows):
        choice = torch.stack([by_row[number] for by_row in layers], 1)
        last = torch.full_like(choice[:1], -1)
        replayed.append(with_experts(row, torch.cat([choice, last])))
    (own,), (again,) = sampled_logprobs(model, rows), sampled_logprobs(model, replayed)
    for a, b in zip(own, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_replayed_experts_are_those_of_a_model_that_has_no_others(family):
    model = random_model(family)
    chosen = [5, 0, 6]
    only = random_model(family, **{next(iter(FAMILIES[family])): TOPK})
    state = {
        name: tensor[chosen]
        if ".experts." in name or ".gate." in name or ".router." in name
        else tensor
        for name, tensor in model.state_dict().items()
    }
    only.load_state_dict(state)
    row = random_row(11)
    experts = torch.tensor(chosen).expand(11, LAYERS, TOPK)
    (expected,) = sampled_logprobs(only, [row])
    (replayed,) = sampled_logprobs(model, [with_experts(row, experts)])
    torch.testing.assert_close(replayed[0], expected[0], rtol=0, atol=1e-6)
    assert (replayed[0] - sampled_logprobs(model, [row])[0][0]).abs().max() > 1e-3


def test_replayed_experts_are_those_that_a_bias_leaves_no_choice_but():
    """DeepSeek-V3's bias counts in the choice only: a large one makes it without the weights."""
    model = random_model("DeepseekV3")
    chosen = [5, 7, 6]
    biased = copy.deepcopy(model)
    for layer in biased.model.layers:
        layer.mlp.gate.e_score_correction_bias[chosen] += 100
    row = random_row(11)
    experts = torch.tensor(chosen).expand(11, LAYERS, TOPK)
    (expected,) = sampled_logprobs(biased, [row])
    (replayed,) = sampled_logprobs(model, [with_experts(row, experts)])
    torch.testing.assert_close(replayed[0], expected[0], rtol=0, atol=1e-6)
    assert (replayed[0] - sampled_logprobs(model, [row])[0][0]).abs().max() > 1e-3


def test_a_router_with_other_weights_is_refused():
    model = random_model("DeepseekV3")
    model.config.routed_scaling_factor = 3.0  # the routers were built with another
    with (
        replayed_experts(model, torch.zeros(4, LAYERS, TOPK, dtype=torch.int16)),
        pytest.raises(CannotRecompute, match="routing_replay: DeepseekV3TopkRouter"),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(("shift", "expected"), [(1, [-1, 0, 1, 2]), (-1, [1, 2, 3, -1])])
def test_experts_are_those_of_the_token_before_or_after(shift, expected):
    experts = torch.arange(4)[:, None, None].expand(4, LAYERS, TOPK)
    row = with_experts(random_row(4), experts)
    (shifted,) = rows_with_shifted_experts([row], shift)
    assert shifted.experts[:, 0, 0].tolist() == expected
    assert row.experts[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert rows_with_shifted_experts([random_row(4)], shift)[0].experts is None
