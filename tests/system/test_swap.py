"""After a swap nothing that vLLM keeps lies in the receive buffer, which is freed or reused."""

import functools
import gc
import json
import types

import pytest
import tiny_models
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from megatron_r1.base.processes import children
from megatron_r1.engines.plugin import layer_reload
from megatron_r1.engines.plugin.loader_copies import CheckpointParameter, LoaderCopy, record_copies
from megatron_r1.engines.plugin.memory_layout import lay_out
from megatron_r1.models.hf_config_file import implied_settings
from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.models.weights import hf_tensors

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 2, 256, 128
NO_GROUPS = FusedMoEParallelConfig(
    **{f"{axis}_size": 1 for axis in ("tp", "pcp", "dp", "ep", "sp")},
    **{f"{axis}_rank": 0 for axis in ("tp", "pcp", "dp", "ep")},
    use_ep=False,
    all2all_backend="allgather_reducescatter",
    enable_eplb=False,
)
SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")


class Experts(torch.nn.Module):
    """What vLLM's FP8 method reads of its `RoutedExperts`, which needs process groups."""

    expert_map = None

    def __init__(self):
        super().__init__()
        self.moe_config = FusedMoEConfig(
            num_experts=NUM_EXPERTS,
            experts_per_token=1,
            hidden_dim=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_local_experts=NUM_EXPERTS,
            num_logical_experts=NUM_EXPERTS,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.TopK,
            moe_parallel_config=NO_GROUPS,
            in_dtype=torch.bfloat16,
            intermediate_size_per_partition=INTERMEDIATE,
        )
        config = fp8.Fp8Config(True, "dynamic", weight_block_size=[128, 128])
        self.quant_method = fp8.Fp8MoEMethod(config, self)
        self.quant_method.create_weights(self, NUM_EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)

    def _expert_routing_tables(self):
        return None


class KeepsItsOwn(UnquantizedLinearMethod):
    """Keeps views of the weight, in objects that it makes anew and in one that it keeps, a value
    computed from it, and a workspace of the layer's."""

    def __init__(self):
        super().__init__()
        self.handle = types.SimpleNamespace()

    def process_weights_after_loading(self, layer):
        self.kernel = types.SimpleNamespace(views=[layer.weight[1:]], double=2 * layer.weight)
        self.handle.locks = layer.weight[:1]
        first = layer.weight[0]
        self.handle.call = functools.partial(lambda x, y: x @ y @ first, layer.weight)
        layer.workspace = layer.weight.flatten()[:4]


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 16), requires_grad=False)
        self.quant_method = KeepsItsOwn()


@pytest.fixture
def model(monkeypatch):
    """A model whose weights have been loaded once, zeros; its FP8 kernel is a GPU's."""
    backend = Fp8MoeBackend.TRITON, TritonExperts
    monkeypatch.setattr(fp8, "select_fp8_moe_backend", lambda **named: backend)
    monkeypatch.setattr(parallel_state, "_TP", types.SimpleNamespace(world_size=1))
    with set_current_vllm_config(VllmConfig()):
        model = torch.nn.Sequential(Experts(), Linear())
        record_metadata_for_reloading(model)
        for layer in model:
            for parameter in layer.parameters():
                parameter.data.zero_()
            layer.quant_method.process_weights_after_loading(layer)
        yield model


@pytest.fixture
def groups():
    """vLLM's process groups, of this process alone."""
    address = f"tcp://127.0.0.1:{children.free_port()}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def received(model):
    """Return the parameters' places in a receive buffer, and the buffer, of ones."""
    copies = {}
    for layer in model:
        for name, tensor in layer.named_parameters():
            shape, strides = tuple(tensor.shape), tensor.stride()
            parameter = CheckpointParameter(layer, name, name, shape, strides, tensor.dtype, False)
            columns = shape[-1]
            whole = (0, tensor.numel() // columns, 0, columns)
            copies[parameter] = [LoaderCopy(name, whole, 0, columns)]
    placed, table = lay_out(copies)
    memory = torch.zeros(table.num_bytes, dtype=torch.uint8)
    for at in placed:
        at.value(memory).fill_(1)
    return placed, memory


def reachable_tensors(root):
    """Return all tensors that a model refers to: parameters, and those of methods, kernels, their
    settings and closures."""
    found, seen, left = [], set(), [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, types.ModuleType | type):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        if isinstance(each, types.FunctionType):  # not its globals, which are all of vLLM
            left += [*(each.__closure__ or ()), each.__defaults__]
        else:
            left += gc.get_referents(each)
    return found


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta}


