"""The routing that each rank of a replica has when its leader alone was sent the samples:
`routing_shares.py MODEL OUT GRID…`.

Each rank looks up the experts of every token that its routers process, by the token's number, which
no other token of its sample has. The bytes that the leader sent go to OUT/GRID.json."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from grids import parallel_settings

from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.trainer import distributed, replica
from megatron_r1.trainer.rank_messages import LOAD, RankCall
from megatron_r1.trainer.sample_encoding import encode_samples
from megatron_r1.trainer.training_sample import Sample

LENGTHS = (9, 30, 17, 12, 25)


def config(model: str, grid: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "rl": {"routing_replay": True},
            "parallel": {**parallel_settings(grid), "threads": 1},
        }
    )


def samples(shape) -> list[Sample]:
    """Samples whose token n of sample s is 2 + n, with the experts of `expected`.

    Of the second sample the engine has given the last rows only."""
    made = []
    for number, length in enumerate(LENGTHS):
        rows = [
            [expected(shape, number, token, layer) for layer in range(len(shape.moe_layers))]
            for token in range(2, 1 + length)
        ]
        rows = rows[5:] if number == 1 else rows
        encoded = np.array(rows, "u1").tobytes()
        ids = list(range(2, 2 + length))
        made.append(Sample.pack(ids[:3], ids[3:], [-1.0] * (length - 3), 1.0, encoded))
    return made


def expected(shape, sample: int, token: int, layer: int) -> list[int]:
    first = sample + 3 * token + 5 * layer
    return [(first + k) % shape.num_experts for k in range(shape.topk)]


def check(trainer, shape, grid_position) -> int:
    """Compare every token of this rank; return how many have experts."""
    tensor, at = grid_position.groups.tp, 0
    assert trainer.replay.layers, "the rank has experts to look up"
    for number, batch in enumerate(trainer.rollout.batches):
        own = batch.input_ids[0].chunk(tensor.size())[tensor.rank()].tolist()
        experts, known = batch.routing.experts, batch.routing.is_recorded
        assert experts.shape == (len(own), len(trainer.replay.layers), shape.topk)
        for token, chosen, is_known in zip(own, experts.tolist(), known.tolist(), strict=True):
            has_row = number < len(LENGTHS) and 2 <= token < 1 + LENGTHS[number]
            has_row = has_row and not (number == 1 and token < 7)
            assert is_known == has_row, (number, token)
            if is_known:
                wanted = [expected(shape, number, token, n) for n in trainer.replay.layers]
                assert chosen == wanted, (number, token, chosen, wanted)
            at += is_known
    return at


def main() -> None:
    model, out, *grids = sys.argv[1:]
    platform.prepare_process()
    from megatron_r1.trainer.rank_server import RankServer

    shape = routing_shape(read_hf_config(model))
    for grid in grids:
        settings = config(model, grid)
        grid_position = distributed.initialize(settings.parallel, seed=0)
        from megatron.core import parallel_state

        replica.BROADCAST_BYTES = 101  # several sends
        server = RankServer(settings, grid_position)
        assert grid_position.data_parallel_size == 1
        # One micro-batch each: the number of the sample is that of its batch.
        share = encode_samples([[[sample] for sample in samples(shape)]])
        share = [memoryview(part) for part in share] if server.replica.is_leader else []
        server.run(RankCall(LOAD, {}), share)
        count = torch.tensor([check(server.trainer, shape, grid_position)])
        dist.all_reduce(count)  # over all ranks: each has other tokens or other layers
        if grid_position.rank == 0:
            found = {"sent": server._scatter.sent_bytes, "known": int(count)}
            Path(out, f"{grid}.json").write_text(json.dumps(found))
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
