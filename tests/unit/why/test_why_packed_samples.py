"""`why` on trainers whose packed samples attend to one another."""

import numpy as np
import pytest
import torch
from test_why_engines import NEWEST, Recomputed, dense_model, rows_of

from megatron_r1.why.policy.token_logprobs import sampled_logprobs
from megatron_r1.why.policy.token_rows import join_rows


def test_one_row_attends_to_the_rows_before():
    """By hand: a causal pass over all tokens, with positions from 0 or anew."""
    model, rows = dense_model(), rows_of(3, 7)
    ids = torch.cat([row.token_ids for row in rows])[None]
    is_sampled = torch.cat([row.is_sampled for row in rows])
    for restarts in (True, False):
        (made,), *_ = sampled_logprobs(model, [join_rows(rows, restarts)])
        positions = torch.arange(7).repeat(3) if restarts else torch.arange(21)
        mask = torch.ones(21, 21).tril().log()[None, None]
        out = model(ids, position_ids=positions[None], attention_mask=mask).logits[0].double()
        expected = out.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[is_sampled[1:], 0]
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("restarts", [True, False])
def test_packed_log_probabilities_are_put_back_in_order(restarts):
    model = dense_model()
    recomputed = Recomputed({NEWEST: model}, model, rows_of(5, 9))
    packed = recomputed.packed_logprobs([[2, 0], [4], [1, 3]], restarts=restarts)
    rows = recomputed.models.rows
    (pair,), *_ = sampled_logprobs(model, [join_rows([rows[2], rows[0]], restarts)])
    np.testing.assert_allclose(np.concatenate([packed[2], packed[0]]), pair.numpy(), atol=1e-6)
    for index in (2, 4, 1):  # nothing is before them
        np.testing.assert_allclose(packed[index], recomputed.old_logprobs[index], atol=1e-5)
    assert np.abs(packed[3] - recomputed.old_logprobs[3]).max() > 1e-3
    assert recomputed.packed_logprobs([[0], [1]], restarts=restarts) is None
    assert np.isfinite(np.concatenate(packed)).all()
