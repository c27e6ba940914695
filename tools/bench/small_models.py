"""Folders of small Qwen2-shaped models, with the tokenizer of examples/laptop."""

import json
import shutil
from pathlib import Path
from typing import Any

from tools.bench.host import ROOT

TOKENIZER = ROOT / "examples" / "laptop" / "model"
VOCABULARY = 273
END = 1


def qwen2(hidden: int, layers: int, heads: int, **overrides: Any) -> dict[str, Any]:
    """Return a config.json for the laptop tokenizer.

    Args:
        hidden: the hidden size.
        layers: the number of layers.
        heads: the attention heads.
        overrides: entries that are added or replaced."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": END,
        "pad_token_id": 2,
        "torch_dtype": "float32",
        **overrides,
    }


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Write config.json and the tokenizer, no weights; return `folder`."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
