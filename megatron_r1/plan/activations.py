"""Activations: bytes a layer keeps for the backward pass, and what recomputing saves of them.

Counted as by Korthikanti et al. (arXiv 2205.05198, section 4.1): every tensor that an operation
needs in the backward pass, once, in bf16 unless noted; here for multi-head latent attention, routed
experts and flash attention, which keeps its output and one fp32 number per head and token instead
of scores. Two token counts: `split` tokens if sequence parallelism divides the sequence over the
tensor-parallel ranks (norms, residuals, latents, routed experts), `whole` if a rank has all tokens
and its part of heads or features."""

from dataclasses import dataclass

from megatron_r1.config import ParallelConfig
from megatron_r1.models.hf_config import head_sizes, key_value_heads
from megatron_r1.plan.job import PlannedJob

VALUE = 2
"""Bytes of an activation: the trainer computes in bf16 (fp32 doubles it)."""


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer and one micro-batch, by the module whose recomputation frees them.

    always: kept unless recomputation is full; input: the layer's input; dispatch: buffers of the
    token exchange while the layer runs."""

    input: int
    always: int
    modules: dict[str, int]
    dispatch: int

    @property
    def everything(self) -> int:
        return self.input + self.always + sum(self.modules.values())

    def kept(self, parallel: ParallelConfig) -> int:
        """Return the bytes kept from the forward pass to the backward pass."""
        if parallel.recompute == "full":
            return self.input
        dropped = set(parallel.recompute_modules if parallel.recompute == "selective" else ())
        if "moe" in dropped:
            dropped |= _INSIDE_MOE
        kept = (size for name, size in self.modules.items() if name not in dropped)
        return self.input + self.always + sum(kept)

    def working(self, parallel: ParallelConfig) -> int:
        """Return the bytes added during its backward pass, by recomputation and dispatch."""
        return self.everything - self.kept(parallel) + self.dispatch


_INSIDE_MOE = {"moe_act", "shared_experts"}


def layer_activations(job: PlannedJob, sparse: bool, tokens: int | None = None) -> Layer:
    """Return the activations of a decoder layer with experts (sparse) or a dense MLP.

    tokens: of the micro-batch; default: the largest."""
    hf, tensor = job.hf, job.parallel.tensor
    whole = (tokens or job.microbatch_tokens) / job.parallel.context
    split = job.split(whole)
    value = 2 * VALUE if job.config.model.dtype == "float32" else VALUE
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    head, out = head_sizes(hf)
    modules = {"layernorm": 2 * hidden * split * value}
    always = hidden * split * value  # the residual between attention and MLP
    if job.latent_attention:
        query, key = hf.get("q_lora_rank") or 0, hf["kv_lora_rank"]
        latents = (2 * query + 2 * key + hf["qk_rope_head_dim"]) * split
        always += (latents + heads / tensor * out * whole) * value
        modules["mla_up_proj"] = heads / tensor * (2 * head + out) * whole * value
    else:
        # With fewer key and value heads than ranks, several ranks have the same one.
        groups = max(key_value_heads(hf), tensor)
        always += (2 * heads + 2 * groups) / tensor * head * whole * value
    modules["core_attn"] = 4 * heads / tensor * whole
    dispatch = 0.0
    if sparse:
        routed, inner = hf["num_experts_per_tok"] * split, hf["moe_intermediate_size"]
        routed *= job.assumptions.expert_imbalance
        inner_local = inner / job.parallel.expert_tensor
        at_expert = routed * job.parallel.expert_tensor
        scores = 3 * 4 * hf["n_routed_experts"] * split
        modules["moe"] = at_expert * (hidden + 2 * inner_local) * value + scores
        modules["moe_act"] = at_expert * inner_local * value
        shared = inner * (hf.get("n_shared_experts") or 0)
        modules["shared_experts"] = 3 * shared / tensor * whole * value
        # The sent and the received tokens, sorted by expert, exist at once.
        dispatch = 2 * at_expert * hidden * value
    else:
        modules["mlp"] = 3 * hf["intermediate_size"] / tensor * whole * value
    rounded = {name: round(num_bytes) for name, num_bytes in modules.items()}
    return Layer(round(hidden * split * value), round(always), rounded, round(dispatch))


def in_flight(rank: int, pipeline: int, virtual: int, microbatches: int) -> list[int]:
    """Return how many micro-batches' activations each chunk of a pipeline rank holds at the peak.

    In the 1F1B schedule these are the forward passes of the warm-up and one more (schedules.py,
    get_pp_rank_microbatches); with virtual stages they rotate over chunks, `pipeline` at a time."""
    if virtual == 1:
        return [min(microbatches, pipeline - rank)]
    count = min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1, virtual * microbatches)
    held = [0] * virtual
    for start in range(0, microbatches, pipeline):
        together = min(pipeline, microbatches - start)
        for chunk in range(virtual):
            held[chunk] += min(together, count - sum(held))
    return held
