"""The small score models, the texts they score and where they are compared; pure Python."""

import grids
from small_models import MODELS

SCORED = (
    *("deepseek-yarn-mtp", "deepseek-plain-noqlora", "deepseek-v2"),
    *("qwen-tied", "llama3", "qwen3", "qwen3-moe", "gpt-oss"),
)
"""Of `small_models.MODELS`: those whose body gets a score head."""

LENGTHS = [30, 17, 64, 7, 1, 40, 9, 23, 12, 12]
"""Tokens of the texts: five pairs, the better one first."""

LABELS = [1, 0, 0, 1, 1, 1, 0, 0, 1, 0]
"""Of the same texts, each for itself."""


def models_on(grid: str, world_size: int) -> list[str]:
    """All that the grid allows on two ranks; on one or four two of them, for the time it takes."""
    at = grids.sizes(grid)
    chosen = SCORED if world_size == 2 else ("deepseek-yarn-mtp", "llama3")
    return [name for name in chosen if grids.allows(MODELS[name], at)]
