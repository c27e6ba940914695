"""What the overlap of the experts' exchange needs, refused by name before anything starts."""

from dataclasses import replace

import pytest
from refusals import refused
from small_configs import DEEPSEEK, QWEN

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config
from megatron_r1.models import exchange_overlap_checks, transformer_config
from megatron_r1.models.exchange_overlap_checks import OVERLAP_KEY, check_exchange_overlap

MTP = {**DEEPSEEK, "num_nextn_predict_layers": 1}
TWO_MTP = {**DEEPSEEK, "num_nextn_predict_layers": 2}


def recipe(dtype="bfloat16", mtp="none", **parallel) -> Config:
    parallel = {"overlap_expert_exchange": True, "expert": 2, **parallel}
    return Config.model_validate({"model": {"dtype": dtype, "mtp": mtp}, "parallel": parallel})


# The settings, the model, what the message shows, and the fields of Megatron's configuration that
# Megatron itself refuses; None where the condition is ours.
CASES = [
    ({"expert": 1}, DEEPSEEK, "parallel.expert: 1", {"expert_model_parallel_size": 1}),
    (
        {"pipeline": 2},
        DEEPSEEK,
        "parallel.virtual_pipeline",
        {"pipeline_model_parallel_size": 2, "pipeline_dtype": "given"},
    ),
    ({"pipeline": 2, "pipeline_layout": "Ett|ttL"}, DEEPSEEK, "pipeline_layout", None),
    (
        {"recompute": "full"},
        DEEPSEEK,
        "parallel.recompute: full",
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    (
        {"recompute": "selective", "recompute_modules": ["moe"]},
        DEEPSEEK,
        "parallel.recompute_modules",
        None,
    ),
    ({"dtype": "float32"}, DEEPSEEK, "model.dtype: float32", {"bf16": False}),
    (
        {"mtp": "train", "pipeline": 2, "virtual_pipeline": 2},
        TWO_MTP,
        "model.mtp: train",
        {"mtp_num_layers": 2},
    ),
    ({}, QWEN, "Qwen2ForCausalLM", None),
]


@pytest.mark.parametrize(("settings", "hf_config", "says", "_"), CASES)
def test_what_prevents_it_is_refused_with_the_setting_and_the_fix(settings, hf_config, says, _):
    with refused(OVERLAP_KEY, Cause.CONFLICT, says, f"{OVERLAP_KEY}: false"):
        check_exchange_overlap(recipe(**settings), hf_config)
    check_exchange_overlap(recipe(**settings, overlap_expert_exchange=False), hf_config)


@pytest.mark.parametrize(
    "fields", [fields for *_, fields in CASES if fields], ids=lambda fields: next(iter(fields))
)
def test_megatron_refuses_the_same(fields):
    config = transformer_config(DEEPSEEK, recipe())
    fields = {name: config.params_dtype if v == "given" else v for name, v in fields.items()}
    with pytest.raises(AssertionError):
        replace(config, **fields)


@pytest.mark.parametrize(
    ("settings", "hf_config"),
    [
        ({}, DEEPSEEK),
        ({}, MTP),  # mtp: none
        ({"pipeline": 2, "virtual_pipeline": 2, "mtp": "train"}, MTP),
        ({"pipeline": 2, "pipeline_layout": "Et|t|tt|mL", "mtp": "frozen"}, MTP),
        ({"tensor": 2, "context": 2, "expert_tensor": 1}, DEEPSEEK),
        (
            {
                "recompute": "selective",
                "recompute_modules": ["core_attn", "layernorm", "mla_up_proj", "shared_experts"],
            },
            DEEPSEEK,
        ),
    ],
)
def test_megatron_takes_what_is_not_refused(settings, hf_config):
    assert not list(exchange_overlap_checks.overlap_conflicts(recipe(**settings), hf_config))
    config = transformer_config(hf_config, recipe(**settings))
    assert config.overlap_moe_expert_parallel_comm
    assert not config.delay_wgrad_compute and not config.moe_shared_expert_overlap
