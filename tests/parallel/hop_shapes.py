"""Compares what pipeline stages expect of each other with what Megatron has them send ahead:
`hop_shapes.py MODEL GRID…`.

Every grid computes log-probabilities, and trains the MTP layers once, on micro-batches of
different lengths."""

import sys

import torch.distributed as dist
from grids import parallel_settings
from trainer_steps import samples

from megatron_r1.config import Config
from megatron_r1.trainer import distributed

LOSS = "megatron_r1.trainer.losses:supervised_loss"


def main() -> None:
    model, *grids = sys.argv[1:]
    for grid in grids:
        config = Config.model_validate(
            {
                "model": {"path": model, "dtype": "float32", "mtp": "train"},
                "parallel": {**parallel_settings(grid), "threads": 1},
            }
        )
        grid_position = distributed.initialize(config.parallel, seed=0)
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        from megatron_r1.trainer.stage_communication import KnownShapesCommunicator
        from megatron_r1.trainer.trainer import Trainer

        expect, sent = KnownShapesCommunicator._communicate_shapes, set()

        def compare(self, to_next, to_prev, from_prev, from_next, expect=expect, sent=sent):
            told = P2PCommunicator._communicate_shapes(self, to_next, to_prev, from_prev, from_next)
            expected = expect(self, to_next, to_prev, from_prev, from_next)
            assert (*expected,) == (*told,), f"expected {expected}, and {told} was sent"
            sent |= {shape[0] for shape in told if any(shape)}
            return told

        KnownShapesCommunicator._communicate_shapes = compare
        trainer = Trainer(config, grid_position)
        made = samples(4)
        lengths = [len(s) for s in made]
        trainer.load([[made[:5], made[5:6], made[6:9], made[9:]]])
        assert len({*lengths}) > 4, "micro-batches have to differ"
        trainer.compute_logprobs(1.0, with_reference=False)
        trainer.update(0, LOSS, None, 0.01)
        KnownShapesCommunicator._communicate_shapes = expect
        assert len(sent) >= 4, f"{grid}: micro-batches of {sent} tokens only"
        dist.barrier()
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
