"""The lines of vLLM that docstrings of the plugin cite, as reasons of its patches, still stand."""

import importlib.util
import re
from pathlib import Path

import pytest

VLLM = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
PLUGIN = Path(__file__).parents[2] / "megatron_r1/vllm_plugin"
LAYERS = "model_executor/layers"
MODELS = "model_executor/models"
COMMUNICATORS = "distributed/device_communicators"

LINES = {
    "config/speculative.py:1056": "hf_config.update(",
    "config/vllm.py:1135": "def _verify_aux_output_compatibility(",
    f"{COMMUNICATORS}/base_device_communicator.py:290": "def all_gatherv(",
    f"{COMMUNICATORS}/base_device_communicator.py:331": "def reduce_scatterv(",
    f"{COMMUNICATORS}/shm_broadcast.py:208": "sched_yield()",
    f"{COMMUNICATORS}/shm_broadcast.py:741": "sched_yield()",
    "model_executor/kernels/linear/scaled_mm/cpu.py:236": "def is_supported(",
    "model_executor/kernels/linear/scaled_mm/cpu.py:306": "def apply_weights(",
    f"{LAYERS}/fused_moe/experts/cpu_moe.py:269": "def apply(",
    f"{LAYERS}/fused_moe/experts/cpu_moe.py:456": "def _supports_current_device(",
    f"{LAYERS}/fused_moe/experts/cpu_moe.py:526": "def apply(",
    f"{LAYERS}/fused_moe/unquantized_fused_moe_method.py:166": "def _setup_kernel(",
    f"{LAYERS}/rotary_embedding/base.py:298": "def forward_cpu(",
    f"{LAYERS}/utils.py:582": "ops._supports_onednn",
    f"{LAYERS}/vocab_parallel_embedding.py:67": "def process_weights_after_loading(",
    f"{MODELS}/deepseek_v2.py:501": "self.q_a_layernorm = RMSNorm(",
    f"{MODELS}/deepseek_v2.py:525": "self.kv_a_layernorm = RMSNorm(",
    f"{MODELS}/deepseek_v2.py:1082": "self.q_a_layernorm = RMSNorm(",
    f"{MODELS}/deepseek_v2.py:1098": "self.kv_a_layernorm = RMSNorm(",
    f"{MODELS}/deepseek_v2.py:1363": "hidden_states.shape[0] != full_num_tokens",
    f"{MODELS}/deepseek_v2.py:1402": "if not input_is_sequence_parallel:",
    f"{MODELS}/deepseek_v2.py:1552": "hidden_states.shape[0] != positions.shape[0]",
    f"{MODELS}/deepseek_v2.py:1578": "hidden_states.shape[0] != positions.shape[0]",
    f"{MODELS}/gpt_oss.py:1167": "def _load_weights_other(",
    "platforms/cpu.py:156": "backend != AttentionBackendEnum.CPU_MLA",
    "platforms/cpu.py:255": "backend != AttentionBackendEnum.CPU_MLA",
    "platforms/cpu.py:409": 'os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"',
    "utils/cpu_triton_utils.py:390": "def _expand_kernel_impl(",
    "v1/engine/async_llm.py:984": "await asyncio.sleep(0.02)",
    "v1/executor/multiproc_executor.py:443": "status != WorkerProc.ResponseStatus.SUCCESS",
    "v1/sample/rejection_sampler.py:581": "def expand_batch_to_tokens(",
    "v1/worker/gpu_model_runner.py:3500": "self.input_batch.generators.get(",
    "v1/worker/gpu_model_runner.py:5801": "if self.intermediate_tensors is None:",
    "v1/worker/gpu_worker.py:375": "def compute_weight_checksums(",
    "v1/worker/gpu_worker.py:1484": "def init_weight_transfer_engine(",
    "v1/worker/gpu_worker.py:1534": "if self._weight_update_active:",
    "v1/worker/utils.py:596": "torch.zeros(buf_size",
}


def cited() -> set[str]:
    """Every "file.py:1, 2 and 3" in the plugin as file.py:1, file.py:2 and file.py:3."""
    found = set()
    for source in PLUGIN.glob("*.py"):
        text = source.read_text()
        for path, numbers in re.findall(r"([\w/]+\.py):(\d+(?:(?:, | and )\d+)*)", text):
            path = path.removeprefix("vllm/")
            path = path if (VLLM / path).exists() else f"model_executor/{path}"
            found |= {f"{path}:{number}" for number in re.findall(r"\d+", numbers)}
    return found


def test_every_cited_line_is_known():
    assert cited() == LINES.keys()


@pytest.mark.parametrize("place", LINES)
def test_the_cited_line_is_still_there(place):
    path, number = place.split(":")
    line = (VLLM / path).read_text().splitlines()[int(number) - 1].strip()
    assert LINES[place] in line, f"vLLM moved: {place} now reads {line!r}"
