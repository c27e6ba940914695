"""`why` on models whose layers are read one by one, against the whole model by transformers."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_folder import write_folder
from safetensors.torch import load_file, save_file
from small_models import MODELS

from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.transformers_model import build_without_weights
from megatron_r1.models.weights.adapter_table import A, B
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import (
    changed_parts,
    checkpoint_tensors,
    routed_experts,
    step_logprobs,
    streamed_model,
    token_logprobs,
)
from megatron_r1.why.policy.changed_parts import ChangedPartLogprobs
from megatron_r1.why.policy.changed_weights import ChangedWeights
from megatron_r1.why.policy.checkpoint_model import read_model
from megatron_r1.why.policy.model_distance import relative_distance, source_distance
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import NotInMemory, StepModels
from megatron_r1.why.policy.streamed_model import StreamedModel, StreamMemory, stream_memory
from megatron_r1.why.policy.tensor_source import AdapterTensors, TensorSource
from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import TokenRow, join_rows
from megatron_r1.why.policy.transformers_adapters import attach_transformers_adapters

AMPLE = StreamMemory(10**9, 1000, reads_experts=False)
TIGHT = StreamMemory(0, 3, reads_experts=True)
"""A batch at a time, its experts one by one, three tokens' logits at once."""
DEEPSEEK, MOE, TIED = "deepseek-plain-noqlora", "qwen3-moe", "qwen-tied"


def folder_of(name: str, path: Path, seed: int | None = None) -> Path:
    """A model's folder, all of its numbers finite; another seed: a few updates away from it."""
    folder = write_folder(path, MODELS[name], torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].nan_to_num_(posinf=1.0)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=draw)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def streamed(folder: Path, hf_files: Path, memory: StreamMemory = AMPLE) -> StreamedModel:
    hf_config = read_hf_config(str(hf_files))
    skeleton = build_without_weights(hf_files, hf_config)
    return StreamedModel(skeleton, TensorSource(folder, hf_config), memory)


def rows_of(lengths=(9, 17, 5, 30)) -> list[TokenRow]:
    draw = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        is_sampled = torch.arange(length) > 2
        count = int(is_sampled.sum())
        ids = torch.randint(60, (length,), generator=draw)
        rows.append(TokenRow(ids, is_sampled, torch.zeros(count), number, 1.0, count))
    return rows


def cut(row: TokenRow) -> TokenRow:
    """A row whose engine kept the sampled token and some others, of another number each."""
    kept = [
        sorted({int(token), *range(61, 62 + number % 3)})
        for number, token in enumerate(row.token_ids[row.is_sampled])
    ]
    counts = torch.tensor([len(ids) for ids in kept])
    return replace(row, kept_ids=(counts, torch.tensor([each for ids in kept for each in ids])))


