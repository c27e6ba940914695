"""The models that are compared with adapters, and which of their weights have one."""

import re

from small_models import DEEPSEEK, QWEN

RANK, ALPHA = 3, 4.5
TIED = {"tie_word_embeddings": True}
MODELS = {
    # Biases, three times as many query heads as key heads; queries and values, not the keys.
    "qwen-some": (QWEN, ["q_proj", "v_proj", "mlp.down_proj"]),
    # On four tensor ranks fewer key heads than ranks.
    "qwen-all": ({**QWEN, "num_attention_heads": 4, "head_dim": 12} | TIED, None),
    "deepseek-all": (DEEPSEEK, None),
    "deepseek-some": (DEEPSEEK, ["o_proj", *(f"experts.{x}_proj" for x in ("gate", "up", "down"))]),
}
"""Name → (config.json, model.lora.targets)."""


def adapted(name: str, targets: list[str] | None) -> bool:
    """Whether a tensor of the checkpoint has an adapter, as docs/lora.md says it."""
    if not re.search(r"(_proj|_proj_with_mqa)\.weight$", name):
        return False
    module = re.sub(r"\.experts\.\d+\.", ".experts.", name.removesuffix(".weight"))
    return targets is None or any(module.endswith(f".{target}") for target in targets)


def compared_on(grid: str) -> list[str]:
    """The models that a grid allows."""
    if "ep2" in grid or "etp2" in grid:
        return [name for name in MODELS if name.startswith("deepseek")]
    return [name for name in MODELS if grid != "tp4" or name != "qwen-some"]
