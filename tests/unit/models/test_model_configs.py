import json
from math import prod

import pytest
from released_configs import FP8, RELEASED
from small_configs import DEEPSEEK, QWEN
from transformers import AutoConfig

from megatron_r1 import models
from megatron_r1.config import Config
from megatron_r1.errors import UserError
from megatron_r1.models.attention_fields import model_arguments, rope_scaling, yarn_scaling
from megatron_r1.models.hf_config import published_names, resolve_aliases
from megatron_r1.models.supported import check_supported, own_fields
from megatron_r1.rehearsal.model import shrink
from megatron_r1.weights import hf_tensors

LLAMA = {**QWEN, "architectures": ["LlamaForCausalLM"]}
YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def build(hf, **parallel):
    return models.transformer_config(hf, Config(parallel=parallel))


def test_read_hf_config_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="nowhere/config.json does not exist"):
        models.read_hf_config(tmp_path / "nowhere")
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        models.read_hf_config(tmp_path)
    file.write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="BertForMaskedLM.*Llama.*Qwen2.*DeepseekV3"):
        models.read_hf_config(tmp_path)


def test_read_hf_config_resolves_the_names_transformers_may_write(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["DeepseekV3ForCausalLM"], "num_mtp_layers": 1})
    )
    assert models.read_hf_config(tmp_path)["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 experts cannot be chosen"),
        ({"n_group": 8}, "scored by its best 2"),
        ({"routed_scaling_factor": None}, "lacks routed_scaling_factor"),
        ({"n_group": 3}, "n_routed_experts=8 is not a multiple of n_group=3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"n_group": 1, "num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than .*=8"),
        ({"topk_group": 5}, "topk_group=5 is more than n_group=4"),
        ({"v_head_dim": "8"}, "v_head_dim='8' must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' must be a number"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"head_dim": 12}, "head_dim=12 is neither"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"num_key_value_heads": None}, "lacks num_key_value_heads; add"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": None}}, "mscale=0.0"),
        ({"rope_scaling": {"type": "yarn", **YARN, "twist": 3}}, "'twist': 3"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "rope_theta=10000.0 beside rope_parameters"),
        ({"logit_scale": 0.5, "window": 7}, "logit_scale=0.5, window=7 is not supported"),
    ],
)
def test_deepseek_refuses_what_it_would_compute_otherwise(changes, message):
    with pytest.raises(ValueError, match=message):
        build({**DEEPSEEK, **changes})


@pytest.mark.parametrize(
    "hf, changes, message",
    [
        (QWEN, {"use_sliding_window": True}, "use_sliding_window=True"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"sliding_window": 64}, "sliding_window=64"),
        (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN, {"num_key_value_heads": None}, "lacks num_key_value_heads"),
        (QWEN, {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key.*3"),
        (QWEN, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number"),
        (LLAMA, {"head_dim": 7}, "7 numbers of a head are rotated"),
        (QWEN, {"rope_scaling": {**YARN, "type": "yarn", "factor": 0.5}}, "factor=0.5 of yarn"),
        (QWEN, {"rope_scaling": {**YARN, "type": "yarn"}}, "mscale=1.0"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4}}, "with a decimal point .4.0."),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
    ],
)
def test_dense_models_refuse_what_they_would_compute_otherwise(hf, changes, message):
    with pytest.raises(ValueError, match=message):
        build({**hf, **changes})


