"""Patches of vLLM 0.32 on every platform; those of its CPU build are in `cpu_patches` and
`cpu_parallel`. Paths are below vllm/.

`correct_deepseek_classes`: for the classes of DeepSeek's models.

`push_to_drafters`: for a drafter whose weights are pushed, the MTP layer that
`--speculative-config` loads as a second model.

`keep_expert_maps_on_host` keeps on the host where an engine rank's experts are. vLLM's loaders look
each expert up in a tensor on the GPU (model_executor/layers/fused_moe/expert_map_manager.py:
`ExpertMapManager.map_global_to_local`). It is in the memory that a sleeping engine has given away,
and `loader_copies` runs the loaders while the engine of a colocated run sleeps: reading there ends
the process. And each look-up waits for the GPU, three times an expert and layer.

`keep_ranks_in_step`: for an engine of several ranks where some ranks fail in a push: it is
connected anew and gets the push again, so its ranks must stay in step.

`record_spans`: spans of vLLM's processes for `base.processes.timeline`, the parts of an engine
core's step and of its server. Patched only where a run is profiled."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from megatron_r1.base.processes import timeline

DEEPSEEK_MODELS = "vllm.model_executor.models.deepseek_v2"
MTP_MODELS = (
    "vllm.model_executor.models.deepseek_mtp",
    "vllm.model_executor.models.glm4_moe_mtp",
)
RELEASED_EPSILON = 1e-6


def correct_deepseek_classes() -> None:
    """Make both patches as soon as a model class has been loaded and `DEEPSEEK_MODELS` is
    imported.

    Importing it here would cost every process of a server that runs no model some seconds."""
    from vllm.model_executor.models import registry

    upstream = registry._LazyRegisteredModel.load_model_cls

    def load_model_cls(self: Any) -> Any:
        model = upstream(self)
        if DEEPSEEK_MODELS in sys.modules:
            _correct(sys.modules[DEEPSEEK_MODELS])
        for name in MTP_MODELS:
            if name in sys.modules:
                load_copies_into_drafters(sys.modules[name])
        return model

    registry._LazyRegisteredModel.load_model_cls = load_model_cls


@functools.cache  # a second call would wrap each patch in itself
def _correct(models: Any) -> None:
    gather_single_tokens(models.DeepseekV2DecoderLayer)
    for attention in (models.DeepseekV2Attention, models.DeepseekV2MLAAttention):
        _use_released_epsilon(attention)


@functools.cache
def load_copies_into_drafters(models: Any) -> None:
    """Let loaders of MTP layers fill the copies of experts that vLLM's balancer places.

    Upstream: model_executor/models/deepseek_mtp.py: `DeepSeekMTP.load_weights`, and
    model_executor/models/glm4_moe_mtp.py: `Glm4MoeMTP.load_weights`, map the model's experts to
    slots and leave out the redundant ones, which DeepseekV2ForCausalLM does not. Without it:
    copies compute drafts with uninitialized memory, and a push is refused, because it fills only a
    part of a tensor. Goes when: upstream passes `num_redundant_experts`.

    Args:
        models: the module.
    """
    upstream = models.fused_moe_make_expert_params_mapping

    def with_copies(model: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("num_redundant_experts", getattr(model, "num_redundant_experts", 0))
        return upstream(model, *args, **kwargs)

    models.fused_moe_make_expert_params_mapping = with_copies


def gather_single_tokens(layer: Any) -> None:
    """Give whole hidden states on from a layer whose batch is one token.

    Upstream: model_executor/models/deepseek_v2.py: `DeepseekV2DecoderLayer.forward` and
    `DeepseekV2Model.forward` (vllm-project/vllm #50154, pull request #50691). With rollout.tensor,
    .data and .expert_parallel the ranks of a tensor group hold shares of the tokens behind such a
    layer, which the next layer recognizes by their number. Without the patch: one token is padded
    to the group's size, so that a share has one row, too, and counts as the whole: all ranks but
    the first go on with padding, and the log-probabilities of a data rank's last sequence are off
    by 0.1 to 2 wherever the model runs eagerly. Goes when: layers say what they return."""
    from vllm.distributed import tensor_model_parallel_all_gather

    upstream = layer.forward

    def forward(self: Any, positions: torch.Tensor, *states: Any, **named: Any) -> tuple:
        hidden_states, residual = upstream(self, positions, *states, **named)  # drafters name them
        if self.use_sequence_parallel_moe and positions.shape[0] == 1:
            # Over the tensor group: its first rank holds the token, the others the padding.
            both = torch.cat([hidden_states, residual], dim=-1)
            both = tensor_model_parallel_all_gather(both, 0)[:1]
            hidden_states, residual = both.split(self.hidden_size, dim=-1)
        return hidden_states, residual

    layer.forward = forward


def _use_released_epsilon(attention: Any) -> None:
    """Give the norms of latent attention the epsilon that the models were released with.

    Upstream: model_executor/models/deepseek_v2.py: `DeepseekV2Attention.__init__` and
    `DeepseekV2MLAAttention.__init__`. The released code of DeepSeek-V2, V3, Moonlight and Kimi-K2
    and transformers' classes use 1e-6 in these norms whatever rms_norm_eps is; vLLM uses
    rms_norm_eps, 1e-5 for Moonlight and GLM-4.7-Flash. Goes when: vLLM does as they do."""
    upstream = attention.__init__

    @functools.wraps(upstream)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(self, name):
                getattr(self, name).variance_epsilon = RELEASED_EPSILON

    attention.__init__ = construct


DRAFTER_KEYS = ("quantization_config", "scoring_func", "topk_method")
"""Keys of config.json that a model and its MTP layers have alike."""


def push_to_drafters() -> None:
    """Apply all three patches, once per process."""
    expose_drafter()
    _checksum_the_drafter()
    _configure_as_the_model()


def expose_drafter() -> None:
    """Give our weight-transfer backend the drafter, the balancer of experts and the manager of
    adapters next to the model.

    Upstream: v1/worker/gpu_worker.py: `Worker.init_weight_transfer_engine`. Without it: a
    backend has the model only, the drafter keeps the weights it was started with, and experts are
    where the balancer's maps do not expect them. Goes when: one update can be of both models, and
    of experts that have moved."""
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.init_weight_transfer_engine

    def init_weight_transfer_engine(self: Any, init_info: dict) -> None:
        if self.weight_transfer_engine is not None:
            self.weight_transfer_engine.drafter = self.get_draft_model()
            # None without `--enable-eplb`; runners on a CPU have none.
            self.weight_transfer_engine.balancer = getattr(self.model_runner, "eplb_state", None)
            # None without `--enable-lora`.
            self.weight_transfer_engine.lora = getattr(self.model_runner, "lora_manager", None)
        upstream(self, init_info)

    Worker.init_weight_transfer_engine = init_weight_transfer_engine


def _checksum_the_drafter() -> None:
    """Let POST /weight_checker answer for the drafter's own tensors, too, as `drafter.NAME`.

    Upstream: v1/worker/gpu_worker.py: `Worker.compute_weight_checksums`. Without it: what
    the drafter computes with cannot be seen from outside. Goes when: upstream includes it."""
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.compute_weight_checksums

    def compute_weight_checksums(self: Any) -> dict[str, str]:
        digests = upstream(self)
        drafter = self.get_draft_model()
        drafter_digests = compute_tensor_digests(drafter) if drafter is not None else {}
        prefix = self._weight_checksum_prefix()
        return digests | {
            f"{prefix}drafter.{name}": digest for name, digest in drafter_digests.items()
        }

    Worker.compute_weight_checksums = compute_weight_checksums


def _configure_as_the_model() -> None:
    """Give the drafter the values of `DRAFTER_KEYS` that --hf-overrides changes.

    Upstream: config/speculative.py: `SpeculativeConfig.hf_config_override`, which leaves such
    overrides to the model: `push.fp8` would then start an FP8 model with a drafter whose FP8 has no
    blocks, a model in bf16 from an FP8 folder with a drafter in FP8, and a DeepSeek-V3 that
    transformers wrote with a drafter that routes otherwise. Goes when: it applies them."""
    from vllm.config.speculative import SpeculativeConfig

    upstream = SpeculativeConfig.compose_draft_hf_overrides

    def compose_draft_hf_overrides(target: Any) -> Any:
        if isinstance(target, dict) and (
            settings := {k: v for k, v in target.items() if k in DRAFTER_KEYS}
        ):
            return functools.partial(_with_target_settings, settings)  # is sent to other processes
        return upstream(target)

    SpeculativeConfig.compose_draft_hf_overrides = staticmethod(compose_draft_hf_overrides)


def _with_target_settings(settings: dict, hf_config: Any) -> Any:
    """Return the drafter's configuration with these keys."""
    from vllm.config.speculative import SpeculativeConfig

    hf_config = SpeculativeConfig.hf_config_override(hf_config)
    for key, value in settings.items():
        setattr(hf_config, key, value)
    return hf_config


def keep_expert_maps_on_host() -> None:
    """Let every map have a copy on the host from when it is made. Goes when: vLLM looks experts up
    on the host."""
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
        args: tuple = (),
        kwargs: dict | None = None,
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

    def init_weight_transfer_engine(self: Any, init_info: dict) -> None:
        self._weight_update_active = False
        upstream(self, init_info)

    Worker.init_weight_transfer_engine = init_weight_transfer_engine


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
