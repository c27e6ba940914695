"""Verifies after a load that the engine computes with the weights that arrived.

The checksums of a push end in the receive buffer. An engine that loads nothing from there, or all
but one layer, computes on with old weights. The probes detect that in float32; in bfloat16 their
tolerance is above what an optimizer step changes. So tensors are compared around a load:

- one that is kept as it arrives (`CheckpointParameter.is_live`, the router's bias) must equal what
  arrived;
- of the others vLLM's kernels have forms of their own, in which a small change of a scale may be
  rounded away. Where other values arrived for a layer than in the push before, one of its tensors
  must change;
- an FP8 scale that stays old hides behind its weights, which change, and from probes: an update
  changes both by as little. One that a kernel has kept as it arrived must equal what arrives ever
  after. Of another form, powers of two (`ue8m0`, which nothing rounds) that have changed must
  change it.

A pass over all weights would be a large part of the pause, so large layers take turns: an engine
that loads nothing is found at once, a single large stale layer when its turn comes. One above
CPU_BYTES or GPU_BYTES is never compared."""

from collections.abc import Sequence

import torch
from vllm.platforms import current_platform

from megatron_r1.engines.plugin.memory_layout import PlacedParameter
from megatron_r1.push.checksum import tensor_checksum
from megatron_r1.push.control_messages import UnusedPush

SCALE_NAME = "scale"
"""In the name of a parameter with the scales of FP8 blocks, by vLLM's names (`weight_scale_inv`).
They are a 16,384th of the weights, so all are compared in every push."""
SMALL_BYTES = 1 << 16
"""Layers of at most so many bytes are compared in every push."""
CPU_BYTES, GPU_BYTES = 1 << 24, 1 << 31
"""Bytes of larger layers that are compared per push: 8 ms of a core at 4 GB/s, which reads them
before and after."""


class LoadCheck:
    """Compares layers before and after each load.

    Args:
        owners: for every slot of the engine rank's table, the parameter that it belongs to."""

    def __init__(self, owners: Sequence[PlacedParameter]):
        self._owners = owners
        layers: dict[torch.nn.Module, list[PlacedParameter]] = {}
        for placement in dict.fromkeys(owners):
            layers.setdefault(placement.parameter.layer, []).append(placement)
        self._layers_by_last_check = list(layers.values())
        """The parameters of each layer; layers that were compared longest ago first."""
        self._before: list[tuple[list[PlacedParameter], PlacedParameter, list[int]]] = []
        """Each layer compared in this load: its parameters, a new one of them, and checksums."""
        self._scales = [
            placement
            for layer in self._layers_by_last_check
            for placement in layer
            if SCALE_NAME in placement.parameter.name
        ]
        self._kept_scales: set[PlacedParameter] = set()
        """Scales that the kernels keep as they arrive."""
        self._scales_before: dict[PlacedParameter, list[int]] = {}
        """Checksums of the scales in use for which others have arrived."""

    def before_load(self, changed: set[int]) -> None:
        """Note the tensors in use before a load.

        Args:
            changed: the slots for which other values arrived than in the push before."""
        arrived_placements = {self._owners[slot] for slot in changed}
        num_bytes = CPU_BYTES if current_platform.is_cpu() else GPU_BYTES
        self._scales_before = {
            placement: _value_checksums(_tensors_in_use([placement]))
            for placement in self._scales
            if placement in arrived_placements
        }
        self._before = []
        for layer in list(self._layers_by_last_check):
            new_placements = [
                placement
                for placement in layer
                if placement in arrived_placements and not placement.parameter.is_live
            ]
            tensors = _tensors_in_use(layer) if new_placements else []
            size = sum(tensor.nbytes for tensor in tensors)
            if not tensors or (size > SMALL_BYTES and size > num_bytes):
                continue
            self._before.append((layer, new_placements[0], _value_checksums(tensors)))
            if size > SMALL_BYTES:
                num_bytes -= size
                self._layers_by_last_check.remove(layer)
                self._layers_by_last_check.append(layer)

    def after_load(
        self, push_number: int, loaded: Sequence[PlacedParameter], memory: torch.Tensor
    ) -> None:
        """Compare after a load of the parameters `loaded` from `memory`.

        Args:
            push_number: which push of the run, from 1.
            loaded: the parameters of the load.
            memory: uint8, the receive buffer that they were loaded from.

        Raises:
            UnusedPush: the engine does not compute with what arrived; it names the tensors.
        """
        wrong_placements = [
            placement
            for placement in loaded
            if placement.parameter.is_live and not _equals_received(placement, memory)
        ]
        wrong_placements += [
            placement
            for layer, placement, checksums_before in self._before
            if _value_checksums(_tensors_in_use(layer)) == checksums_before
        ]
        wrong_placements += [
            placement for placement in self._scales if self._is_old(placement, memory)
        ]
        if wrong_placements:
            names = ", ".join(placement.parameter.title for placement in wrong_placements[:5])
            raise UnusedPush(
                f"push {push_number}: {len(wrong_placements)} tensors arrived and are not what the "
                f"engine computes with: {names}{', ...' if len(wrong_placements) > 5 else ''}"
            )

    def _is_old(self, placed: PlacedParameter, memory: torch.Tensor) -> bool:
        """Return whether scales in use are not those that have arrived."""
        in_use = _tensors_in_use([placed])
        if not in_use:
            return False
        if in_use[0].shape == placed.parameter.shape and _equals_received(placed, memory):
            self._kept_scales.add(placed)
            return False
        if placed in self._kept_scales:
            return True
        return self._scales_before.get(placed) == _value_checksums(in_use) and _has_powers_of_two(
            placed.value(memory)
        )


def _has_powers_of_two(scales: torch.Tensor) -> bool:
    return bool((torch.frexp(scales.float()).mantissa.abs() == 0.5).all())


def _tensors_in_use(layer: Sequence[PlacedParameter]) -> list[torch.Tensor]:
    """Return the tensors of a layer that loading makes from arriving weights.

    Tensors that stay as they arrive are not among them, nor those that vLLM keeps outside of the
    layer, as matrices packed for oneDNN."""
    tensors = [
        getattr(placement.parameter.layer, placement.parameter.name, None)
        for placement in layer
        if not placement.parameter.is_live
    ]
    return [t for t in tensors if t is not None and t.numel() and not t.is_meta]


def _equals_received(placed: PlacedParameter, memory: torch.Tensor) -> bool:
    in_use = getattr(placed.parameter.layer, placed.parameter.name)
    return _value_checksums([in_use]) == _value_checksums([placed.value(memory).to(in_use.device)])


@torch.no_grad()
def _value_checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor_checksum(t.reshape(-1, t.shape[-1] if t.dim() > 1 else 1)) for t in tensors]