@pytest.mark.parametrize(
    "hf, settings, message",
    [
        (
            QWEN,
            {"tensor": 3},
            "parallel.tensor=3 does not divide num_attention_heads=4",
        ),
        (
            {**QWEN, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
            {"tensor": 3},
            "parallel.tensor=3 does not divide num_key_value_heads=2",
        ),
        (
            {**QWEN, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 2},
            {"tensor": 8},
            "parallel.tensor=8 does not divide \\(num_attention_heads \\+ 2 x num_key_value_heads",
        ),
        (QWEN, {"pipeline": 8}, "are 8 stages, and the model has 6 layers"),
        (QWEN, {"virtual_pipeline": 2}, "virtual_pipeline=2 needs parallel.pipeline > 1"),
        (
            QWEN,
            {"pipeline": 2, "pipeline_layout": "Et*3|t*2L"},
            "decoder layers \\(t\\) must stand there 6 times, not 5",
        ),
        (QWEN, {"expert": 2}, "parallel.expert=2 needs a model with experts"),
        (DEEPSEEK, {"expert": 3}, "parallel.expert=3 does not divide n_routed_experts=8"),
        (DEEPSEEK, {"tensor": 0}, "parallel.tensor\n.*greater than or equal to 1"),
        (DEEPSEEK, {"recompute": "some"}, "parallel.recompute\n.*'none', 'selective' or 'full'"),
        (
            DEEPSEEK,
            {"recompute": "selective", "recompute_modules": ["attention"]},
            "'attention' is none of core_attn",
        ),
        (
            QWEN,
            {"recompute": "selective", "recompute_modules": ["moe"]},
            "this model has no 'moe'",
        ),
        (
            DEEPSEEK,
            {"recompute": "selective", "recompute_modules": ["moe", "shared_experts"]},
            "'moe' includes 'shared_experts'",
        ),
        (DEEPSEEK, {"no_such_field": 1}, "parallel.no_such_field\n"),
    ],
)
def test_sizes_that_cannot_be_say_so(hf, settings, message):
    with pytest.raises(ValueError, match=message):
        build(hf, **settings)


@pytest.mark.parametrize(
    "changes, parallel, message",
    [
        ({}, {"context": 2}, "parallel.context=2 is not supported for GptOssForCausalLM"),
        ({}, {"expert_tensor": 2}, "parallel.expert_tensor=2 is not supported"),
        ({"layer_types": ["full_attention"] * 24}, {}, "only 'sliding_attention' and 'full"),
        ({"swiglu_limit": 5.0}, {}, "swiglu_limit=5.0"),
        ({"rms_norm_eps": 1e-6}, {}, "rms_norm_eps=1e-06 .* only 1e-05 is"),
        ({"attention_bias": False}, {}, "attention_bias=False"),
        ({"sliding_window": None}, {}, "lacks sliding_window"),
        ({"sliding_window": 0}, {}, "sliding_window=0 must be a whole number"),
        ({"rope_scaling": None}, {}, "rope_type='default' in config.json is not supported"),
        ({"experts_per_token": 2}, {}, "experts_per_token=2 and num_experts_per_tok=4"),
    ],
)
def test_gpt_oss_refuses_what_it_would_compute_otherwise(changes, parallel, message):
    with pytest.raises(ValueError, match=message):
        build(resolve_aliases({**RELEASED["gpt-oss-20b"][0], **changes}), **parallel)


def test_deepseek_fields_reach_megatron():
    hf = {**DEEPSEEK, "rope_scaling": {"type": "yarn", **YARN}, "num_nextn_predict_layers": 1}
    model = {"expert_bias_update_rate": 1e-3}
    recipe = Config(model=model, parallel={"tensor": 2, "expert": 4})
    config = models.transformer_config(hf, recipe)
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
    with pytest.raises(UserError, match="parallel.sequence: false: Megatron's experts"):
        build(DEEPSEEK, tensor=2, sequence=False)


def test_keys_that_change_nothing_are_not_refused():
    names = {"_model_name_or_path": "v3", "unk_token_id": 0, "transformers_version": "4.46.0"}
    names |= {"auto_map": {"AutoModel": "m.M"}, "use_cache": True}
    training = {"aux_loss_alpha": 1e-3, "seq_aux": True, "ep_size": 1, "initializer_range": 0.02}
    unset = {"no_such_setting": None, "rope_scaling": None, "num_mtp_layers": 0}
    assert build(resolve_aliases({**DEEPSEEK, **names, **training, **unset}))


def test_a_query_latent_is_left_out_by_null_only():
    assert build({**DEEPSEEK, "q_lora_rank": None}).q_lora_rank is None
    with pytest.raises(ValueError, match="lacks q_lora_rank, whose default .* add null"):
        build({key: value for key, value in DEEPSEEK.items() if key != "q_lora_rank"})


def test_two_names_of_one_setting_must_agree():
    with pytest.raises(ValueError, match="num_experts=4 and n_routed_experts=8 mean the same"):
        resolve_aliases({**DEEPSEEK, "num_experts": 4})


def test_routing_of_other_layers_than_vllm_would_choose_is_refused():
    lite = {**DEEPSEEK, "architectures": ["Glm4MoeLiteForCausalLM"]}
    kinds = ["dense", "sparse", "sparse", "sparse"]
    assert build({**lite, "mlp_layer_types": kinds}).moe_layer_freq == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="mlp_layer_types.*first_k_dense_replace=1"):
        build({**lite, "mlp_layer_types": kinds[::-1]})
    with pytest.raises(ValueError, match="first_k_dense_replace=2"):
        build({**lite, "first_k_dense_replace": 2})


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_supported_and_have_their_published_size(name):
    hf, billions = RELEASED[name]
    hf = resolve_aliases(hf)
    check_supported(hf)
    if billions is None:
        return
    shapes = hf_tensors(hf, with_mtp=False).items()
    # The routers' bias is a buffer.
    count = sum(prod(shape) for tensor, (shape, _) in shapes if not tensor.endswith("_bias"))
    if billions == round(billions, 1):  # published to this precision only
        assert count / 1e9 == pytest.approx(billions, rel=2e-3)
    else:
        assert count == round(billions * 1e9)


