"""The calls of attention before the first step: one for each graph that cuDNN compiles."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_r1.config import load_recipe, parse_recipe
from megatron_r1.trainer import first_steps
from megatron_r1.trainer.first_steps import call_kernels, called_tokens, token_buckets
from megatron_r1.trainer.token_split import TokenSplit

R1_ZERO = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def test_buckets_are_powers_of_two_and_then_steps():
    assert token_buckets(100_000) == [*(2**n for n in range(10, 16)), 65536, 98304, 131072]
    assert token_buckets(1024) == [1024] and token_buckets(1025) == [1024, 2048]


def test_a_rank_of_r1_zero_calls_with_its_half_of_every_bucket():
    # Samples of 67,584 tokens from step 513 on: more than 32,768 on each of two context ranks.
    sizes = called_tokens(load_recipe(R1_ZERO), {"max_position_embeddings": 163_840})
    assert sizes == [2048, 4096, 8192, 16384, 32768, 65536, 67584]


class Core(nn.Module):
    """What Transformer Engine's module says of itself."""

    num_attention_heads, tp_size, num_gqa_groups_per_partition = 8, 2, 1
    hidden_size_per_attention_head_k, hidden_size_per_attention_head_v = 6, 4

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window_size, self.calls = window, []

    def forward(self, query, key, value, mask, attn_mask_type, *, packed_seq_params):
        shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
        borders = packed_seq_params.cu_seqlens_q
        self.calls.append((self.training, torch.is_grad_enabled(), shapes, int(borders[-1])))
        assert len(borders) - 1 <= 32, "32 samples share a graph"
        return query.sum() + key.sum() + value.sum()


def trainer_of(cores: list[Core], context: int) -> SimpleNamespace:
    layers = nn.ModuleList()
    for core in cores:
        layer = nn.Module()
        layer.core_attention, layer.attn_mask_type = core, "causal"
        layers.append(layer)
    layout = {"tokens_per_microbatch": 1500, "context": context}
    recipe = {"run": {"folder": "x"}, "parallel": layout, "rollout": {"max_response_tokens": 9}}
    return SimpleNamespace(
        config=parse_recipe(recipe),
        hf_config={"max_position_embeddings": 64},
        model_chunks=[layers],
        rollout=SimpleNamespace(split=TokenSplit(context_size=context)),
        transformer_config=SimpleNamespace(params_dtype=torch.float32),
        grid_position=SimpleNamespace(is_last_stage=False, rank=0),
    )


@pytest.mark.parametrize("context", [1, 2])
def test_each_kind_of_attention_is_called_once_a_bucket(monkeypatch, capsys, context):
    cores = [Core(None), Core(128), Core(None)]
    trainer = trainer_of(cores, context)
    call_kernels(trainer)
    assert not any(core.calls for core in cores), "without a GPU nothing is called"

    monkeypatch.setattr(first_steps.platform, "has_gpu", lambda: True)
    call_kernels(trainer)
    part = {1: 1504, 2: 768}[context]  # 16 samples, each padded to a multiple of 2 x context
    sizes = [1024, part] if context == 1 else [part]
    calls = [
        (training, training, [(size, 4, 6), (size, 1, 6), (size, 1, 4)], size * context)
        for size in sizes
        for training in (True, False)
    ]
    assert [core.calls for core in cores] == [calls, calls, []]
    assert all(core.training for core in cores)
    assert "1,500 tokens" in capsys.readouterr().out
