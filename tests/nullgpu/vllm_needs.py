"""Compares what vLLM's CUDA model classes load with what the weight tables predict, and swaps a
model's weights on the null GPU: `vllm_needs.py FOLDER CASE…`. Prints a line of JSON for each case.
The first case has experts, so that vLLM makes a group for them. With the word `planted` among the
cases, nothing puts back what quantization methods keep of their layers
(`engines.plugin.layer_reload`).

Sizes are multiples of what the kernels want (128 for FP8 blocks, 512 + 64 for MLA)."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import tiny_models
import torch
from host_compute import on_host
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from megatron_r1.base.processes import children
from megatron_r1.engines.plugin import layer_reload, register
from megatron_r1.engines.plugin.layer_reload import SavedKernelState
from megatron_r1.engines.plugin.loader_copies import record_copies
from megatron_r1.engines.plugin.memory_layout import lay_out
from megatron_r1.models.hf_config_file import implied_settings
from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.models.weights.formats import published_layout as fp8
from megatron_r1.push.matching import EngineLayout
from megatron_r1.push.matching.layouts import Coordinate
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.tensors import pushed_tensors

SIZES = {
    "vocab_size": 1030,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    **tiny_models.PLAIN_ROPE,
    **SIZES,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
QWEN = {**tiny_models.QWEN, **SIZES, "num_attention_heads": 8}
LLAMA = QWEN | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
}
FAMILIES = ("QWEN3", "QWEN3_MOE", "GLM")
CASES = {
    "deepseek": (DEEPSEEK, False),
    "deepseek-without-q-lora": (DEEPSEEK | {"q_lora_rank": None}, False),
    "deepseek-fp8": (DEEPSEEK, True),
    "deepseek-fp8-deep_gemm": (DEEPSEEK, True),
    "qwen": (QWEN, False),
    "qwen-fp8": (QWEN, True),
    "llama": (LLAMA, False),
    **{name: (getattr(tiny_models, name), False) for name in FAMILIES},
}


def engine_config(folder: Path, hf_config: dict, is_fp8: bool, moe_backend: str):
    """Return vLLM's configuration of a model folder that is written here."""
    folder.mkdir(parents=True)
    quantized = {"quantization_config": fp8.FP8_CONFIG} if is_fp8 else {}
    (folder / "config.json").write_text(json.dumps(hf_config | quantized))
    # What an engine is given where config.json leaves it to the architecture.
    arguments = {
        "hf_overrides": implied_settings(hf_config),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enforce_eager": True,
        "moe_backend": moe_backend,
    }
    return EngineArgs(
        model=str(folder), dtype="bfloat16", max_model_len=256, **arguments
    ).create_engine_config()


def compare(hf_config: dict, is_fp8: bool, config, model) -> dict:
    """Return what the recorder and the prediction differ in, and what a swap leaves changed."""
    placed, table = lay_out(record_copies([model], pushed_tensors(hf_config, fp8=is_fp8)))
    recorded: dict[str, int] = {}
    for slot in table.slots:
        elements = slot.height * slot.width
        recorded[slot.name] = recorded.get(slot.name, 0) + elements
    scales = {name for name in recorded if fp8.is_scale(name)}
    predicted = {
        tensor.name: region.num_elements
        for tensor, region in PredictedSharding(hf_config, EngineLayout()).regions_of(
            Coordinate(0, 0, 0)
        )
    }
    wrong = [
        f"{name}: recorded {recorded.get(name)}, predicted {predicted.get(name)}"
        for name in sorted(recorded.keys() - scales | predicted.keys())
        if recorded.get(name) != predicted.get(name)
    ]
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    memory = torch.randint(0, 60, (table.num_bytes,), dtype=torch.uint8)
    on_gpu = memory.cuda()
    layer_reload.load_layers(model, placed, on_gpu)
    on_gpu.untyped_storage().resize_(0)  # as a receiver does between pushes
    layer_reload.recompute_shared_tensors(model, config.model_config)
    after = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    moved = [name for name in before if before[name] != after.get(name)]
    norm = dict(model.named_parameters())["model.norm.weight"].cpu()
    received = next(at for at in placed if at.parameter.title.endswith("model.norm.weight"))
    return {
        "tensors": len(predicted),
        "scales": len(scales),
        "wrong": wrong,
        "moved": moved,
        "norm arrived": torch.equal(norm, received.value(memory)),
        **kept_scales(model),
    }


def kept_scales(model) -> dict:
    """Return the number of scales that kernels of experts keep, and those in freed memory.

    The storage of the latter has no bytes left, or it reads as NaN, as what torch does not keep
    when it is freed (PYTORCH_NO_CUDA_MEMORY_CACHING)."""
    torch.cuda.synchronize()
    found = {
        f"{title}.{name}": getattr(config, name)
        for title, layer in model.named_modules()
        if (config := getattr(getattr(layer, "quant_method", None), "moe_quant_config", None))
        for name in ("w1_scale", "w2_scale")
        if getattr(config, name) is not None
    }
    freed = [
        name
        for name, scale in found.items()
        if not scale.untyped_storage().nbytes() or on_host(scale).isnan().any()
    ]
    return {"kept scales": len(found), "freed scales": freed}


def main() -> None:
    folder, *names = sys.argv[1:]
    if "planted" in names:
        names.remove("planted")
        SavedKernelState.restore = lambda state, in_use: None
    register()
    torch.cuda.set_device(0)
    groups_exist = False
    for name in names:
        published, is_fp8 = CASES[name]
        hf_config = resolve_aliases(published)
        backend = "deep_gemm" if name.endswith("deep_gemm") else "auto"
        config = engine_config(Path(folder) / name, published, is_fp8, backend)
        with set_current_vllm_config(config):
            if not groups_exist:
                address = f"tcp://127.0.0.1:{children.free_port()}"
                init_distributed_environment(1, 0, address, 0, "nccl")
                initialize_model_parallel(1, 1)
                groups_exist = True
            model = get_model(vllm_config=config)
            assert all(parameter.is_cuda for parameter in model.parameters())
            print(
                json.dumps({"case": name, **compare(hf_config, is_fp8, config, model)}), flush=True
            )


if __name__ == "__main__":
    main()