@pytest.mark.parametrize("name", RELEASED)
def test_miniatures_of_released_models_are_supported(name):
    """As a rehearsal writes them, for transformers and vLLM."""
    hf = resolve_aliases(RELEASED[name][0])
    written = published_names(shrink(hf, num_layers=3, fp8=False))
    assert ("num_experts" in written) == name.startswith(("Qwen3-30B", "Qwen3-Coder", "gpt-oss"))
    check_supported(resolve_aliases(written))


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_mean_the_same_as_transformers_5_writes_them(name):
    hf = {key: value for key, value in RELEASED[name][0].items() if key != "quantization_config"}
    kind = hf["model_type"].replace("kimi_k2", "deepseek_v3")
    saved = AutoConfig.for_model(kind, **{k: v for k, v in hf.items() if k != "model_type"})
    written = resolve_aliases(json.loads(saved.to_json_string()))
    assert written["rope_parameters"]
    hf = resolve_aliases(hf)
    for read in (own_fields, model_arguments, rope_scaling, yarn_scaling):
        assert read(written) == read(hf)


@pytest.mark.parametrize(
    "name, form, message",
    [
        ("Qwen2.5-Math-1.5B", {"quant_method": "awq", "bits": 4}, "quant_method='awq' cannot be"),
        ("Kimi-K2-Instruct", {"quant_method": "compressed-tensors"}, "'compressed-tensors' cannot"),
        ("Llama-3.2-1B", {"load_in_4bit": True}, "quant_method=None cannot be read, only 'fp8'"),
        ("Llama-3.2-1B", {"quant_method": "fp8"}, "weight_block_size=None cannot be read"),
        ("DeepSeek-V3.1", {**FP8, "weight_block_size": [64, 64]}, r"\[64, 64\] cannot be read"),
        ("DeepSeek-V3.1", {**FP8, "fmt": "e5m2"}, "fmt='e5m2' cannot be read, only 'e4m3'"),
        ("gpt-oss-20b", FP8, "quant_method='fp8' cannot be read, only 'mxfp4'"),
    ],
)
def test_quantized_weights_that_cannot_be_read_are_refused_by_the_configuration(
    name, form, message
):
    hf = resolve_aliases(RELEASED[name][0])
    with pytest.raises(UserError, match=message + ".*bf16"):
        check_supported({**hf, "quantization_config": form})


@pytest.mark.parametrize(
    "name",
    [
        *("MistralForCausalLM", "Gemma3ForConditionalGeneration", "Qwen3NextForCausalLM"),
        *("Qwen2_5_VLForConditionalGeneration", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
    ],
)
def test_other_architectures_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"architecture {name} .*supported are LlamaFor.*GptOssFor"):
        check_supported({**QWEN, "architectures": [name]})
