"""Keeps on the host where an engine rank's experts are.

vLLM's loaders look each expert up in a tensor on the GPU
(model_executor/layers/fused_moe/expert_map_manager.py: `ExpertMapManager.map_global_to_local`).
It is in the memory that a sleeping engine has given away, and the recorder runs the loaders while
the engine of a colocated run sleeps: reading there ends the process. And each look-up waits for
the GPU, three times an expert and layer."""

from typing import Any

from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager


def apply() -> None:
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
