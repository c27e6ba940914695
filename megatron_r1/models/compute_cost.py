"""The compute that a model spends on a sample. No torch.

A token costs 2 P products forward, P the parameters it passes, and 2 L h (d_qk + d_v) / 2 for each
token it attends to, half of the sample on average (L layers, h heads). So a sample of s tokens
costs s (1 + s / s_0) in units of one token without attention, where s_0 = 2 P / (L h (d_qk + d_v))
is the length at which attention costs as much as all else. For DeepSeek-V3 s_0 is about 30,000
tokens: a sample of 65,536 costs as much as thirteen of 10,000, not as much as seven."""

from collections.abc import Callable
from math import prod

from megatron_r1.models.hf_config import HFConfig, head_sizes
from megatron_r1.models.weights import hf_tensors


def sample_cost(hf_config: HFConfig) -> Callable[[int], float]:
    """Return the function length in tokens -> cost, in tokens without attention, for model
    `hf_config`."""
    balance = balance_length(hf_config)
    return lambda length: length * (1 + length / balance)


def balance_length(hf_config: HFConfig) -> float:
    """Return s_0: the number of tokens at which attention costs as much as everything else."""
    width = hf_config["num_attention_heads"] * sum(head_sizes(hf_config))
    return 2 * active_parameters(hf_config) / (hf_config["num_hidden_layers"] * width)


def active_parameters(hf_config: HFConfig) -> float:
    """Return the number of weights that one token is multiplied with: its routed experts and the
    head count, the embedding and the multi-token-prediction layers do not."""
    num_experts = hf_config.get("n_routed_experts")
    num_active = hf_config.get("num_experts_per_tok")
    is_tied = hf_config.get("tie_word_embeddings")
    total = 0.0
    for name, (shape, _) in hf_tensors(hf_config, with_mtp=False).items():
        if len(shape) < 2 or (name == "model.embed_tokens.weight" and not is_tied):
            continue
        fraction = num_active / num_experts if num_experts and ".mlp.experts." in name else 1.0
        total += prod(shape) * fraction
    return total
