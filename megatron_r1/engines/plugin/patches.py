"""Patches of vLLM 0.32 on every platform and for every model; `deepseek_patches` and
`drafter_patches` have those of single models, `cpu_patches`, `cpu_parallel` and
`cpu_routed_experts` those of its CPU build. Paths are below vllm/.

`keep_expert_maps_on_cpu` keeps on the CPU where an engine rank's experts are. vLLM's loaders look
each expert up in a tensor on the GPU (model_executor/layers/fused_moe/expert_map_manager.py:
`ExpertMapManager.map_global_to_local`). It is in the memory that a sleeping engine has given away,
and `loader_copies` runs the loaders while the engine of a colocated run sleeps: reading there ends
the process. And each look-up waits for the GPU, three times an expert and layer.

`keep_ranks_in_step`: for an engine of several ranks where some ranks fail in a push: it is
connected anew and gets the push again, so its ranks must stay in step.

`expose_models` gives the weight-transfer backend what a push loads besides the model.

`stop_rebalancing_before_sleep` lets an engine sleep only while its balancer moves no experts.

`record_spans`: spans of vLLM's processes for `base.processes.timeline`, the parts of an engine
core's step and of its server. Patched only where a run is profiled."""

import functools
from collections.abc import Sequence
from typing import Any

from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from megatron_r1.base.processes import timeline


def keep_expert_maps_on_cpu() -> None:
    """Let every map have a copy on the CPU from when it is made. Goes when: vLLM looks experts up
    on the CPU."""
    make = ExpertMapManager._calculate_expert_maps

    def make_with_copy(self: Any) -> None:
        make(self)
        self._places = None if self._expert_map is None else self._expert_map.tolist()

    def map_global_to_local(self: Any, global_id: int) -> int:
        return global_id if self._places is None else self._places[global_id]

    ExpertMapManager._calculate_expert_maps = make_with_copy
    ExpertMapManager.map_global_to_local = map_global_to_local


TRANSFER = "_weight_transfer_engine", "_weight_update", "_weights"
"""Ends of the names of a worker's methods that load a push."""


def keep_ranks_in_step() -> None:
    """Apply both patches, once per process."""
    read_every_reply()
    end_unfinished_updates()


def read_every_reply() -> None:
    """Let a call of a weight transfer read the replies of all ranks before it raises the error of
    one.

    Upstream: v1/executor/multiproc_executor.py: `MultiprocExecutor.collective_rpc.get_response`.
    Without it: the call raises at the first error, and the replies of the ranks behind it stay in
    their queues. The next call takes them for its own, and all later ones are late by one. Goes
    when: it reads them. Other calls are left as they are: an engine ends where one of them fails,
    and must not wait for ranks that are in a collective with the one that has failed."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    upstream = MultiprocExecutor.collective_rpc

    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        **aggregators: Any,
    ) -> Any:
        queues, call = tuple(self.response_mqs), (method, timeout, args, kwargs)
        future = upstream(self, *call, True, unique_reply_rank, **aggregators)
        is_transfer = isinstance(method, str) and method.endswith(TRANSFER)
        if is_transfer and timeout is None and unique_reply_rank is None:
            future.get_response = functools.partial(_replies_of_all, queues)
        return future if non_block else future.result()

    MultiprocExecutor.collective_rpc = collective_rpc


def _replies_of_all(queues: Sequence[Any]) -> list[Any]:
    """Return the next reply of each rank's queue.

    Raises:
        RuntimeError: the first rank's error, as upstream, when all have replied.
    """
    from vllm.v1.executor.multiproc_executor import WorkerProc

    replies = [queue.dequeue() for queue in queues]
    for status, result in replies:
        if status != WorkerProc.ResponseStatus.SUCCESS:
            raise RuntimeError(
                f"Worker failed with error '{result}', please check the stack trace above for the "
                "root cause"
            )
    return [result for _, result in replies]


def end_unfinished_updates() -> None:
    """Let a rank that connects to a trainer forget the update before.

    Upstream: v1/worker/gpu_worker.py: `Worker._start_weight_update`. Without it: where one
    rank has loaded a push and another has not, the first still waits for `finish_weight_update`,
    and refuses the repeated push as a second one. Goes when: the update of all ranks ends with the
    error of one."""
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.init_weight_transfer_engine

    def init_weight_transfer_engine(self: Any, init_info: dict[str, Any]) -> None:
        self._weight_update_active = False
        upstream(self, init_info)

    Worker.init_weight_transfer_engine = init_weight_transfer_engine


def expose_models() -> None:
    """Give our weight-transfer backend the drafter, the balancer of experts and the manager of
    adapters next to the model.

    Upstream: v1/worker/gpu_worker.py: `Worker.init_weight_transfer_engine`. Without it: a
    backend has the model only, the drafter keeps the weights it was started with, and experts are
    where the balancer's maps do not expect them. Goes when: one update can be of both models, and
    of experts that have moved."""
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.init_weight_transfer_engine

    def init_weight_transfer_engine(self: Any, init_info: dict[str, Any]) -> None:
        if self.weight_transfer_engine is not None:
            self.weight_transfer_engine.drafter = self.get_draft_model()
            # None without `--enable-eplb`; runners on a CPU have none.
            self.weight_transfer_engine.balancer = getattr(self.model_runner, "eplb_state", None)
            # None without `--enable-lora`.
            self.weight_transfer_engine.lora = getattr(self.model_runner, "lora_manager", None)
        upstream(self, init_info)

    Worker.init_weight_transfer_engine = init_weight_transfer_engine


def stop_rebalancing_before_sleep() -> None:
    """Let a rank sleep when vLLM's balancer of experts has ended what it moves.

    Upstream: v1/worker/gpu_worker.py: `Worker.sleep`. Without it: a sleep unmaps the weights, the
    buffer and the maps that the balancer's thread copies from and to, also while no request runs,
    and the rank dies of an illegal access. Goes when: a sleep waits for the balancer."""
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.sleep

    def sleep(self: Any, level: int = 1) -> None:
        from vllm.distributed import get_ep_group

        from megatron_r1.engines.plugin import expert_placement

        balancer = getattr(self.model_runner, "eplb_state", None)
        if balancer is not None:
            expert_placement.stop_rebalancing(balancer, get_ep_group().cpu_group)
            num_slots = expert_placement.count_moved_slots(balancer)
            print(f"sleep: the balancer had moved experts to {num_slots} slots", flush=True)
        upstream(self, level)

    Worker.sleep = sleep


def record_spans() -> None:
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
