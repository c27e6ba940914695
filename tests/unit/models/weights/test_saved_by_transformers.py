"""Model folders that transformers writes from its own classes, without some keys and tensors."""

import json

import pytest
import torch
import transformers
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.config import Config
from megatron_r1.engines.server.model_config import config_arguments
from megatron_r1.models.hf_config import num_mtp_layers
from megatron_r1.models.hf_config_file import (
    describe_config_changes,
    load_raw_hf_config,
    read_hf_config,
)
from megatron_r1.models.support_checks import check_supported
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import write_config

SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64},
    **{"num_nextn_predict_layers": 1, "pad_token_id": 0},
}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    **{"v_head_dim": 4},
}
CLASSES = {
    "DeepseekV3ForCausalLM": LATENT,
    "Glm4MoeForCausalLM": {"head_dim": 8},
    "Glm4MoeLiteForCausalLM": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
}
ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def saved(name, folder):
    """Write a model of a transformers class with random weights; return the folder."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**SIZES, **CLASSES[name])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_without_tensors_of_mtp_layers_is_read_without_them(name, tmp_path):
    saved(name, tmp_path)
    assert load_raw_hf_config(tmp_path)["num_nextn_predict_layers"] == 1
    hf_config = read_hf_config(tmp_path)
    assert num_mtp_layers(hf_config) == 0
    check_supported(hf_config)
    with HFWeights(tmp_path, hf_config) as weights:
        weights.check(with_mtp=True)
    assert any("MTP" in sentence for sentence in describe_config_changes(tmp_path))
    recipe = Config(model={"path": str(tmp_path), "mtp": "train"})
    with refused("model.mtp", Cause.CONFLICT, tmp_path):
        check_trainer(recipe, "sft")


def test_mtp_layers_that_are_there_in_part_are_missed(tmp_path):
    saved("DeepseekV3ForCausalLM", tmp_path)
    extra = {"weight_map": {"model.layers.2.enorm.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(extra))
    assert num_mtp_layers(read_hf_config(tmp_path)) == 1


def test_a_folder_without_weights_has_the_layers_of_its_config(tmp_path):
    saved("DeepseekV3ForCausalLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert num_mtp_layers(read_hf_config(tmp_path)) == 1


def test_the_routing_of_deepseek_v3_is_known_and_handed_on(tmp_path):
    saved("DeepseekV3ForCausalLM", tmp_path)
    written = load_raw_hf_config(tmp_path)
    assert not ROUTING.keys() & written.keys()
    assert ROUTING.items() <= read_hf_config(tmp_path).items()
    assert any("topk_method" in sentence for sentence in describe_config_changes(tmp_path))
    option, overrides = config_arguments(written, {"quantization_config": None})
    assert option == "--hf-overrides"
    assert json.loads(overrides) == {**ROUTING, "quantization_config": None}
    out = tmp_path / "export"
    out.mkdir()
    write_config(tmp_path, out, torch.bfloat16, with_mtp=False)
    assert ROUTING.items() <= json.loads((out / "config.json").read_text()).items()


@pytest.mark.parametrize(
    "hf_config",
    [{"architectures": ["LlamaForCausalLM"]}, {"architectures": ["Unknown"]}, {**ROUTING}],
)
def test_other_models_are_given_to_vllm_as_they_are(hf_config):
    assert config_arguments(hf_config, None) == []
    explicit = {"architectures": ["DeepseekV3ForCausalLM"], **ROUTING}
    assert config_arguments(explicit, None) == []
