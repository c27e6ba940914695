"""The model chunks of each pipeline stage, spread evenly or spelled out. No torch.

The meaning is that of Megatron-Core 0.19.2 (transformer/pipeline_parallel_layer_layout.py and
transformer_block.py), whose own classes need process groups. Pipeline rank p of P holds the chunks
(0, p) … (V - 1, p) of V virtual stages, and micro-batches pass the chunks in the order (0, 0), (0,
1) … (0, P - 1), (1, 0) …"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import ParallelConfig

_ITEM = re.compile(r"\(([^()]*)\)\*(\d+)|([EtmL|])(?:\*(\d+))?")


@dataclass(frozen=True)
class ModelChunk:
    """A part of a model, on one pipeline rank: decoder layers by global index, and other parts.

    Attributes:
        layers: indices of the chunk's decoder layers in the model.
        embedding: whether it has the embedding.
        mtp: whether it has the MTP layers.
        final_norm: whether it has the norm after the last decoder layer; a model with MTP layers
            has it on the chunk of that layer, not on that of the head.
        head: whether it has the output head."""

    layers: tuple[int, ...]
    embedding: bool = True
    mtp: bool = False
    final_norm: bool = True
    head: bool = True


def num_chunks(parallel: ParallelConfig) -> int:
    """Return the model chunks of a pipeline rank.

    Args:
        parallel: the recipe's section.

    Raises:
        UserError: `pipeline_layout` cannot be read."""
    if parallel.pipeline_layout:
        return len(parse_layout(parallel.pipeline_layout)) // parallel.pipeline
    return parallel.virtual_pipeline


def pipeline_stages(
    num_layers: int,
    pipeline: int = 1,
    virtual: int = 1,
    *,
    num_mtp: int = 0,
    layout: str | None = None,
) -> list[list[ModelChunk]]:
    """Return the model chunks of each stage, result[pipeline rank][virtual stage].

    Args:
        num_layers: decoder layers of the model.
        pipeline: pipeline ranks.
        virtual: virtual stages of a rank.
        num_mtp: MTP layers of the model as built.
        layout: Megatron's string, one group per chunk in the order micro-batches pass them, split
            by "|": E embedding, t decoder layer, m MTP layer, L head and loss; x*3 and (xy|)*3
            repeat, commas are ignored. Its number of groups sets the virtual stages. None: the
            layers are spread evenly, or as evenly as they can be (`uneven_layout`), the embedding
            on the first chunk, MTP layers and head on the last.

    Raises:
        UserError: a layout that Megatron would refuse or silently build differently, or fewer
            layers than chunks."""
    layout = layout or _balanced_layout(num_layers, pipeline, virtual, num_mtp)
    groups = parse_layout(layout)
    _check_layout(layout, groups, num_layers, pipeline, virtual, num_mtp)
    stages: list[list[ModelChunk]] = [[] for _ in range(pipeline)]
    start = 0
    for index, group in enumerate(groups):
        end = start + group.count("t")
        last_layer = start < end == num_layers
        head = "L" in group
        stages[index % pipeline].append(
            ModelChunk(
                layers=tuple(range(start, end)),
                embedding="E" in group,
                mtp="m" in group,
                # Megatron moves the norm to the last decoder layer's chunk for MTP layers only.
                final_norm=last_layer if num_mtp else head,
                head=head,
            )
        )
        start = end
    return stages


def uneven_layout(
    num_layers: int, pipeline: int, virtual: int = 1, *, num_mtp: int = 0
) -> str | None:
    """Return the layout, in Megatron's letters, of layers that do not divide evenly over the
    chunks; None where they do.

    Each chunk has one layer more than another at most. Those with one more are in the middle: the
    first has the embedding besides, the last the head and the MTP layers, which cost more.

    Args:
        num_layers: decoder layers of the model.
        pipeline: pipeline-parallel ranks.
        virtual: chunks of each rank.
        num_mtp: MTP layers.

    Raises:
        UserError: fewer layers than chunks."""
    layout = _balanced_layout(num_layers, pipeline, virtual, num_mtp)
    return layout if num_layers % (pipeline * virtual) else None


def _balanced_layout(num_layers: int, pipeline: int, virtual: int, num_mtp: int) -> str:
    chunks = pipeline * virtual
    length, num_extra = divmod(num_layers, chunks)
    if not length:
        raise UserError(
            f"parallel.pipeline={pipeline} x parallel.virtual_pipeline={virtual} are {chunks} "
            f"stages, and the model has {num_layers} layers: lower one of them, or spell the "
            "stages out, empty ones too, with parallel.pipeline_layout",
            key="parallel.pipeline",
            cause=Cause.TOO_LARGE,
        )
    costliest_last = [*range(1, chunks - 1), 0]
    longer_chunks = costliest_last[:num_extra]
    groups = ["t" * (length + (chunk in longer_chunks)) for chunk in range(chunks)]
    return "E" + "|".join(groups) + "m" * num_mtp + "L"


def parse_layout(layout: str) -> list[str]:
    """Expand "Et|(tt|)*2mL" to ["Et", "tt", "tt", "mL"]; UserError for other syntax."""
    text = re.sub(r"[,\s]", "", layout)
    return "".join(_unrolled_items(text, layout)).split("|")


def _unrolled_items(text: str, layout: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if not match:
            raise UserError(
                f"parallel.pipeline_layout={layout!r}: {text[position:]!r} is not understood; "
                "write E, t, m, L and | with repetitions: t*3, (tt|)*29, no bracket within another",
                key="parallel.pipeline_layout",
                cause=Cause.MALFORMED,
            )
        group, num_times, item, repeats = match.groups()
        if item:
            yield item * int(repeats or 1)
        else:
            yield "".join(_unrolled_items(group, layout)) * int(num_times)
        position = match.end()


def _check_layout(
    layout: str, groups: Sequence[str], num_layers: int, pipeline: int, virtual: int, num_mtp: int
) -> None:
    """Raise UserError where a layout does not have each layer once, in Megatron's order."""

    def refuse(reason: str, cause: Cause = Cause.MALFORMED) -> None:
        raise UserError(
            f"parallel.pipeline_layout={layout!r}: {reason}",
            key="parallel.pipeline_layout",
            cause=cause,
        )

    if len(groups) % pipeline:
        refuse(
            f"{len(groups)} stages are not a multiple of parallel.pipeline={pipeline}",
            Cause.INDIVISIBLE,
        )
    if virtual > 1 and virtual != len(groups) // pipeline:
        refuse(
            f"{len(groups)} stages over parallel.pipeline={pipeline} are {len(groups) // pipeline} "
            f"virtual stages, parallel.virtual_pipeline is {virtual}",
            Cause.CONFLICT,
        )
    flat_layout = "".join(groups)
    for kind, name, expected_count in (
        ("E", "the embedding", 1),
        ("L", "the loss", 1),
        ("t", "decoder layers", num_layers),
        ("m", "MTP layers", num_mtp),
    ):
        if flat_layout.count(kind) != expected_count:
            refuse(
                f"{name} ({kind}) must stand there {expected_count} times, not "
                f"{flat_layout.count(kind)}",
                Cause.CONFLICT,
            )
    if flat_layout[0] != "E" or flat_layout[-1] != "L":
        refuse("it must begin with E and end with L")
    if "m" in flat_layout and flat_layout.rindex("t") > flat_layout.index("m"):
        refuse("MTP layers (m) come after all decoder layers (t)")
    with_mtp = [index for index, group in enumerate(groups) if "m" in group]
    if len(with_mtp) > 1 or (with_mtp and with_mtp[0] < len(groups) - pipeline):
        refuse("MTP layers (m) must be together in the last virtual stage of their rank")
