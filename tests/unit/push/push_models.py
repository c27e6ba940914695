"""Small models whose weights are pushed."""

from tools.bench.push.small_model import SHAPE

DEEPSEEK = SHAPE | {"num_nextn_predict_layers": 0}
DEEPSEEK_MTP = SHAPE | {"num_nextn_predict_layers": 1}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 130,
    "tie_word_embeddings": True,
}
