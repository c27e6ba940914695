from dataclasses import replace

from megatron_r1.models.weights.layout import AxisRank, Shard, stage_shards


def shard(
    hf_config: dict,
    *,
    tp: AxisRank = (0, 1),
    pp: AxisRank = (0, 1),
    ep: AxisRank = (0, 1),
    etp: AxisRank = (0, 1),
    vp: AxisRank = (0, 1),
    pipeline_layout: str | None = None,
    with_mtp: bool = True,
    transformer_engine: bool = False,
) -> Shard:
    """Return the Shard at these coordinates."""
    (rank, ranks), (chunk, chunks) = pp, vp
    every = stage_shards(
        hf_config, ranks, chunks, pipeline_layout=pipeline_layout, with_mtp=with_mtp
    )
    return replace(every[rank][chunk], tp=tp, ep=ep, etp=etp, transformer_engine=transformer_engine)
