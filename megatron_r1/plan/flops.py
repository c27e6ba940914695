"""Floating-point operations: of a token, an optimizer step, a rollout.

A product of n parameters with a token is 2 n forward and 4 n backward. Causal attention at length s
is, per token and layer, 2 x heads x (query size + value size) x s / 2 forward and twice that
backward. With these, DeepSeek-V3 at 4,096 tokens takes 250 GFLOP per token, as published (arXiv
2505.09343, table 2)."""

from math import prod

from megatron_r1.models.hf_config import head_sizes
from megatron_r1.models.weights.decoder import table
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.parameters import ModelCounts
from megatron_r1.plan.quantity import Quantity, Section


def attention_flops(hf: dict, length: float) -> float:
    """Return forward FLOP of one token and layer, averaged over a causal sequence of `length`."""
    return 2 * hf["num_attention_heads"] * sum(head_sizes(hf)) * length / 2


def forward_flops(hf: dict, length: float) -> float:
    """Return forward FLOP of one token through the main model."""
    layers = hf["num_hidden_layers"]
    return 2 * ModelCounts(hf).multiplied + layers * attention_flops(hf, length)


def decode_flops(hf: dict, length: float) -> float:
    """Return FLOP of one new token that attends to `length` cached ones.

    Latent attention, in its absorbed form, works on the latents themselves."""
    if hf.get("kv_lora_rank"):
        sizes = 2 * hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
    else:
        sizes = sum(head_sizes(hf))
    attention = 2 * hf["num_attention_heads"] * sizes * length
    return 2 * ModelCounts(hf).multiplied + hf["num_hidden_layers"] * attention


def layer_flops(job: PlannedJob, layer: int, length: float) -> float:
    """Return forward FLOP of one token through one decoder layer."""
    experts = job.weight_table.num_experts
    multiplied = 0.0
    for rule in job.weight_table.layers[layer]:
        count = sum(prod(source.shape) for source in rule.sources if len(source.shape) > 1)
        multiplied += count * (job.hf["num_experts_per_tok"] if rule.expert and experts else 1)
    return 2 * multiplied + attention_flops(job.hf, length)


def head_flops(hf: dict) -> float:
    """Return forward FLOP of one token through the LM or score head."""
    return 2 * prod(table(hf).head[0].sources[0].shape)


def flops_section(job: PlannedJob) -> Section:
    """Return the floating-point operations of an optimizer step and of scoring a rollout."""
    section = _training_flops(job) if job.trains else {}
    if job.critic:
        critic = _training_flops(job.critic)
        section["critic's optimizer step"] = critic["optimizer step"]
        section["values of a rollout"] = critic["scoring a rollout"]
    return section | (_rollout_flops(job) if job.generates else {})


def _training_flops(job: PlannedJob) -> Section:
    length = job.sample_tokens
    forward = forward_flops(job.hf, length)
    samples = job.step_samples
    passes = 3 + (job.parallel.recompute == "full")
    section = {
        "training, per token": Quantity(
            3 * forward,
            "FLOP",
            f"3 x (2 x {ModelCounts(job.hf).multiplied:,} multiplied parameters + attention at "
            f"{length:,} tokens), recomputation not counted",
        ),
        "optimizer step": Quantity(
            passes * forward * samples * length,
            "FLOP",
            f"{samples:,.0f} samples x {length:,} tokens, {passes} forward equivalents",
        ),
    }
    if job.verb == "rl":
        passes, how = 1, f"a forward pass ({'critic' if job.is_critic else 'policy'})"
        if job.scores_reference:
            passes, how = 2, "2 forward passes (policy, reference)"
        formula = f"{how} over {job.num_responses:,} samples"
        flops = passes * forward * job.num_responses * length
        section["scoring a rollout"] = Quantity(flops, "FLOP", formula)
    return section


def _rollout_flops(job: PlannedJob) -> Section:
    prompts = job.num_responses * job.assumptions.prompt_tokens
    decoded = job.num_responses * job.response_tokens
    half = job.assumptions.prompt_tokens + job.response_tokens / 2
    prefill = prompts * forward_flops(job.hf, job.assumptions.prompt_tokens)
    text = f"prefill {prefill:.2e} + {decoded:,} decoded tokens at {half:,.0f} cached on average"
    return {"rollout": Quantity(prefill + decoded * decode_flops(job.hf, half), "FLOP", text)}
