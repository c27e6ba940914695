import json
from math import prod
from pathlib import Path

import pytest
from pydantic import ValidationError
from refusals import refused
from released_configs import FP8, RELEASED
from small_configs import DEEPSEEK, QWEN
from transformers import AutoConfig

from megatron_r1 import models
from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.models.attention_fields import model_arguments
from megatron_r1.models.hf_config_names import published_names, resolve_aliases
from megatron_r1.models.rotary_fields import rope_scaling, yarn_scaling
from megatron_r1.models.support_checks import check_supported, model_fields
from megatron_r1.models.weights import hf_tensors
from megatron_r1.rehearse.model import shrink_config

LLAMA = {**QWEN, "architectures": ["LlamaForCausalLM"]}
BASES = {"qwen": QWEN, "llama": LLAMA, "deepseek": DEEPSEEK}
BASES["gpt-oss-20b"] = RELEASED["gpt-oss-20b"][0]
YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def build(hf_config, **parallel):
    return models.transformer_config(hf_config, Config(parallel=parallel))


def test_read_hf_config_names_what_is_wrong(tmp_path):
    with refused("model.path", Cause.NOT_FOUND, tmp_path / "nowhere/config.json"):
        models.read_hf_config(tmp_path / "nowhere")
    file = tmp_path / "config.json"
    file.write_text("{")
    with refused("config.json", Cause.MALFORMED, file):
        models.read_hf_config(tmp_path)
    file.write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    known = "LlamaForCausalLM", "Qwen2ForCausalLM", "DeepseekV3ForCausalLM"
    with refused("architectures", Cause.UNSUPPORTED, "BertForMaskedLM", *known):
        models.read_hf_config(tmp_path)


def test_read_hf_config_resolves_the_names_transformers_may_write(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["DeepseekV3ForCausalLM"], "num_mtp_layers": 1})
    )
    assert models.read_hf_config(tmp_path)["num_nextn_predict_layers"] == 1


