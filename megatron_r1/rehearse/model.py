"""The models of a recipe in miniature: its own config.json with smaller sizes, and random weights;
its reward models likewise, behind vLLM's own server."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from r1_grading.rewards import SERVED_REWARDS
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_r1.config import Config
from megatron_r1.data.prompt_templates import TEMPLATES
from megatron_r1.models.hf_config import HFConfig, has_score_head, score_model_config
from megatron_r1.models.hf_config_names import published_names
from megatron_r1.models.weights.formats.published_layout import published_tensors
from megatron_r1.models.weights.table import weight_table
from megatron_r1.pipeline.pipeline_recipe import ServeConfig
from megatron_r1.pipeline.serving import choose_ports, serve_models

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


SERVED_NAME = "reward_model"
MAX_TOKENS = 1024
"""The longest question with its response; its template may be longer than the policy's."""


def reward_models(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the kinds of `rewards.options` that a reward model grades, each with its name."""
    return {
        kind: values["model"]
        for kind, values in options.items()
        if kind in SERVED_REWARDS
        and SERVED_REWARDS[kind].startswith("r1_grading.remote.reward_model:")
    }


@contextlib.contextmanager
def serve_reward_models(
    config: Config, hf_config: HFConfig, folder: Path, verb: str
) -> Iterator[list[str]]:
    """Serve one model with random weights in the place of every reward model of a miniature's `rl`.
    Yield the settings that name its address, as on a cluster (examples/deepseek_r1/stage.sbatch).

    Args:
        config: the miniature.
        hf_config: config.json of the policy, whose architecture the served model has.
        folder: the folder of the served model and its logs.
        verb: the recipe's verb.

    Raises:
        RunError: the server does not start."""
    names = reward_models(config.rewards.options)
    if verb != "rl" or not names:
        yield []
        return
    write_random_model_folder(folder / SERVED_NAME, score_model_config(hf_config), seed=2)
    tokens = min(MAX_TOKENS, hf_config.get("max_position_embeddings", MAX_TOKENS))
    arguments = ["--dtype", "float32", "--max-model-len", str(tokens), "--served-model-name"]
    server = ServeConfig(
        model=str(folder / SERVED_NAME),
        task="classify",
        arguments=[*arguments, *set(names.values())],
    )
    ports = choose_ports({SERVED_NAME: server}, {})
    log = {SERVED_NAME: folder / f"log-{SERVED_NAME}.txt"}
    with serve_models({SERVED_NAME: server}, ports, log, lambda: None) as (running,):
        yield [f"--rewards.options.{kind}.url={running.url}" for kind in names]
