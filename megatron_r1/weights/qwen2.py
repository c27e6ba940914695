"""Qwen2 and Qwen2.5: Llama's table with biases on the query, key and value projections."""

from __future__ import annotations

from megatron_r1.weights.llama import decoder
from megatron_r1.weights.rules import Table


def table(hf: dict) -> Table:
    """The rules for this `config.json`."""
    return decoder(hf, qkv_bias=True)
