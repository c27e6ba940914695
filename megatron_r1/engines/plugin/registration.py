"""Adds our weight-transfer backends to vLLM, and patches it."""

import faulthandler
import functools
import multiprocessing
import signal

from megatron_r1.base.transports import BACKEND_PREFIX, TRANSPORTS


def register() -> None:
    """Add our weight-transfer backends and patch vLLM. Repeated calls do nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_r1.base.processes import children

    for transport in TRANSPORTS:
        name = BACKEND_PREFIX + transport
        if name not in WeightTransferEngineFactory._registry:
            backend = "megatron_r1.engines.plugin.backend", "PushTransferEngine"
            WeightTransferEngineFactory.register_engine(name, *backend)
    _patch_vllm()
    dump_stacks_on_signal()
    if multiprocessing.parent_process() is not None:
        children.die_with_parent()


@functools.cache  # a second call would wrap each patch in itself
def _patch_vllm() -> None:
    from vllm.platforms import current_platform

    from megatron_r1.engines.plugin import (
        deepseek_patches,
        drafter_patches,
        output_batching,
        patches,
        pushed_adapter,
        sampling_masks,
    )

    deepseek_patches.correct_deepseek_classes()
    drafter_patches.patch_drafter()
    patches.expose_models()
    patches.keep_expert_maps_on_cpu()
    patches.keep_ranks_in_step()
    patches.stop_rebalancing_before_sleep()
    output_batching.patch_output_batching()
    pushed_adapter.patch_adapter_loading()
    sampling_masks.accept_requests_without_top_k()
    if current_platform.is_cpu():
        from megatron_r1.engines.plugin import cpu_parallel, cpu_patches, cpu_routed_experts

        cpu_patches.patch_cpu_engine()
        cpu_parallel.patch_cpu_parallelism()
        cpu_routed_experts.return_routed_experts()
        sampling_masks.return_masks_on_cpu()
        sampling_masks.fix_top_k_without_drafts()
    else:
        sampling_masks.omit_masks_of_whole_vocabulary()
    patches.record_spans()


def dump_stacks_on_signal() -> None:
    """Write this process's Python stacks to its log on SIGUSR2, which vLLM does not use. Forked
    children inherit it."""
    # C code without the interpreter lock: it works in a process that is stuck in a kernel or a
    # collective.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
