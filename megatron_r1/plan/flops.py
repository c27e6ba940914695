"""Floating-point operations of a token, an optimizer step and a rollout.

A product of n parameters with a token is 2 n forward and 4 n backward. Causal attention at length
s is, per token and layer, 2 x heads x (query size + value size) x s / 2 forward and twice that
backward. With these, DeepSeek-V3 at 4,096 tokens takes 250 GFLOP per token, as published (arXiv
2505.09343, table 2)."""

from math import prod

from megatron_r1.models.hf_config import HFConfig, head_sizes
from megatron_r1.models.weights.table import weight_table
from megatron_r1.plan.counts import ModelCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable


def attention_flops(hf_config: HFConfig, length: float) -> float:
    """Return forward FLOP of one token and layer, averaged over a causal sequence of `length`."""
    return 2 * hf_config["num_attention_heads"] * sum(head_sizes(hf_config)) * length / 2


def forward_flops(hf_config: HFConfig, length: float, speedup: float = 1.0) -> float:
    """Return forward FLOP of one token through the main model.

    Products with weights count 1 / `speedup`, for a time at the rate of the others.

    Args:
        hf_config: the model's config.json.
        length: tokens of the sequence.
        speedup: rate of the products with weights over that of the others."""
    layers = hf_config["num_hidden_layers"]
    return 2 * ModelCounts(hf_config).num_multiplied / speedup + layers * attention_flops(
        hf_config, length
    )


def decode_flops(hf_config: HFConfig, length: float, speedup: float = 1.0) -> float:
    """Return FLOP of one new token that attends to `length` cached ones; `speedup` as in
    `forward_flops`.

    Latent attention, in its absorbed form, works on the latents themselves.

    Args:
        hf_config: the model's config.json.
        length: cached tokens.
        speedup: rate of the products with weights over that of the others."""
    if hf_config.get("kv_lora_rank"):
        sizes = 2 * hf_config["kv_lora_rank"] + hf_config["qk_rope_head_dim"]
    else:
        sizes = sum(head_sizes(hf_config))
    attention = 2 * hf_config["num_attention_heads"] * sizes * length
    return (
        2 * ModelCounts(hf_config).num_multiplied / speedup
        + hf_config["num_hidden_layers"] * attention
    )


def layer_flops(job: PlannedJob, layer: int, length: float, speedup: float = 1.0) -> float:
    """Return forward FLOP of one token through one decoder layer.

    Args:
        job: the run whose model it is.
        layer: index of the decoder layer, from 0.
        length: cached tokens that the token attends to.
        speedup: products with weights, but for the router's, count 1 / `speedup`, as in
            `forward_flops`."""
    experts = job.weight_table.num_experts
    num_products = 0.0
    for rule in job.weight_table.layers[layer]:
        count = sum(prod(source.shape) for source in rule.sources if len(source.shape) > 1)
        count *= job.hf_config["num_experts_per_tok"] if rule.is_expert and experts else 1
        num_products += count / (1 if "router" in rule.megatron_name else speedup)
    return 2 * num_products + attention_flops(job.hf_config, length)


def head_flops(hf_config: HFConfig) -> float:
    """Return forward FLOP of one token through the LM or score head."""
    return 2 * prod(weight_table(hf_config).head[0].sources[0].shape)


def flops_section(job: PlannedJob) -> QuantityTable:
    """Return the floating-point operations of an optimizer step and of a rollout's logprobs."""
    section = _training_flops(job) if job.trains else {}
    if job.critic:
        critic = _training_flops(job.critic)
        section["critic's optimizer step"] = critic["optimizer step"]
        section["values of a rollout"] = critic["logprobs of a rollout"]
    return section | (_rollout_flops(job) if job.generates else {})


def _training_flops(job: PlannedJob) -> QuantityTable:
    length = job.mean_sample_tokens
    forward = forward_flops(job.hf_config, length)
    samples = job.update_samples
    passes = 3 + (job.parallel.recompute == "full")
    section = {
        "training, per token": Quantity(
            3 * forward,
            "FLOP",
            f"3 x (2 x {ModelCounts(job.hf_config).num_multiplied:,} multiplied parameters + "
            f"attention at {length:,} tokens), recomputation not counted",
        ),
        "optimizer step": Quantity(
            passes * forward * samples * length,
            "FLOP",
            f"{samples:,.0f} samples x {length:,} tokens, {passes} forward equivalents",
        ),
    }
    if job.verb == "rl":
        passes, passes_text = 1, f"a forward pass ({'critic' if job.is_critic else 'policy'})"
        if job.computes_ref_logprobs:
            passes, passes_text = 2, "2 forward passes (policy, reference)"
        formula = f"{passes_text} over {job.num_responses:,} samples"
        flops = passes * forward * job.num_responses * length
        section["logprobs of a rollout"] = Quantity(flops, "FLOP", formula)
    return section


def _rollout_flops(job: PlannedJob) -> QuantityTable:
    prompt_tokens = job.num_responses * job.assumptions.prompt_tokens
    decoded_tokens = job.num_responses * job.response_tokens
    mean_cached = job.assumptions.prompt_tokens + job.response_tokens / 2
    prefill_flops = prompt_tokens * forward_flops(job.hf_config, job.assumptions.prompt_tokens)
    flops = prefill_flops + decoded_tokens * decode_flops(job.hf_config, mean_cached)
    formula = (
        f"prefill {prefill_flops:.2e} + {decoded_tokens:,} decoded tokens at {mean_cached:,.0f} "
        "cached on average"
    )
    return {"rollout": Quantity(flops, "FLOP", formula)}
