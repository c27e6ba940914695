"""Spans of vLLM's processes for `base.processes.timeline`: the parts of an engine core's step and
of its server. Patched only where a run is profiled."""

from megatron_r1.base.processes import timeline


def apply() -> None:
    """Record calls of vLLM's functions, if this process records."""
    if not timeline.is_on():
        return
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.serial_utils import MsgpackDecoder
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: type = GPUModelRunner
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        runner = CPUModelRunner
    timeline.time_methods(
        {
            "core/step, rest": (EngineCoreProc, "_process_engine_step"),
            "core/requests": (EngineCoreProc, "_handle_client_request"),
            "core/schedule": (Scheduler, "schedule"),
            "core/make outputs": (Scheduler, "update_from_output"),
            "core/prepare inputs": (runner, "execute_model"),
            "core/forward": (runner, "_model_forward"),
            "core/sample": (runner, "sample_tokens"),
            "server/decode outputs": (MsgpackDecoder, "decode"),
            "server/collect outputs": (OutputProcessor, "process_outputs"),
            "server/requests": (InputProcessor, "process_inputs"),
        }
    )
