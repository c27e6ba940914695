"""The adapter that an engine rank serves where adapters alone are pushed (`push.adapter_only`).

Here are its slots in the receive buffer, its way into vLLM's LoRA layers, the check that these
compute with it, and patches of vLLM 0.32 for it. Paths are below vllm/.

Pushed factors have no file. So `LoRARequest` names one adapter, whose number never changes, and
vLLM gets its factors from here whenever it loads it: at every push, and where it has dropped it
(an idle data rank removes all adapters after a pass without tokens)."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name

from megatron_r1.engines.plugin.memory_layout import ALIGNMENT_BYTES
from megatron_r1.push.control_messages import AdapterSettings, UnusedPush
from megatron_r1.push.slots import Slot, SlotTable, slot_view

REQUEST = LoRARequest(lora_name="pushed", lora_int_id=1, lora_path="pushed")
"""What every request is computed with."""


class PushedAdapter:
    """The adapter of one engine rank.

    Args:
        lora: vLLM's `WorkerLoRAManager` of this rank.
        settings: what PEFT's files say of it.
        tensors: the name and the shape of every factor of the adapter, without that prefix.

    Raises:
        ValueError: where vLLM cannot serve an adapter of such settings.

    Attributes:
        table: a slot for each factor, whole, of a layer that this rank has.
    """

    def __init__(
        self,
        lora: Any,
        settings: AdapterSettings,
        tensors: Sequence[tuple[str, Sequence[int]]],
    ):
        self._lora, self._manager = lora, lora._adapter_manager
        self._prefix = settings.prefix
        self._config = PEFTHelper.from_dict(settings.config)
        self._config.validate_legal(lora.lora_config)
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        self._renames = mapper.get_rename_mapper() if mapper is not None else None
        # vLLM has several layers of PEFT's as one: its module, and which of them.
        self._layers = {
            layer: (module, index)
            for name, module in self._manager.modules.items()
            for index, layer in enumerate(self._manager.packed_modules.get(name, [name]))
        }
        self.table = self._factor_slot_table(tensors)
        self._factors: dict[str, torch.Tensor] = {}
        lora.pushed = self

    def load(self, area: torch.Tensor) -> None:
        """Put the received factors, which are copied, in the place of the adapter before.

        Args:
            area: uint8, the memory that has their values."""
        device = self._manager.device
        self._factors = {
            slot.name: slot_view(area, slot).to(device, copy=True) for slot in self.table.slots
        }
        name, number, path = REQUEST.lora_name, REQUEST.lora_int_id, REQUEST.lora_path
        self._lora.add_adapter(LoRARequest(name, number, path, load_inplace=True))

    def model(self) -> LoRAModel:
        """Return the adapter as vLLM loads it, with tensors of its own, which vLLM scales."""
        if not self._factors:
            raise RuntimeError("no push has brought the adapter that requests are computed with")
        return LoRAModel.from_lora_tensors(
            REQUEST.lora_int_id,
            {self._prefix + name: factor.clone() for name, factor in self._factors.items()},
            self._config,
            device=str(self._manager.device),
            dtype=self._lora.lora_config.lora_dtype,
            weights_mapper=self._renames,
        )

    def check(self, push_number: int) -> None:
        """Compare what the layers compute with to the received factors.

        Args:
            push_number: which push of the run, from 1.

        Raises:
            UnusedPush: factors differ; it names them.
        """
        wrong_names = [
            name for name, factor in self._factors.items() if not self._is_used(name, factor)
        ]
        if wrong_names:
            names = ", ".join(wrong_names[:5]) + (", ..." if len(wrong_names) > 5 else "")
            raise UnusedPush(
                f"push {push_number}: {len(wrong_names)} tensors arrived and are not what the "
                f"engine computes with: {names}"
            )

    def _factor_slot_table(self, tensors: Sequence[tuple[str, Sequence[int]]]) -> SlotTable:
        dtype: torch.dtype = self._lora.lora_config.lora_dtype
        slots, end = [], 0
        for name, (rows, columns) in tensors:
            if self._layer_of_factor(name)[0] in self._layers:
                pitch = columns * dtype.itemsize
                form = str(dtype).removeprefix("torch.")
                slots.append(Slot(name, 0, rows, 0, columns, end, pitch, form))
                end += -(-rows * pitch // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return SlotTable(end, slots)

    def _layer_of_factor(self, name: str) -> tuple[str, bool]:
        """Return the name of a factor's layer in vLLM, and whether it is the factor A."""
        return parse_fine_tuned_lora_name(self._prefix + name, self._renames)

    def _is_used(self, name: str, factor: torch.Tensor) -> bool:
        layer, is_a = self._layer_of_factor(name)
        module, index = self._layers[layer]
        slots = self._manager.lora_index_to_id
        if REQUEST.lora_int_id not in slots:
            return False
        stacked_factors = module.lora_a_stacked if is_a else module.lora_b_stacked
        in_use = stacked_factors[index][slots.index(REQUEST.lora_int_id), 0]
        expected = factor if is_a else factor * self._config.vllm_lora_scaling_factor
        if module.tp_size > 1:
            cut = module.slice_lora_a if is_a else module.slice_lora_b
            if len(stacked_factors) == 1:
                expected = cut(expected)
            else:
                factors = [
                    expected if position == index else None
                    for position in range(len(stacked_factors))
                ]
                expected = cut(factors)[index]
        return torch.equal(in_use[: expected.shape[0], : expected.shape[1]], expected)


