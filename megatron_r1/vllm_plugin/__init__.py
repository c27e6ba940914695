"""The part of megatron-r1 that runs inside vLLM. Imports torch and vllm (with what they bring) and
`megatron_r1.weight_sync.receive`, nothing of the rest.

vLLM calls `register` in every one of its processes (entry point group `vllm.general_plugins`). A
new way of moving weights is one new file in `weight_sync/transports` plus one line here.
"""

import functools
import multiprocessing

# name for --weight-transfer-config  ->  (module, class)
BACKENDS = {
    "megatron_r1_shm": ("megatron_r1.vllm_plugin.backend", "SharedMemoryEngine"),
    "megatron_r1_cuda_ipc": ("megatron_r1.vllm_plugin.backend", "DeviceEngine"),
    "megatron_r1_gloo": ("megatron_r1.vllm_plugin.backend", "GlooEngine"),
    "megatron_r1_nccl": ("megatron_r1.vllm_plugin.backend", "NcclEngine"),
}


def register() -> None:
    """Add our weight-transfer backends and mend vLLM's CPU build. Safe to call repeatedly."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_r1.processes import lifetime
    from megatron_r1.vllm_plugin import stacks

    for name, (module, class_name) in BACKENDS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, class_name)
    _mend_cpu_build()
    stacks.answer_signal()
    if multiprocessing.parent_process() is not None:
        lifetime.die_with_parent()


@functools.cache  # a second time each mend would wrap itself
def _mend_cpu_build() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from megatron_r1.vllm_plugin import cpu_fp8, cpu_parallel, cpu_patches, cpu_routing

    cpu_patches.mend()
    cpu_parallel.mend()
    cpu_fp8.mend()
    cpu_routing.return_routing_on_cpu()
