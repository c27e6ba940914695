"""One table of names, shapes and shards per architecture, and everything that follows from it.

`hf_tensors`, `layout` and `shard` need a configuration only; the rest works on Megatron model
chunks and is imported when first asked for.
"""

from megatron_r1.models.pipeline_stages import Stage, pipeline_stages
from megatron_r1.weights.layout import Entry, Shard, hf_tensors, layout, shard, stage_shards
from megatron_r1.weights.rules import Piece

__all__ = [
    "Entry",
    "Piece",
    "Shard",
    "Stage",
    "hf_tensors",
    "initialize",
    "initialize_score",
    "layout",
    "load_hf",
    "load_megatron",
    "local_pieces",
    "pipeline_stages",
    "save_hf",
    "shard",
    "stage_shards",
    "write_hf",
]

_HOME = {
    "initialize": "reading",
    "initialize_score": "reading",
    "load_hf": "reading",
    "load_megatron": "reading",
    "local_pieces": "local",
    "save_hf": "export",
    "write_hf": "writing",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
