"""`why` on engines that have other weights than the checkpoint."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_expert_replay import random_row

from megatron_r1.why.checks import engine_causes, tensor_causes, tensor_groups
from megatron_r1.why.checks.engine_gaps import EngineGaps
from megatron_r1.why.policy import changed_weights, step_logprobs
from megatron_r1.why.policy.changed_weights import merged_copy
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import StepModels
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import TokenRow

NEWEST = 2
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def dense_model(seed: int = 3, tie: bool = True):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=23, tie_word_embeddings=tie, architectures=["Qwen2ForCausalLM"], **SIZES, **HEADS
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def moved(model, seed: int):
    """Return a model a few updates before another."""
    torch.manual_seed(seed)
    older = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in older.parameters():
            parameter += 0.003 * torch.randn_like(parameter)
    return older


class Models(StepModels):
    """The models of some versions, of which `engine` made the log-probabilities of the log."""

    def __init__(self, models, engine, rows: list[TokenRow], temperature: float) -> None:
        self._models_by_version = models
        self.rows, self.policy = rows, models[NEWEST]
        (made,) = sampled_logprobs(engine, rows, [temperature])
        self.sequences = [
            SimpleNamespace(
                response=(0, index),
                logprobs=values.numpy(),
                versions=np.full(len(values), NEWEST),
                advantage=1.0,
            )
            for index, values in enumerate(made)
        ]
        settings = SimpleNamespace(dtype="float32", temperature=temperature)
        config = SimpleNamespace(rollout=settings, model=SimpleNamespace(lora=None))
        response = SimpleNamespace(response=SimpleNamespace(engine="engine-0"))
        self.step = SimpleNamespace(
            step=NEWEST + 1,
            config=config,
            run_config=config,
            folder=None,
            hf_config={"vocab_size": 23},
            metrics_row={},
            responses={(0, index): response for index in range(len(rows))},
        )

    def model(self, source, prefix=""):
        return self._models_by_version[int(source.name)]


class Recomputed(StepLogprobs):
    """Log-probabilities of rows by the model before the step; `engine` made those of the log."""

    def __init__(self, models, engine, rows: list[TokenRow], temperature: float = 1.0) -> None:
        super().__init__(Models(models, engine, rows, temperature))
        self.computed_sequences = list(range(len(rows)))


@pytest.fixture
def kept_versions(monkeypatch):
    for module in (changed_weights, step_logprobs):
        monkeypatch.setattr(
            module,
            "weights_after",
            lambda folder, config, step: Path(str(step)) if step in (0, 1, NEWEST) else None,
        )


def rows_of(count: int = 12, length: int = 20) -> list[TokenRow]:
    torch.manual_seed(1)
    return [random_row(length) for _ in range(count)]


def versions(tie: bool = True) -> dict:
    newest = dense_model(tie=tie)
    return {0: moved(newest, 1), 1: moved(newest, 2), NEWEST: newest}


def with_tensors(model, changed: dict):
    """Return a merged copy with some tensors changed."""
    engine = merged_copy(model)
    with torch.no_grad():
        for name, value in changed.items():
            engine.state_dict()[name].copy_(value)
    return engine


def found(models, engine):
    recomputed = Recomputed(models, engine, rows_of())
    gaps = EngineGaps(recomputed.step, recomputed)
    return engine_causes.stale_weights(gaps), tensor_causes.departing_tensor(gaps)


@pytest.mark.first_cases(2)
@pytest.mark.parametrize(
    ("names", "version", "words"),
    [
        (["model.layers.1.mlp.down_proj.weight"], 1, "model.layers.1.mlp.down_proj.weight"),
        (["model.norm.weight"], 0, "model.norm.weight"),
        (["lm_head.weight"], 1, "lm_head.weight"),
        (["model.embed_tokens.weight"], 1, "model.embed_tokens.weight"),
        (
            ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"],
            1,
            "mlp.gate_proj, up_proj of layer 0",
        ),
        (
            [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)],
            0,
            "self_attn.o_proj.weight of all layers",
        ),
        (
            ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"],
            1,
            "model.embed_tokens.weight and model.norm.weight and lm_head.weight",
        ),
        ([], 0, "layer 2"),
    ],
)
def test_stale_tensors_are_named(kept_versions, names, version, words):
    models = versions()
    old = models[version].state_dict()
    names = names or [name for name in old if "layers.2." in name]
    engine = with_tensors(models[NEWEST], {name: old[name] for name in names})
    whole, explained = found(models, engine)
    assert whole is None  # a smaller difference is not the version's
    assert explained.reason.startswith(f"{words} in engine-0 is of version {version}, not 2")
    assert "push of that tensor" in explained.remedy


def test_stale_tensors_that_cannot_be_told_apart_are_all_named(kept_versions):
    models = versions()
    old, newest = models[1].state_dict(), models[NEWEST].state_dict()
    name, bias = (f"model.layers.1.self_attn.q_proj.{part}" for part in ("weight", "bias"))
    old[bias].copy_(newest[bias] * (1 + 1e-6))
    _, explained = found(models, with_tensors(models[NEWEST], {name: old[name]}))
    nouns = f"{name}, or self_attn.q_proj of layer 1"
    assert explained.reason.startswith(f"{nouns} in engine-0 is of version 1, not 2")


@pytest.mark.more
def test_tensors_of_two_places_are_not_named(kept_versions):
    models = versions()
    old = models[1].state_dict()
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    _, explained = found(models, with_tensors(models[NEWEST], {name: old[name] for name in names}))
    assert explained is None


def test_a_whole_version_is_named(kept_versions):
    models = versions()
    explained, _ = found(models, models[1])
    assert "engine-0 computed with the weights of version 1" in explained.reason


@pytest.mark.more
@pytest.mark.parametrize(
    "noun", ["gate_proj and up_proj of layer 1", "k_proj and v_proj of all", "layers 0 and 2"]
)
def test_exchanged_tensors_are_named(kept_versions, noun):
    models = versions()
    tensors = dict(merged_copy(models[NEWEST]).state_dict())
    values = next(
        sources for name, sources in tensor_groups.tensor_exchanges(tensors) if noun in name
    )
    _, explained = found(models, with_tensors(models[NEWEST], values))
    assert noun in explained.reason and "are exchanged in engine-0" in explained.reason


def test_another_function_is_no_tensor(kept_versions):
    models = versions()
    _, explained = found(models, moved(models[NEWEST], 7))
    assert explained is None
