"""A rank or an engine that is lost in the middle of a push.

huggingface/trl#6796: where the transfer between trainer and engine cannot go on, the trainer waits
in an NCCL broadcast, which has no limit: no line in its log, busy GPUs, until the job's time is
over; the cause is in the server's log alone. NovaSky-AI/SkyRL#1691 is the same in generation.

Here a trainer rank, then the engine, is killed with half of the second push sent or loaded.
"""

import pytest

TWO = ["--parallel.processes", 2, "--parallel.tensor", 2]
# One of 1,000,000 tokens has experts that are so equally good that rounding chooses.
REPLAYED = ["--rl.routing_replay", "true"]
LOST = {
    "dead_sender": (TWO, "trainer rank 1 was killed by signal 9", "trainer/restarts"),
    "dead_receiver": ([], "restart 1 of at most", "engines/restarts"),
}


@pytest.mark.more  # two starts each
@pytest.mark.parametrize("fault", LOST)
def test_the_run_goes_on_and_no_sample_is_of_half_a_push(replay, fault):
    settings, sentence, restarts = LOST[fault]
    ended = replay.run(fault, sentence, *settings, *REPLAYED)
    assert ended.returncode == 0 and ended.seconds is not None, ended.printed
    assert [line["step"] for line in ended.metrics] == [1, 2, 3, 4]
    assert ended.metrics[-1][restarts] == 1
    # An engine with half of the new weights would differ from the trainer by more than 0.01.
    assert max(line["logprob_diff/max"] for line in ended.metrics) < 1e-4
