"""A small DeepSeek-V3 whose matrices are not multiples of a block of FP8."""

from small_models import DEEPSEEK

# Blocks cut off on both sides, several blocks, and a matrix smaller than one.
WIDE = {
    **DEEPSEEK,
    "hidden_size": 192,
    "intermediate_size": 300,
    "q_lora_rank": 136,
    "kv_lora_rank": 140,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
}
