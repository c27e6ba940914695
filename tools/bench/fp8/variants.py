"""The compared numerics as settings of a recipe, and the model and optimizer they share."""

import json
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"model": {"dtype": "float32"}},
    "bf16": {},
    "blockwise": {"fp8": {"recipe": "blockwise"}},
    "blockwise, fp32 scales": {"fp8": {"recipe": "blockwise", "scales": "float32"}},
    "tensorwise": {"fp8": {"recipe": "tensorwise"}},
    "mxfp8": {"fp8": {"recipe": "mxfp8"}},
}
BASELINE = "bf16"
"""The numerics with which the DeepSeek-V3 report compares FP8 (appendix B.1)."""

MODEL: dict[str, Any] = json.loads(Path(__file__).with_name("config.json").read_text())
SHARED: dict[str, Any] = {
    "model": {"dtype": "bfloat16", "init": "random", "init_std": 0.03, "mtp": "none"},
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "parallel": {"tokens_per_microbatch": 4096},
}
WARMUP_STEPS = 10


def settings(variant: str, model_folder: str, seed: int, threads: int) -> dict[str, Any]:
    """Return the recipe of `variant` for megatron_r1.config.parse."""
    tree = {section: dict(values) for section, values in SHARED.items()}
    for section, values in VARIANTS[variant].items():
        tree.setdefault(section, {}).update(values)
    tree["model"]["path"] = model_folder
    tree["parallel"]["threads"] = threads
    tree["run"] = {"seed": seed}
    return tree
