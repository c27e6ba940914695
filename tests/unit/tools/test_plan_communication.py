"""What ranks send, by hand."""

import pytest
from planned_jobs import real_job

from tools.plan.communication import groups


def test_what_a_rank_sends_by_hand():
    sent = groups(real_job(), 3)
    # 512 samples of 8,704 tokens over 16 replicas in 16 micro-batches, over context 2 and tensor 4.
    split = 32 * 8704 / 16 / 8
    assert sent["pipeline"].microbatch == pytest.approx(split * 7168 * 2 * 2 * 2)
    assert sent["expert"].forward == pytest.approx(4 * 2 * 8 * 1.2 * split * 7168 * 2 * 7 / 8)
    assert sent["data"].size == 32 and sent["data"].microbatch == 0