# Changes of a model's config.json or of section parallel, and what they are refused for.
REFUSALS = [
    json.loads(line)
    for line in Path(__file__).with_name("config_refusals.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize(
    "case", REFUSALS, ids=lambda case: str(case.get("changes") or case.get("parallel"))[:60]
)
def test_what_would_be_computed_otherwise_is_refused(case):
    hf_config = BASES[case["model"]] | case.get("changes", {})
    with refused(case["key"], case["cause"], *case.get("shows", ())):
        build(resolve_aliases(hf_config), **case.get("parallel", {}))


def written(folder, hf_config):
    """Write `hf_config` as the config.json of a folder; return the folder."""
    (folder / "config.json").write_text(
        hf_config if isinstance(hf_config, str) else json.dumps(hf_config)
    )
    return folder


# As REFUSALS, for a config.json as it is on disk: NaN, and sizes that no loop would get through.
ABSURD = [
    json.loads(line)
    for line in Path(__file__).with_name("absurd_configs.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("case", ABSURD, ids=lambda case: str(case["changes"])[:60])
def test_an_absurd_config_ends_with_its_key(tmp_path, case):
    hf_config = BASES[case["model"]] | case["changes"]
    with refused(case["key"], case["cause"]):
        check_supported(models.read_hf_config(written(tmp_path, hf_config)))


@pytest.mark.parametrize("levels", [100, 1_000, 100_000])
@pytest.mark.parametrize("form", ["[]", "{}"])
def test_a_nested_config_is_refused(tmp_path, levels, form):
    opened = form[0] if form == "[]" else '{"a": '
    nested = opened * levels + "1" + form[1] * levels
    text = json.dumps(QWEN)[:-1] + f', "of_no_use": {nested}}}'
    with refused("config.json", Cause.MALFORMED, tmp_path / "config.json"):
        models.read_hf_config(written(tmp_path, text))


def test_a_key_with_two_values_is_refused(tmp_path):
    twice = json.dumps(QWEN)[:-1] + ', "hidden_size": 999}'
    with refused("config.json", Cause.MALFORMED, "hidden_size"):
        models.read_hf_config(written(tmp_path, twice))
    same = json.dumps(QWEN)[:-1] + f', "hidden_size": {QWEN["hidden_size"]}}}'
    assert models.read_hf_config(written(tmp_path, same)) == QWEN


def test_files_of_a_model_folder_that_are_links_elsewhere_are_not_read(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (written(tmp_path / "model", QWEN) / "merges.txt").symlink_to("../secret.txt")
    with refused("model.path", Cause.CONFLICT, "merges.txt", tmp_path / "secret.txt"):
        models.read_hf_config(tmp_path / "model")


@pytest.mark.parametrize(
    "name, value", [("tensor", 0), ("recompute", "some"), ("no_such_field", 1)]
)
def test_an_impossible_value_of_a_setting_is_refused_by_its_type(name, value):
    with pytest.raises(ValidationError) as failure:
        build(DEEPSEEK, **{name: value})
    assert [error["loc"] for error in failure.value.errors()] == [("parallel", name)]


def test_deepseek_fields_reach_megatron():
    hf_config = {
        **DEEPSEEK,
        "rope_scaling": {"type": "yarn", **YARN},
        "num_nextn_predict_layers": 1,
    }
    model = {"expert_bias_update_rate": 1e-3}
    recipe = Config(model=model, parallel={"tensor": 2, "expert": 4})
    config = models.transformer_config(hf_config, recipe)
    assert config.multi_latent_attention and config.rope_type == "yarn"
    assert (config.rotary_scaling_factor, config.mscale_all_dim) == (40, 1.0)
    assert config.moe_layer_freq == [0, 1, 1, 1]
    assert (config.moe_router_num_groups, config.moe_router_group_topk) == (4, 2)
    assert config.mtp_num_layers == 1 and config.moe_router_bias_update_rate == 1e-3
    assert config.sequence_parallel and config.expert_tensor_parallel_size == 1


def test_one_group_of_experts_means_no_group_limit():
    config = build({**DEEPSEEK, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3})
    assert config.moe_router_num_groups is None and config.moe_router_topk == 3


def test_dense_models_keep_whole_sequences_under_tensor_parallelism():
    config = build(QWEN, tensor=2)
    assert not config.sequence_parallel
    assert config.add_qkv_bias and config.num_query_groups == 2
    assert not build(LLAMA).add_qkv_bias


def test_dense_models_share_sequences_where_the_recipe_says_so_and_experts_always():
    assert build(QWEN, tensor=2, sequence=True).sequence_parallel
    assert not build(QWEN, sequence=True).sequence_parallel, "one rank has nothing to share"
    assert build(DEEPSEEK, tensor=2, sequence=True).sequence_parallel
    with refused("parallel.sequence", Cause.CONFLICT):
        build(DEEPSEEK, tensor=2, sequence=False)


def test_keys_that_change_nothing_are_not_refused():
    names = {"_model_name_or_path": "v3", "unk_token_id": 0, "transformers_version": "4.46.0"}
    names |= {"auto_map": {"AutoModel": "m.M"}, "use_cache": True}
    training = {"aux_loss_alpha": 1e-3, "seq_aux": True, "ep_size": 1, "initializer_range": 0.02}
    unset = {"no_such_setting": None, "rope_scaling": None, "num_mtp_layers": 0}
    assert build(resolve_aliases({**DEEPSEEK, **names, **training, **unset}))


def test_a_query_latent_is_left_out_by_null_only():
    assert build({**DEEPSEEK, "q_lora_rank": None}).q_lora_rank is None
    with refused("q_lora_rank", Cause.MISSING):
        build({key: value for key, value in DEEPSEEK.items() if key != "q_lora_rank"})


def test_two_names_of_one_setting_must_agree():
    with refused("num_experts", Cause.CONFLICT, "num_experts=4", "n_routed_experts=8"):
        resolve_aliases({**DEEPSEEK, "num_experts": 4})


def test_routing_of_other_layers_than_vllm_would_choose_is_refused():
    lite = {**DEEPSEEK, "architectures": ["Glm4MoeLiteForCausalLM"]}
    kinds = ["dense", "sparse", "sparse", "sparse"]
    assert build({**lite, "mlp_layer_types": kinds}).moe_layer_freq == [0, 1, 1, 1]
    with refused("mlp_layer_types", Cause.CONFLICT, "first_k_dense_replace=1"):
        build({**lite, "mlp_layer_types": kinds[::-1]})
    with refused("mlp_layer_types", Cause.CONFLICT, "first_k_dense_replace=2"):
        build({**lite, "first_k_dense_replace": 2})


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_supported_and_have_their_published_size(name):
    hf_config, billions = RELEASED[name]
    hf_config = resolve_aliases(hf_config)
    check_supported(hf_config)
    if billions is None:
        return
    shapes = hf_tensors(hf_config, with_mtp=False).items()
    # The routers' bias is a buffer.
    count = sum(prod(shape) for tensor, (shape, _) in shapes if not tensor.endswith("_bias"))
    if billions == round(billions, 1):  # published to this precision only
        assert count / 1e9 == pytest.approx(billions, rel=2e-3)
    else:
        assert count == round(billions * 1e9)


@pytest.mark.parametrize("name", RELEASED)
def test_miniatures_of_released_models_are_supported(name):
    """As a rehearsal writes them, for transformers and vLLM."""
    hf_config = resolve_aliases(RELEASED[name][0])
    written = published_names(shrink_config(hf_config, num_layers=3, fp8=False))
    assert ("num_experts" in written) == name.startswith(("Qwen3-30B", "Qwen3-Coder", "gpt-oss"))
    check_supported(resolve_aliases(written))


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_mean_the_same_as_transformers_5_writes_them(name):
    hf_config = {
        key: value for key, value in RELEASED[name][0].items() if key != "quantization_config"
    }
    kind = hf_config["model_type"].replace("kimi_k2", "deepseek_v3")
    saved = AutoConfig.for_model(kind, **{k: v for k, v in hf_config.items() if k != "model_type"})
    written = resolve_aliases(json.loads(saved.to_json_string()))
    assert written["rope_parameters"]
    hf_config = resolve_aliases(hf_config)
    for read in (model_fields, model_arguments, rope_scaling, yarn_scaling):
        assert read(written) == read(hf_config)


@pytest.mark.parametrize(
    "name, form, shows",
    [
        ("Qwen2.5-Math-1.5B", {"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
        ("Kimi-K2-Instruct", {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ("Llama-3.2-1B", {"load_in_4bit": True}, "quant_method=None"),
        ("Llama-3.2-1B", {"quant_method": "fp8"}, "weight_block_size=None"),
        ("DeepSeek-V3.1", {**FP8, "weight_block_size": [64, 64]}, "[64, 64]"),
        ("DeepSeek-V3.1", {**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
        ("gpt-oss-20b", FP8, "quant_method='fp8'"),
    ],
)
def test_quantized_weights_that_cannot_be_read_are_refused_by_the_configuration(name, form, shows):
    hf_config = resolve_aliases(RELEASED[name][0])
    with refused("quantization_config", Cause.UNSUPPORTED, shows):
        check_supported({**hf_config, "quantization_config": form})


@pytest.mark.parametrize(
    "name",
    [
        *("MistralForCausalLM", "Gemma3ForConditionalGeneration", "Qwen3NextForCausalLM"),
        *("Qwen2_5_VLForConditionalGeneration", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
    ],
)
def test_other_architectures_are_refused_by_name(name):
    with refused("architectures", Cause.UNSUPPORTED, name, "LlamaForCausalLM"):
        check_supported({**QWEN, "architectures": [name]})