@functools.cache  # a second call would wrap each patch in itself
def patch_adapter_loading() -> None:
    """Apply the three patches of a worker."""
    _load_pushed_factors()
    _keep_the_adapter()
    _keep_the_experts_kernel()


def _load_pushed_factors() -> None:
    """Load the adapter of `REQUEST` from the last push.

    Upstream: lora/worker_manager.py: `WorkerLoRAManager._load_adapter`. Without it: vLLM reads
    every adapter from a folder. Goes when: an adapter may come from memory."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    upstream = WorkerLoRAManager._load_adapter

    def _load_adapter(self: Any, lora_request: LoRARequest) -> LoRAModel:
        if lora_request != REQUEST:
            return upstream(self, lora_request)
        if getattr(self, "pushed", None) is None:
            raise RuntimeError("no trainer is connected that pushes the adapter")
        return self.pushed.model()

    WorkerLoRAManager._load_adapter = _load_adapter


def _keep_the_adapter() -> None:
    """Keep the pushed adapter at the end of the update that has brought it.

    Upstream: v1/worker/lora_model_runner_mixin.py: `LoRAModelRunnerMixin.reset_lora_state`, which
    v1/worker/gpu_worker.py: `Worker.finish_weight_update` calls. Without it: all adapters are
    removed, as an update is taken for one of the model's weights, and what has been checked is not
    what the next request computes with. Goes when: vLLM's update names its adapter."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    upstream = LoRAModelRunnerMixin.reset_lora_state

    def reset_lora_state(self: Any) -> None:
        if getattr(getattr(self, "lora_manager", None), "pushed", None) is None:
            upstream(self)

    LoRAModelRunnerMixin.reset_lora_state = reset_lora_state


def _keep_the_experts_kernel() -> None:
    """Give routed experts, which have no pushed adapter, the kernel that they have without LoRA.

    Upstream: model_executor/layers/fused_moe/layer.py: `FusedMoEFactory`, which makes the
    `FusedMoEConfig`. Without it: every engine with LoRA computes experts by a Triton kernel that
    could add an adapter's product, and ends at its first prompt on a CPU, which has no Triton. Goes
    when: `target_modules` without experts are asked there."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    upstream = FusedMoEConfig.__post_init__

    def finish(self: Any) -> None:
        self.is_lora_enabled = False
        upstream(self)

    FusedMoEConfig.__post_init__ = finish


def serve_pushed_adapter() -> None:
    """Let the server that this process will start compute all requests with the pushed adapter,
    where its engine has LoRA.

    Upstream: entrypoints/serve/engine/serving.py: `BaseServing._maybe_get_adapters`. Without it:
    an adapter is named by each request, and loaded from a folder before the first. Goes when: an
    engine can have a default adapter."""
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    upstream = ServingTokens._maybe_get_adapters

    def _maybe_get_adapters(self: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        if self.engine_client.vllm_config.lora_config is not None:
            return REQUEST
        return upstream(self, *args, **kwargs)

    ServingTokens._maybe_get_adapters = _maybe_get_adapters
