"""Names the Hugging Face tensors that form each Megatron parameter (`table`), and splits them over
ranks (`splits`).

Import (`loading`), export (`export`), conversion, the push to the engines and the memory planner
read it. `parameter_layout` has every parameter of a rank from
`config.json`, without torch; `adapter_table`, `adapter_module` and `adapters` are the same of
low-rank adapters, and `formats` has the formats on disk.

`hf_tensors`, `num_parameters` and `parameter_layout` need a configuration only; what works on
Megatron model chunks is imported at first use."""

from typing import Any

from r1_grading.base import import_lazily

from megatron_r1.models.pipeline_stages import pipeline_stages
from megatron_r1.models.weights.layout import (
    LayoutEntry,
    Shard,
    hf_tensors,
    num_parameters,
    parameter_layout,
    stage_shards,
)
from megatron_r1.models.weights.splits import Piece

_MODULE_BY_NAME = {
    "initialize_weights": "loading",
    "initialize_score_head": "loading",
    "load_hf": "loading",
    "load_megatron": "loading",
    "local_pieces": "loading",
    "save_hf": "export",
    "write_hf": "export",
}

__all__ = [
    "LayoutEntry",
    "Piece",
    "Shard",
    "hf_tensors",
    "parameter_layout",
    "num_parameters",
    "pipeline_stages",
    "stage_shards",
    *_MODULE_BY_NAME,
]


def __getattr__(name: str) -> Any:
    return import_lazily(__name__, _MODULE_BY_NAME, name)
