"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's decoder with biases on query, key and value."""

from megatron_r1.models.hf_config import require
from megatron_r1.models.llama import divisions, grouped_query_fields, model_arguments, rope_scaling

LATENT_ATTENTION = False

__all__ = ["config_fields", "divisions", "model_arguments", "rope_scaling"]


def config_fields(hf: dict) -> dict:
    """Return the TransformerConfig fields for this `config.json`; UserError if not supported."""
    require(hf, use_sliding_window=False, attention_bias=True)
    return {**grouped_query_fields(hf), "add_qkv_bias": True}
