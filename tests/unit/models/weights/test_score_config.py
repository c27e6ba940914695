"""Configurations of score models, and what the weight table makes of them."""

import json

import pytest
from refusals import refused
from weight_shards import shard

from megatron_r1.base.errors import Cause
from megatron_r1.models import weights
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.formats.megatron_weights import stored_layout

SMALL = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_mtp_layers": 1,
}
LANGUAGE = {
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
    "Llama": SMALL,
    "DeepseekV3": {**SMALL, **EXPERTS},
}


def write(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_score_model_is_the_language_model_with_another_head(tmp_path, name):
    folder = write(tmp_path, architectures=[f"{name}ForCausalLM"], **LANGUAGE[name])
    language, score = read_hf_config(folder), read_hf_config(folder, "score")
    assert score["architectures"] == [f"{name}ForSequenceClassification"]
    heads = {"lm_head.weight"}
    before = {
        tensor: entry
        for tensor, entry in weights.hf_tensors(language, with_mtp=False).items()
        if tensor not in heads
    }
    after = weights.hf_tensors(score)
    assert after.pop("score.weight") == ((1, 16), "bfloat16")
    assert after == before
    # Whole on every tensor rank, written by the first; on the last stage alone.
    for rank in range(2):
        entry = weights.parameter_layout(score, shard(score, tp=(rank, 2)))["score.weight"]
        assert entry.shape == (1, 16) and entry.is_owner == (rank == 0)
    first = weights.parameter_layout(score, shard(score, pp=(0, 2)))
    assert "score.weight" not in first and "output_layer.weight" not in first
    assert stored_layout(score).shapes["score.weight"] == (1, 16)


def test_what_is_exported_is_read_as_a_score_model_and_nothing_else(tmp_path):
    from megatron_r1.models.hf_config import score_model_config

    config = score_model_config({"architectures": ["Qwen2ForCausalLM"], **LANGUAGE["Qwen2"]})
    folder = write(tmp_path, **config)
    assert read_hf_config(folder, None) == read_hf_config(folder, "score") == config
    with refused("model.path", Cause.CONFLICT, "Qwen2ForSequenceClassification"):
        read_hf_config(folder)


@pytest.mark.parametrize("labels", [{}, {"num_labels": 3}, {"id2label": {"0": "a", "1": "b"}}])
def test_classifiers_of_several_labels_are_refused(tmp_path, labels):
    folder = write(
        tmp_path, architectures=["LlamaForSequenceClassification"], **LANGUAGE["Llama"], **labels
    )
    with refused("num_labels", Cause.UNSUPPORTED):
        read_hf_config(folder, "score")
