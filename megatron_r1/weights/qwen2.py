"""The weight table of Qwen2 and Qwen2.5: Llama's with biases on query, key and value."""

from megatron_r1.weights.llama import decoder
from megatron_r1.weights.rules import Table


def table(hf: dict) -> Table:
    """Return the rules for this `config.json`."""
    return decoder(hf, qkv_bias=True)