def test_nothing_that_is_kept_lies_in_the_receive_buffer(model):
    placed, memory = received(model)
    assert storages([placed[0].value(memory)]) == storages([memory])
    layer_reload.load_layers(model, placed, memory)
    tensors = reachable_tensors(model)
    assert {id(parameter) for parameter in model.parameters()} <= {id(each) for each in tensors}
    assert storages([memory]).isdisjoint(storages(tensors))


def test_kernels_compute_with_the_new_values_at_the_old_addresses(model):
    """CUDA graphs have captured the addresses."""
    experts, linear = model
    method, linear_method = experts.quant_method, linear.quant_method
    kernel, workspace = method.moe_kernel, linear.workspace
    before = storages(reachable_tensors(model))
    placed, memory = received(model)
    layer_reload.load_layers(model, placed, memory)
    memory.fill_(77)  # the next push arrives
    assert storages(reachable_tensors(model)) == before
    assert method.moe_kernel is kernel and linear.workspace is workspace
    config = kernel.impl.fused_experts.quant_config
    for scale, name in zip((config.w1_scale, config.w2_scale), SCALES, strict=True):
        assert scale.data_ptr() == getattr(experts, name).data_ptr()
        assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(linear.weight, torch.ones(8, 16))
    assert torch.equal(linear_method.kernel.views[0], torch.ones(7, 16))
    assert torch.equal(linear_method.kernel.double, torch.full((8, 16), 2.0))
    assert torch.equal(linear_method.handle.locks, torch.ones(1, 16))
    assert torch.equal(linear_method.handle.call(torch.ones(16, 16)), torch.full((8,), 256.0))


def test_experts_that_have_computed_are_loaded_too(model):
    """They keep a value of their configuration that new ones have not been asked for."""
    config = model[0].quant_method.moe_kernel.impl.fused_experts.quant_config
    fresh = vars(config).keys() - {"_ocp_mx_scheme"}
    assert config.ocp_mx_scheme is None and vars(config).keys() > fresh
    placed, memory = received(model)
    layer_reload.load_layers(model, placed, memory)
    assert torch.equal(config.w1_scale, torch.ones_like(config.w1_scale))


def test_a_number_computed_from_weights_is_refused(model):
    """The kernel of the first loading would go on with the old number."""
    linear = model[1]

    class KeepsANumber(KeepsItsOwn):
        def process_weights_after_loading(self, layer):
            self.scale = layer.weight.sum().item()

    linear.quant_method = KeepsANumber()
    linear.quant_method.process_weights_after_loading(linear)
    placed, memory = received(model)
    with pytest.raises(ValueError, match=r"scale: 0\.0 became 128\.0"):
        layer_reload.load_layers(model, placed, memory)


@pytest.mark.parametrize("name", ["DEEPSEEK", "GPT_OSS"])
def test_nothing_of_a_whole_model_lies_in_the_receive_buffer(name, tmp_path, monkeypatch, groups):
    """Latent attention's absorbed weights, packed experts and matrices, biases of experts."""
    hf_config = getattr(tiny_models, name)
    hf_config = {**hf_config, **implied_settings(hf_config)}
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is no accelerator
    options = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True}
    config = EngineArgs(
        model=str(tmp_path), dtype="bfloat16", max_model_len=64, **options
    ).create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        tensors = hf_tensors(resolve_aliases(hf_config)).items()
        placed, table = lay_out(
            record_copies([model], [(name, shape) for name, (shape, _) in tensors])
        )
        memory = torch.zeros(table.num_bytes, dtype=torch.uint8)
        for _ in range(2):  # of the second the first left its traces
            layer_reload.load_layers(model, placed, memory)
            layer_reload.recompute_shared_tensors(model, config.model_config)
            assert storages([memory]).isdisjoint(storages(reachable_tensors(model)))
