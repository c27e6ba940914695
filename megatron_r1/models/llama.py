"""Llama 3 (arXiv 2407.21783): grouped-query attention, SwiGLU, scaled rotary frequencies."""

from megatron_r1.errors import UserError
from megatron_r1.models.hf_config import need, require, rope_parameters

LATENT_ATTENTION = False


def config_fields(hf: dict) -> dict:
    """Return the TransformerConfig fields for this `config.json`; UserError if not supported."""
    require(hf, attention_bias=False, mlp_bias=False)
    return grouped_query_fields(hf)


def grouped_query_fields(hf: dict) -> dict:
    """Return the fields of a decoder with grouped-query attention and without experts."""
    need(hf, "num_attention_heads", "hidden_size")
    num_heads = hf["num_attention_heads"]
    return {
        "num_query_groups": hf.get("num_key_value_heads") or num_heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // num_heads,
    }


def model_arguments(hf: dict) -> dict:
    """Return the arguments of GPTModel beside the configuration."""
    rope = rope_parameters(hf)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(
            f"rope_type={rope['rope_type']!r} in config.json is not supported for "
            f"{hf['architectures'][0]}, only default and llama3"
        )
    return {
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "share_embeddings_and_output_weights": bool(hf.get("tie_word_embeddings")),
    }


def rope_scaling(hf: dict) -> dict | None:
    """Return the arguments of RotaryEmbedding._apply_scaling, or None without scaling.

    GPTModel takes the factor only and fixes the other three at Llama 3.1's values; config.json may
    have others."""
    rope = rope_parameters(hf)
    if rope["rope_type"] != "llama3":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    need(rope, *names)
    return {name: rope[name] for name in names}


def divisions(hf: dict, transformer_engine: bool) -> list[tuple[str, int, str]]:
    """Return (field, its value, the key of `parallel` that must divide it) triples."""
    num_heads = hf["num_attention_heads"]
    return [
        ("num_attention_heads", num_heads, "tensor"),
        ("num_key_value_heads", hf.get("num_key_value_heads") or num_heads, "tensor"),
        ("intermediate_size", hf["intermediate_size"], "tensor"),
    ]
