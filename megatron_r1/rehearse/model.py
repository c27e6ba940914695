"""The model of a recipe in miniature: its config.json with smaller sizes, and random weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_r1.data.prompt_templates import TEMPLATES
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.hf_config_names import published_names
from megatron_r1.models.weights.formats.published_layout import published_tensors
from megatron_r1.models.weights.table import weight_table

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
WELL_FORMED_RESPONSES = [f"<think>step {i}</think><answer>{i}</answer>" for i in range(8)]
"""Tokens that are a whole response in form: a third of the random ones have a thought and
an answer, without which `sample` would keep none."""
HEAD_WIDTH = 64
"""Width of an attention head; vLLM's attention on CPUs takes multiples of 32."""
HIDDEN_SIZE = 256
EXPERT_WIDTH = 512
"""Features of one expert: a multiple of FP8's blocks of 128, also where four ranks share it."""
STD = 0.05
"""The standard deviation of random weights. With 0.1 five layers amplify bf16's rounding until
engine and trainer differ by 0.4 to 1.0; with less than 0.03 all log-probabilities are nearly
equal."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shrink_config(hf_config: HFConfig, num_layers: int, fp8: bool) -> HFConfig:
    """Return config.json with its sizes divided; kinds of layers, experts and attention stay.

    Args:
        hf_config: the model's config.json.
        num_layers: the number of layers that stay.
        fp8: whether weights are pushed in blocks of 128, which heads must then fill."""
    heads = min(hf_config["num_attention_heads"], 4)
    small = {
        **hf_config,
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY_SIZE,
        "num_attention_heads": heads,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    small.pop("quantization_config", None)  # recipes train the bf16 weights
    small.pop("auto_map", None)
    if hf_config.get("kv_lora_rank"):
        # vLLM's latent attention on CPUs takes the ranks and head sizes of DeepSeek-V3 only.
        small |= {"hidden_size": HIDDEN_SIZE, "num_key_value_heads": heads}
        small |= {"q_lora_rank": HIDDEN_SIZE // 2} if hf_config.get("q_lora_rank") else {}
    else:
        width = 128 if fp8 else HEAD_WIDTH
        small |= {
            "hidden_size": heads * width,
            "num_key_value_heads": min(hf_config.get("num_key_value_heads") or heads, heads // 2),
        }
        small |= {"head_dim": width} if "head_dim" in hf_config else {}
    if hf_config.get("n_routed_experts"):
        small |= {
            "n_routed_experts": min(hf_config["n_routed_experts"], 8),
            "num_experts_per_tok": min(hf_config["num_experts_per_tok"], 2),
            "moe_intermediate_size": EXPERT_WIDTH,
            "n_group": min(hf_config.get("n_group") or 1, 2),
            "topk_group": 1,
            "first_k_dense_replace": min(hf_config.get("first_k_dense_replace") or 0, 1),
        }
    for key in ("mlp_layer_types", "layer_types"):
        if types := hf_config.get(key):
            small[key] = types[:num_layers]
    return small


def write_random_model_folder(folder: Path, hf_config: HFConfig, seed: int) -> None:
    """Write a Hugging Face model folder: config.json, tokenizer and random weights in fp32.

    Args:
        folder: the folder to make.
        hf_config: the model's config.json.
        seed: the seed of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_names(hf_config), indent=2))
    _train_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True)),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    generator = np.random.default_rng(seed)
    tensors = {
        name: _random_weights(name, shape, generator)
        for name, (shape, _) in published_tensors(
            hf_config, with_mtp=not has_score_head(hf_config)
        ).items()
    }
    for copy, original in weight_table(hf_config).duplicate_of.items():
        if copy in tensors:
            tensors[copy] = tensors[original]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random_weights(
    name: str, shape: tuple[int, ...], generator: np.random.Generator
) -> np.ndarray:
    if len(shape) == 1:
        is_norm = name.endswith("norm.weight")
        return (np.ones if is_norm else np.zeros)(shape, np.float32)
    return generator.normal(0.0, STD, shape).astype(np.float32)


def _train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer in which templates are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(TAG_TOKENS) - len(WELL_FORMED_RESPONSES),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEMPLATES.values()] * 3, trainer)
    tokenizer.add_tokens([*TAG_TOKENS, *WELL_FORMED_RESPONSES])
    filler = [f"<unused_{i}>" for i in range(VOCABULARY_SIZE - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(filler)
    return tokenizer