def assert_equal(values, expected) -> None:
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-6)


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("name", MODELS)
def test_streamed_layers_give_what_the_whole_model_gives(name, convert, tmp_path):
    folder = folder_of(name, tmp_path / "hf")
    status, printed = convert("from-hf", folder, tmp_path / "checkpoint")
    assert status == 0, printed
    rows = rows_of()
    rows += [cut(rows[0]), join_rows(rows[:2], restarts=True), join_rows(rows[:2], restarts=False)]
    model = read_model(tmp_path / "checkpoint", folder)
    expected = sampled_logprobs(model, rows, [1.0, 0.6])
    for source, memory in ((folder, AMPLE), (tmp_path / "checkpoint", TIGHT)):
        found = streamed_model.sampled_logprobs(streamed(source, folder, memory), rows, [1.0, 0.6])
        for values, whole in zip(found, expected, strict=True):
            assert_equal(values, whole)
    assert (expected[0][0] - sampled_logprobs(model, rows_of((9,)), [0.6])[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("memory", [AMPLE, TIGHT])
def test_recorded_experts_are_replayed_and_the_own_are_seen(memory, tmp_path):
    folder = folder_of(DEEPSEEK, tmp_path / "hf")
    whole, model = read_model(folder, folder), streamed(folder, folder, memory)
    own = routed_experts.chosen_experts(whole, rows_of())
    found = streamed_model.chosen_experts(model, rows_of())
    assert list(found) == list(own) and len(own) == 3
    for layer, by_row in own.items():
        assert all(torch.equal(a, b) for a, b in zip(found[layer], by_row, strict=True))
    draw = torch.Generator().manual_seed(2)
    rows = [
        replace(
            row, experts=torch.rand(len(row.token_ids), 3, 8, generator=draw).argsort(-1)[..., :4]
        )
        for row in rows_of()
    ]
    (expected,) = sampled_logprobs(whole, rows)
    (replayed,) = streamed_model.sampled_logprobs(model, rows, [1.0])
    assert_equal(replayed, expected)
    assert (replayed[0] - sampled_logprobs(whole, rows_of())[0][0]).abs().max() > 1e-4


class Counted(TensorSource):
    """Counts what is read, and the bytes of all parameters that live at once."""

    def parameter(self, name, shape, expert=None):
        values = super().parameter(name, shape, expert)
        num_bytes = values.numel() * values.itemsize
        self.names.append(name)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(values, self.free, num_bytes)
        return values

    def free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def counted_pass(name: str, folder: Path, memory: StreamMemory) -> tuple[StreamedModel, Counted]:
    model = streamed(folder, folder, memory)
    source = Counted(folder, read_hf_config(str(folder)))
    source.names, source.live, source.peak = [], 0, 0
    streamed_model.sampled_logprobs(model.with_source(source), rows_of((60, 60, 60)), [1.0])
    return model, source


def num_bytes(tensors) -> int:
    return sum(4 * tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("name", [DEEPSEEK, TIED])
def test_one_layer_is_in_memory_at_a_time(name, tmp_path):
    model, source = counted_pass(name, folder_of(name, tmp_path / "hf"), AMPLE)
    layers = [num_bytes(layer.parameters()) for layer in model.skeleton.model.layers]
    buffers = num_bytes(model.skeleton.model.layers.buffers())
    outer = num_bytes(
        tensor for key, tensor in model.skeleton.named_parameters() if ".layers." not in key
    )
    assert max(layers) <= source.peak <= max(max(layers) + buffers, outer) < sum(layers)
    assert source.live == 0
    assert len(source.names) - len(set(source.names)) == 1  # the norm, with embedding and head
    assert set(source.names) == model.skeleton.state_dict().keys()


def test_experts_that_do_not_fit_are_read_one_by_one(tmp_path):
    folder = folder_of(DEEPSEEK, tmp_path / "hf")
    _, at_once = counted_pass(DEEPSEEK, folder, AMPLE)
    model, alone = counted_pass(DEEPSEEK, folder, TIGHT)
    outer = num_bytes(
        tensor for key, tensor in model.skeleton.named_parameters() if ".layers." not in key
    )
    experts = num_bytes(model.skeleton.model.layers[1].mlp.experts.parameters())
    assert alone.peak <= max(outer, at_once.peak - experts * 6 / 8) and alone.live == 0


def test_a_layer_is_read_once_for_as_many_batches_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(token_logprobs, "TOKENS_AT_ONCE", 60)
    folder = folder_of(TIED, tmp_path / "hf")
    name = "model.layers.0.mlp.down_proj.weight"
    hidden = 60 * MODELS[TIED]["hidden_size"] * 4
    for kept_bytes, num_passes in ((10**9, 1), (hidden // 2, 3)):
        _, source = counted_pass(TIED, folder, StreamMemory(kept_bytes, 100, reads_experts=False))
        assert source.names.count(name) == num_passes


def test_what_a_layer_takes_decides_how_it_is_read(tmp_path):
    folder = folder_of(DEEPSEEK, tmp_path / "hf")
    config = MODELS[DEEPSEEK] | {"num_hidden_layers": 2}
    sizes = {"n_routed_experts": 256, "hidden_size": 512, "moe_intermediate_size": 1024}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    skeleton = build_without_weights(folder, read_hf_config(str(folder)))
    one_expert = 3 * 512 * 1024
    assert not stream_memory(skeleton, 4 * 10**9, 100).reads_experts
    assert stream_memory(skeleton, 256 * one_expert * 4, 100).reads_experts
    with pytest.raises(
        CannotRecompute, match="largest layer without its experts.* 0.0 GB are free"
    ):
        stream_memory(skeleton, 10**6, 100)


def test_adapters_are_added_as_they_are_to_the_whole_model(tmp_path):
    folder = folder_of(DEEPSEEK, tmp_path / "hf")
    model, whole = streamed(folder, folder), read_model(folder, folder)
    experts = [f"model.layers.1.mlp.experts.{expert}.down_proj" for expert in range(8)]
    layers = ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.shared_experts.up_proj"]
    draw, factors = torch.Generator().manual_seed(4), {}
    for layer in layers + experts:
        rows, columns = model.source.shapes[f"{layer}.weight"]
        factors[layer + A] = torch.randn(2, columns, generator=draw)
        factors[layer + B] = torch.randn(rows, 2, generator=draw)
    before = sampled_logprobs(whole, rows_of())[0]
    attach_transformers_adapters(whole, list(factors), factors.__getitem__, 0.5)
    adapted = model.source.with_adapters(
        AdapterTensors(frozenset(factors), factors.__getitem__, 0.5)
    )
    found = streamed_model.sampled_logprobs(model.with_source(adapted), rows_of(), [1.0])[0]
    assert_equal(found, sampled_logprobs(whole, rows_of())[0])
    assert (found[0] - before[0]).abs().max() > 1e-2


def test_a_folder_of_another_model_is_refused(tmp_path):
    folder = folder_of(TIED, tmp_path / "hf")
    model = streamed(folder, folder)
    model.source.shapes.pop("model.norm.weight")
    with pytest.raises(CannotRecompute, match=r"0 of the .* values of model.norm.weight"):
        streamed_model.sampled_logprobs(model, rows_of(), [1.0])
    wide = streamed(folder, folder_of("qwen-untied", tmp_path / "untied"))
    with pytest.raises(CannotRecompute, match=r"has no lm_head.weight"):
        wide.with_source(TensorSource(folder, wide.source._hf_config)).head()


class VersionModels(StepModels):
    """The models of two folders, whole or streamed."""

    def __init__(self, before: Path, older: Path, *, is_streamed: bool) -> None:
        self._folder, self._streams = before, is_streamed
        self.rows = rows_of()
        model = SimpleNamespace(lora=None)
        self.step = SimpleNamespace(
            folder=older,
            run_config=SimpleNamespace(model=model),
            config=SimpleNamespace(rollout=SimpleNamespace(temperature=1.0)),
            hf_config=read_hf_config(str(before)),
        )
        self.policy = self.model(before)

    def model(self, source, prefix=""):
        return (streamed if self._streams else read_model)(source, self._folder)

    def tensors(self, source, prefix=""):
        return TensorSource(source, self.step.hf_config)


class Versions(StepLogprobs):
    """Log-probabilities by the models of two folders, whole or streamed."""

    def __init__(self, before: Path, older: Path, *, is_streamed: bool) -> None:
        super().__init__(VersionModels(before, older, is_streamed=is_streamed))
        self.computed_sequences = list(range(len(self.models.rows)))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (MOE, lambda made: made.logprobs_after(1)),
        (
            MOE,
            lambda made: ChangedPartLogprobs(made).logprobs_with_old_expert(
                "model.layers.0.mlp.experts", 2, 1
            ),
        ),
        (DEEPSEEK, lambda made: ChangedPartLogprobs(made).logprobs_without_router_bias()),
        (TIED, lambda made: ChangedPartLogprobs(made).logprobs_with_head_apart()),
        (TIED, lambda made: made.packed_logprobs([[0, 2], [3], [1]], restarts=False)),
        (TIED, lambda made: made.shifted_logprobs()),
    ],
)
def test_other_weights_and_rows_give_what_they_give_whole_models(name, make, tmp_path, monkeypatch):
    for module in (step_logprobs, changed_parts):
        monkeypatch.setattr(module, "weights_after", lambda folder, config, step: folder)
    folders = folder_of(name, tmp_path / "hf"), folder_of(name, tmp_path / "older", seed=5)
    found, expected = (Versions(*folders, is_streamed=each) for each in (True, False))
    values = make(found)
    assert_equal(values, make(expected))
    changes = [abs(a[-1] - b[-1]) for a, b in zip(values, expected.old_logprobs, strict=True)]
    assert max(changes) > 1e-5


def test_what_needs_a_whole_model_says_so(tmp_path):
    folder = folder_of(MOE, tmp_path / "hf")
    made = Versions(folder, folder, is_streamed=True)
    changed_parts, layer = ChangedPartLogprobs(made), "model.layers.0.mlp.experts"
    assert changed_parts.num_experts(layer) == MODELS[MOE]["num_experts"]
    for needs_whole in (
        lambda: ChangedWeights(made),
        changed_parts.bfloat16_logprobs,
        lambda: changed_parts.logprobs_with_experts(layer, {0: 1, 1: 0}),
    ):
        with pytest.raises(NotInMemory, match="does not fit into memory"):
            needs_whole()


def test_the_change_from_a_folder_to_a_checkpoint_is_that_of_their_tensors(convert, tmp_path):
    folders = folder_of(MOE, tmp_path / "hf"), folder_of(MOE, tmp_path / "older", seed=5)
    status, printed = convert("from-hf", folders[1], tmp_path / "checkpoint")
    assert status == 0, printed
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    gaps = {name: after[name].double() - before[name].double() for name in before}
    largest = {name: float(gap.abs().max()) for name, gap in gaps.items()}
    norm = sum(float(gap.square().sum()) for gap in gaps.values()) ** 0.5
    found = checkpoint_tensors.find_largest_change(
        folders[0], tmp_path / "checkpoint", folders[0], False
    )
    worst = max(largest, key=lambda name: largest[name])
    assert found == (worst, pytest.approx(largest[worst]), pytest.approx(norm))


def test_the_distance_of_two_folders_is_that_of_their_models(tmp_path):
    folders = folder_of(MOE, tmp_path / "hf"), folder_of(MOE, tmp_path / "older", seed=5)
    hf_config = read_hf_config(str(folders[0]))
    found = source_distance(*(TensorSource(folder, hf_config) for folder in folders))
    expected = relative_distance(*(read_model(folder, folder) for folder in folders))
    assert found == pytest.approx(expected, rel=1e-6) and found > 0.1
