"""The shapes that a pipeline rank expects, against what its neighbors send in Megatron's order."""

from types import SimpleNamespace

import pytest

from megatron_r1.models import platform

platform.prepare_process()

from megatron.core.pipeline_parallel.schedules import get_schedule_table  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import (  # noqa: E402
    PipelineParallelLayerLayout,
)

from megatron_r1.trainer.stage_communication import shapes_to_receive  # noqa: E402

LENGTHS = [8, 24, 16, 40, 32, 48, 64, 56]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("early", [False, True], ids=["MTP with the head", "MTP before it"])
def test_every_rank_expects_what_the_one_before_and_the_one_behind_send(ranks, chunks, early):
    lengths = LENGTHS[: len(LENGTHS) // ranks * ranks]
    stages = ranks * chunks
    layout = "|".join(["Et", *["t"] * (stages - 2)]) + ("m|L" if early else "|mL")
    config = SimpleNamespace(
        microbatch_group_size_per_vp_stage=ranks,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        hidden_size=12,
        mtp_num_layers=1,
        pipeline_model_parallel_layout=PipelineParallelLayerLayout(layout, ranks),
    )
    mtp = stages - 2 if early else stages - 1
    order = [(number, 0) for number in range(len(lengths))]
    if chunks > 1:
        order = get_schedule_table(len(lengths), chunks, ranks)

    def sent(stage: int, number: int) -> list[int]:
        """What a stage sends on of a micro-batch; its gradient comes back with that shape."""
        return [(2 if stage >= mtp else 1) * lengths[number] // 2, 1, 12]

    for rank in range(ranks):
        ahead = [(chunk * ranks + rank, number) for number, chunk in order]
        on = [sent(*of) for of in ahead if of[0] < stages - 1]
        back = [((chunks - 1 - chunk) * ranks + rank, number) for number, chunk in order]
        returned = [sent(stage - 1, number) for stage, number in back if stage > 0]
        for neighbor, expected, forward in ((rank + 1, on, True), (rank - 1, returned, False)):
            at = (config, lengths, chunks, True, neighbor % ranks, ranks)
            assert [*shapes_to_receive(*at, forward=forward)] == expected
    assert not [*shapes_to_receive(config, lengths, 1, True, 0, 1, forward=True)]
