"""The tensors of a Megatron distributed checkpoint, and the HF rows in each. No torch.

Megatron names and splits tensors by rules of its own (`sharded_state_dict`): the experts of a layer
are one tensor with the expert as first axis; the layers of a model whose layers are all alike are
one tensor with the layer as first axis; in grouped-query layers the norms have the names of those
inside Transformer Engine's linear layers, also with Megatron's own layers. All of it follows from
the weight table; tests compare it with what Megatron saves."""

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

from megatron_r1.models.weights.decoder import table
from megatron_r1.models.weights.layout import Shape, layout, stage_shards
from megatron_r1.models.weights.rules import Piece

_EXPERT = re.compile(
    r"(?P<prefix>.*\.mlp\.experts)\."
    r"(?:local_experts\.(?P<own>\d+)\.(?P<fc>linear_fc[12]\.(?:weight|bias))"
    r"|(?P<te_fc>linear_fc[12]\.(?:weight|bias))(?P<te>\d+))"
)
_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class StoredParameter:
    """One Megatron parameter inside a stored tensor: stored[index] has `shape`, and these runs of
    rows (dim 0) are rows of HF tensors."""

    key: str
    index: tuple[int, ...]
    shape: Shape
    runs: tuple[Piece, ...]


@dataclass
class StoredLayout:
    """The tensors of a stored Megatron checkpoint, and the HF rows that each holds.

    shapes: key -> shape of the whole stored tensor, prepended axes first. dtypes: key -> dtype of a
    tensor whose dtype is not the model's. vocabulary: keys of tensors whose rows may be padded."""

    slots: list[StoredParameter] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    vocabulary: set[str] = field(default_factory=set)

    def by_hf_name(self) -> dict[str, list[tuple[StoredParameter, Piece]]]:
        """Return HF tensor -> the slots and runs with its rows, in row order."""
        by_name = defaultdict(list)
        for slot in self.slots:
            for run in slot.runs:
                by_name[run.hf_name].append((slot, run))
        for runs in by_name.values():
            runs.sort(key=lambda item: item[1].hf_start)
        return dict(by_name)


def stored_layout(
    hf: dict,
    *,
    with_mtp: bool = True,
    transformer_engine: bool = False,
    stacked: bool | None = None,
) -> StoredLayout:
    """Return the layout of the model `hf` describes, without vocabulary padding.

    transformer_engine: whether Transformer Engine's layers saved the checkpoint; only the names of
    latent attention differ. stacked: whether the layers are an axis of one tensor; None: as
    Megatron 0.16 does, for models without experts."""
    rules = table(hf)
    if stacked is None:
        stacked = not rules.num_experts
    fused_norms = transformer_engine or not hf.get("kv_lora_rank")
    ((whole,),) = stage_shards(hf, with_mtp=with_mtp)
    at = replace(whole, transformer_engine=fused_norms)
    result = StoredLayout()
    first_axes: dict[str, list[int]] = {}
    for name, entry in layout(hf, at).items():
        key, index = _stored_name(name, stacked)
        runs = tuple(_run(piece, entry.shape) for piece in entry.pieces)
        result.slots.append(StoredParameter(key, index, entry.shape, runs))
        sizes = first_axes.setdefault(key, [0] * len(index))
        for axis, position in enumerate(index):
            sizes[axis] = max(sizes[axis], position + 1)
        result.shapes[key] = (*sizes, *entry.shape)
        if entry.dtype:
            result.dtypes[key] = entry.dtype
    result.vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    result.vocabulary &= result.shapes.keys()
    return result


def _stored_name(name: str, stacked: bool) -> tuple[str, tuple[int, ...]]:
    index: tuple[int, ...] = ()
    if expert := _EXPERT.fullmatch(name):
        fc = expert["fc"] or expert["te_fc"]
        name = f"{expert['prefix']}.experts.{fc}"
        index = (int(expert["own"] or expert["te"]),)
    if stacked and (layer := _LAYER.fullmatch(name)):
        name, index = f"decoder.layers.{layer['rest']}", (int(layer["layer"]), *index)
    return name, index


def _run(piece: Piece, shape: Shape) -> Piece:
    if piece.dim == 0:
        return piece
    assert (piece.hf_start, piece.local_start, piece.length) == (0, 0, shape[1]), (
        "one rank holds whole rows"
    )
    return Piece(piece.hf_name, 0, 0, 0, shape[0])
