"""`why` on engines with FP8 weights, against quantization in float64, block by block."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.weights.formats.published_layout import FP8_CONFIG
from megatron_r1.why.checks import engine_logprobs, trainer_logprobs
from megatron_r1.why.checks.fp8_causes import fit_effect
from megatron_r1.why.comparison import EQUAL, NOT_CHECKED
from megatron_r1.why.policy import (
    changed_parts,
    changed_weights,
    fp8_engines,
    step_logprobs,
    step_models,
)
from megatron_r1.why.policy.fp8_engines import FP8EngineLogprobs, pushed_values
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import StepModels
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import TokenRow

NEWEST, VOCABULARY = 2, 23
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 128},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY},
    "tie_word_embeddings": False,
}
ROUTED = {
    **{"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [0]},
}
FAMILIES = {"Qwen2": SIZES, "Qwen3Moe": SIZES | ROUTED}


def blocks(w):
    for top in range(0, w.shape[0], 128):
        for left in range(0, w.shape[1], 128):
            yield slice(top, top + 128), slice(left, left + 128)


def block_scales(w, power_of_two=False):
    """The scale of each block, spread over it, float64."""
    scales = torch.empty(w.shape, dtype=torch.float64)
    for block in blocks(w):
        scale = max(float(w[block].abs().max()), 1e-4) / 448
        scales[block] = 2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale
    return scales


def codes(w, scales):
    """The e4m3 number next to each w / scale, float64."""
    ratios = (w.double() / scales).clamp(-448, 448)
    above = torch.searchsorted(NUMBERS, ratios).clamp(1, len(NUMBERS) - 1)
    low, high = NUMBERS[above - 1], NUMBERS[above]
    return torch.where(ratios - low < high - ratios, low, high)


def quantized(w, scales_of=None, power_of_two=False):
    """What 8-bit numbers with the scales of w, or of others, mean."""
    scales = block_scales(w, power_of_two)
    other_scales = scales if scales_of is None else block_scales(scales_of, power_of_two)
    return codes(w, scales) * other_scales


def is_projection(name):
    return name.endswith(tuple(f"{module}.weight" for module in QUANTIZED))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (64, 40)])
def test_pushed_values_are_those_of_blocks_in_float64(shape, power_of_two):
    torch.manual_seed(0)
    scale_of_rows = torch.linspace(0.1, 3, shape[0])[:, None]
    values, older = (scale_of_rows * torch.randn(shape) for _ in range(2))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    for scales_of in (None, older):
        pushed = pushed_values(name, values, rounds_scales_up=power_of_two, scales_of=scales_of)
        expected = quantized(values, scales_of, power_of_two)
        torch.testing.assert_close(pushed.double(), expected, rtol=3e-7, atol=0)
    assert pushed.dtype == torch.float32 and not torch.equal(pushed, values)


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *("model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.bias"),
        "model.layers.0.self_attn.kv_a_layernorm.weight",
    ],
)
def test_other_tensors_are_pushed_in_bfloat16(name):
    values = torch.randn(130, 130)
    pushed = pushed_values(name, values, rounds_scales_up=False, scales_of=-values)
    assert torch.equal(pushed, values.bfloat16().float())


def test_the_bias_of_a_router_is_pushed_in_float32():
    name, values = "model.layers.1.mlp.gate.e_score_correction_bias", torch.randn(8)
    assert torch.equal(pushed_values(name, values, rounds_scales_up=False), values)


def test_a_coefficient_is_that_of_least_squares():
    draw = np.random.default_rng(0)
    effect, noise = draw.normal(size=400), draw.normal(size=400)
    fit = fit_effect(effect, 0.9 * effect + noise)
    solution, residuals, _, _ = np.linalg.lstsq(effect[:, None], 0.9 * effect + noise, rcond=None)
    assert fit.coefficient == pytest.approx(solution[0])
    error = math.sqrt(residuals[0] / 400 / (effect**2).sum())
    assert fit.error == pytest.approx(error)
    assert fit.holds and not fit_effect(effect, noise).holds
    assert not fit_effect(effect, 2 * effect).holds and not fit_effect(0 * effect, noise).holds


def first_weights(family):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        architectures=[f"{family}ForCausalLM"], **FAMILIES[family]
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.more) if name == "Qwen3Moe" else name
        for name in FAMILIES
    ],
)
def folders(request, tmp_path_factory):
    """The folders of three versions, each some updates after the one before."""
    model, made = first_weights(request.param), []
    for version in range(NEWEST + 1):
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.004 if version else 0.1) * torch.randn_like(parameter)
                if version and parameter.dim() > 1:  # other scales; of experts, each its own
                    sizes = parameter.shape[:-2]
                    parameter *= 1 + 0.05 * torch.randn(*sizes, 1, 1)
        made.append(tmp_path_factory.mktemp(f"version-{version}-"))
        model.save_pretrained(made[-1])
    return made


@pytest.fixture(autouse=True)
def kept_versions(monkeypatch, request):
    if "folders" not in request.fixturenames:
        return
    made = request.getfixturevalue("folders")
    for module in (
        changed_parts,
        changed_weights,
        fp8_engines,
        step_logprobs,
        step_models,
    ):
        monkeypatch.setattr(module, "weights_after", lambda folder, config, step: made[step])


def in_bfloat16(model):
    """Let every module's output be rounded to bfloat16; weights stay as they are."""
    for module in model.modules():
        module.register_forward_hook(
            lambda module, args, out: out.bfloat16().float() if torch.is_tensor(out) else None
        )
    return model.eval()


def rows(count=24, length=26):
    torch.manual_seed(1)
    return [
        TokenRow(
            torch.randint(VOCABULARY, (length,)),
            torch.arange(length) > 1,
            torch.zeros(length - 2),
            0,
            1.0,
            length - 2,
        )
        for _ in range(count)
    ]


