"""What is loaded, which attention Transformer Engine takes for the flagship's shapes and why, and
whether it and a kernel of DeepGEMM compute."""

import os
import time

import pytest
import torch
import trainer_layers
from gpu_miniatures import RECIPE, device_kind

from megatron_r1 import models
from megatron_r1.config import load_recipe
from megatron_r1.models.attention_choice import (
    attention_parameters,
    backend_variables,
    choose_attention,
    longest_sample,
)
from megatron_r1.models.loaded_libraries import loaded_libraries

PREFIX = 512
"""Tokens whose results fp32 gives, too: the others have no part in them."""
BF16_ERROR = 0.02


def parameters_of(config, hf_config):
    model = models.transformer_config(hf_config, config)
    return attention_parameters(config, model, longest_sample(config, hf_config))


def of_flagship(monkeypatch):
    monkeypatch.chdir(RECIPE.parents[2])  # the recipe names its model so
    config = load_recipe(RECIPE)
    return parameters_of(config, models.read_hf_config(config.model.path, config.model.head))


def record_libraries(record_figures):
    libraries = loaded_libraries()
    record_figures({f"{each.name} {each.version}": each.file for each in libraries})
    return [each.name for each in libraries]


@pytest.mark.slow
def test_attention_is_cudnns(record_figures, monkeypatch, check_folder):
    pytest.importorskip("transformer_engine.pytorch", reason="make setup-cuda", exc_type=OSError)
    device = torch.cuda.get_device_properties(0)
    gib = f"{device.total_memory / 2**30:.1f} GiB"
    record_figures({"GPU": f"{device.name}, sm_{device.major}{device.minor}, {gib}"})
    record_libraries(record_figures)
    config, _, hf_config = trainer_layers.settings("one", check_folder)
    shapes = {"miniature": parameters_of(config, hf_config), "flagship": of_flagship(monkeypatch)}
    choices = {
        f"attention, {name}, training {each['is_training']}": choose_attention(each)
        for name, passes in shapes.items()
        for each in passes
    }
    record_figures({name: ": ".join(filter(None, choice)) for name, choice in choices.items()})
    names = record_libraries(record_figures)  # now with NVRTC, which cuDNN loads for the answer
    assert len(set(names)) == len(names), "a library is loaded from two files"
    assert {choice.backend for choice in choices.values()} == {"fused"}, choices


def results_of(attend, inputs, d_out):
    out = attend(*inputs)
    return [tensor.float() for tensor in (out, *torch.autograd.grad(out, inputs, d_out))]


def in_fp32(query, key, value, scale):
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    later = torch.ones(PREFIX, PREFIX, dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.slow
def test_attention_at_the_flagships_shape_is_that_of_fp32(record_figures, monkeypatch):
    """All tokens of a context rank as one sample. With plain products the scores alone would take
    68 GiB: only cuDNN's is allowed."""
    if device_kind() != "gpu":
        pytest.skip("a null GPU computes no attention")
    for name, value in backend_variables("fused").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NVTE_FUSED_ATTN_CACHE_DEBUG", "1")
    from transformer_engine.pytorch import DotProductAttention

    shape, *_ = of_flagship(monkeypatch)
    tokens, heads, scale = (shape[key] for key in ("num_tokens_q", "num_heads", "softmax_scale"))
    sizes = shape["head_dim_qk"], shape["head_dim_v"]
    attention = DotProductAttention(heads, sizes, softmax_scale=scale, qkv_format="thd")
    ends = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    segments = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    segments |= {"max_seqlen_q": tokens, "max_seqlen_kv": tokens}

    def attend(*inputs):
        return attention(*inputs, attn_mask_type="padding_causal", **segments)

    torch.manual_seed(0)
    inputs = [
        torch.randn(tokens, heads, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for size in (sizes[0], *sizes)
    ]
    d_out = torch.randn(tokens, heads * sizes[1], device="cuda", dtype=torch.bfloat16)
    d_out[PREFIX:] = 0
    start = time.perf_counter()
    ours = results_of(attend, inputs, d_out)
    torch.cuda.synchronize()
    record_figures({"s, the first attention": time.perf_counter() - start})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    results_of(attend, inputs, d_out)
    end.record()
    torch.cuda.synchronize()
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    record_figures({"ms, attention and its gradient": begin.elapsed_time(end), "GiB of it": gib})
    short = [tensor[:PREFIX].detach().float().requires_grad_() for tensor in inputs]
    expected = results_of(lambda *each: in_fp32(*each, scale), short, d_out[:PREFIX].float())
    for name, our, theirs in zip(("out", "dq", "dk", "dv"), ours, expected, strict=True):
        apart = ((our[:PREFIX] - theirs).norm() / theirs.norm()).item()
        record_figures({f"{name}, from fp32": apart})
        assert apart < BF16_ERROR, name


@pytest.mark.slow
def test_deepgemm_compiles_and_multiplies(record_figures):
    deep_gemm = pytest.importorskip("vllm.third_party.deep_gemm", reason="no vLLM for CUDA")
    record_figures({"CUDA_HOME": os.environ.get("CUDA_HOME", "not set")})
    torch.manual_seed(0)
    left, right = (
        torch.randn(rows, 512, device="cuda").to(torch.float8_e4m3fn) for rows in (128, 256)
    )
    scales = torch.ones(128, 4, device="cuda"), torch.ones(2, 4, device="cuda")
    out = torch.empty(128, 256, device="cuda", dtype=torch.bfloat16)
    start = time.perf_counter()
    pairs = (left, scales[0]), (right, scales[1])
    deep_gemm.fp8_gemm_nt(*pairs, out, disable_ue8m0_cast=True)
    torch.cuda.synchronize()
    record_figures({"s, a kernel of DeepGEMM": time.perf_counter() - start})
    if device_kind() == "gpu":
        expected = left.float() @ right.float().T
        assert (out.float() - expected).norm() < 0.01 * expected.norm()