def logged_step(folder, values, scratch, scale_format=None):
    """A step whose engine computed in bfloat16, with some tensors in place of a folder's."""
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (scratch / path.name).write_bytes(path.read_bytes())
    tensors = {
        name: values.get(name, value.bfloat16()).float().contiguous()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
    engine = transformers.AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    (made,) = sampled_logprobs(in_bfloat16(engine), rows(), [1.0])
    hf_config = copy.deepcopy(read_hf_config(str(folder)))
    if scale_format:
        hf_config["quantization_config"] = FP8_CONFIG | {"scale_fmt": scale_format}
    rollout = SimpleNamespace(dtype="bfloat16", temperature=1.0, uses_sampling_mask=False)
    config = SimpleNamespace(
        rollout=rollout,
        model=SimpleNamespace(lora=None, path=str(folder)),
        push=SimpleNamespace(fp8=True),
        rl=SimpleNamespace(routing_replay=False),
    )
    sequences = [
        SimpleNamespace(
            response=(0, index),
            token_ids=row.token_ids.numpy(),
            is_sampled=row.is_sampled.numpy(),
            logprobs=values_of_row.numpy().astype(np.float32),
            versions=np.full(len(values_of_row), NEWEST),
            advantage=1.0,
            num_sampled=len(values_of_row),
            kept_ids=None,
            experts=None,
        )
        for index, (row, values_of_row) in enumerate(zip(rows(), made, strict=True))
    ]
    response = SimpleNamespace(response=SimpleNamespace(engine="engine-0"))
    return SimpleNamespace(
        step=NEWEST + 1,
        checkpoint_before=folder,
        folder=SimpleNamespace(hf_folder=None),
        config=config,
        run_config=config,
        hf_config=hf_config,
        model=folder,
        sequences=sequences,
        metrics_row={},
        responses={(0, index): response for index in range(len(sequences))},
        loss_fraction=lambda concerned: 1.0,
    )


def checked(step, memory=None):
    policy = FP8EngineLogprobs(StepLogprobs(StepModels(step, memory)))
    (comparison,) = engine_logprobs.compare_logprobs(step, SimpleNamespace(engine_policy=policy))
    return comparison


def weights(folder):
    return {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if is_projection(name)
    }


def pushed(folders, stale_scales=(), power_of_two=False):
    """The projections of an engine, some with the scales of the version before."""
    older = weights(folders[NEWEST - 1])
    return {
        name: quantized(value, older[name] if name in stale_scales else None, power_of_two)
        for name, value in weights(folders[NEWEST]).items()
    }


@pytest.mark.more
@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_an_engine_with_the_pushed_weights_is_equal(folders, tmp_path, scale_format):
    values = pushed(folders, power_of_two=scale_format is not None)
    comparison = checked(logged_step(folders[NEWEST], values, tmp_path, scale_format))
    assert comparison.status == EQUAL, str(comparison)
    assert comparison.distance < 0.02


@pytest.mark.more
@pytest.mark.parametrize("folders", ["Qwen2"], indirect=True)
@pytest.mark.parametrize("memory", [None, 10**9], ids=["whole", "streamed"])
def test_scales_of_the_push_before_are_named(folders, tmp_path, memory):
    values = pushed(folders, stale_scales=weights(folders[NEWEST]))
    comparison = checked(logged_step(folders[NEWEST], values, tmp_path), memory)
    assert comparison.differs, str(comparison)
    assert comparison.reason.startswith(
        "FP8 scales of the push before: engine-0 computes with the 8-bit values of version 2 and "
        "the block scales of version 1"
    )
    assert comparison.remedy.startswith("push.fp8: ") and "engine-0" in comparison.remedy
    assert ("FP8 scales of one tensor" in comparison.reason) == (memory is not None)


@pytest.mark.more
def test_scales_of_a_part_are_named(folders, tmp_path):
    is_dense = "Qwen2" in (folders[0] / "config.json").read_text()
    part = "layers.1.mlp.down_proj." if is_dense else "layers.1.mlp.experts.2."
    names = [name for name in weights(folders[NEWEST]) if part in name]
    values = pushed(folders, stale_scales=names)
    comparison = checked(logged_step(folders[NEWEST], values, tmp_path))
    noun = "model.layers.1.mlp.down_proj.weight" if is_dense else "expert 2 of model.layers.1"
    words = f"FP8 scales of the push before in {noun}: engine-0 computes"
    assert comparison.reason.startswith(words), str(comparison)


@pytest.mark.more
@pytest.mark.parametrize("folders", ["Qwen2"], indirect=True)
@pytest.mark.parametrize("version", [NEWEST, NEWEST - 1])
def test_weights_of_another_push_are_not_taken_for_scales(folders, tmp_path, version):
    """The newest without quantization, and those of the version before."""
    values = weights(folders[version])
    words = "engine-0 computes with weights that are not quantized"
    if version != NEWEST:
        values = {name: quantized(value) for name, value in values.items()}
        words = "engine-0 computed with the weights of version 1, not 2"
        others = load_file(folders[version] / "model.safetensors")
        values |= {n: v.bfloat16() for n, v in others.items() if n not in values}
    comparison = checked(logged_step(folders[NEWEST], values, tmp_path))
    assert comparison.reason.startswith(words), str(comparison)


def test_a_trainer_with_8_bit_products_is_not_checked():
    config = SimpleNamespace(fp8=SimpleNamespace(recipe="blockwise"))
    step = SimpleNamespace(metrics_row={"logprob_diff/mean": 0.5}, run_config=config)
    comparison = trainer_logprobs._compare_trainer(step, None)
    assert comparison.status == NOT_CHECKED and "fp8.recipe: blockwise" in comparison.reason
