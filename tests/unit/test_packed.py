"""Packed batches and the weights of their losses; nothing here needs the platform's patches."""

import pytest
import torch

from megatron_r1.training.losses import find_loss, supervised, token_weights
from megatron_r1.training.packed import packed_batch
from megatron_r1.training.wire import Sample

CPU = torch.device("cpu")


def batch(multiple_of=1):
    first = Sample.pack([7, 8, 9], [10, 11], [-0.5, -0.25], advantage=2.0)
    second = Sample.pack([5], [6, 1, 2], [-1.0, -2.0, -3.0], advantage=-1.0)
    return packed_batch([first, second], multiple_of, CPU)


def test_positions_targets_and_borders_by_hand():
    b = batch()
    assert b.input_ids.tolist() == [[7, 8, 9, 10, 11, 5, 6, 1, 2]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9]
    seen = b.is_response
    assert b.targets[seen].tolist() == [10, 11, 6, 1, 2]
    assert seen.nonzero()[:, 0].tolist() == [2, 3, 5, 6, 7]
    assert b.rollout_logprobs[seen].tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0]
    assert b.advantages[seen].tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert b.response_lengths.tolist() == [2, 3] and b.num_samples == 2


def test_padding_for_sequence_parallelism_adds_a_sample_that_counts_nothing():
    b = batch(multiple_of=4)
    assert b.input_ids.shape == (1, 12)
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert b.is_response.sum() == 5 and b.num_samples == 2
    padded, plain = (token_weights(x, "sequence") for x in (b, batch()))
    assert (
        torch.equal(padded[0][:9], plain[0]) and padded[1] == plain[1] and padded[0][9:].sum() == 0
    )


def test_a_microbatch_without_samples_counts_nothing():
    b = packed_batch([], 2, CPU)
    weights, count = token_weights(b, "sequence")
    assert b.input_ids.shape == (1, 2) and weights.sum() == 0 and count == 0


def test_token_and_sequence_averages_by_hand():
    b = batch()
    losses = torch.zeros(9)
    losses[b.is_response] = torch.tensor([1.0, 3.0, 4.0, 5.0, 6.0])
    weights, count = token_weights(b, "token")
    assert (losses @ weights / count).item() == pytest.approx(19 / 5)
    weights, count = token_weights(b, "sequence")
    assert (losses @ weights / count).item() == pytest.approx((2 + 5) / 2)
    with pytest.raises(ValueError, match="use token or sequence"):
        token_weights(b, "sample")


def test_supervised_loss_is_the_negative_log_likelihood_of_the_response():
    b = batch()
    terms = supervised(b, torch.arange(9.0) * -1, torch.zeros(9), {})
    assert terms.loss.item() == 2 + 3 + 5 + 6 + 7
    assert terms.denominator.item() == 5


def test_a_response_may_be_empty():
    b = packed_batch([Sample.pack([3, 4], [])], 1, CPU)
    weights, count = token_weights(b, "sequence")
    assert weights.sum() == 0 and count == 1


def test_samples_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="2 response tokens but 1 logprobs"):
        Sample.pack([1], [2, 3], [-1.0])
    with pytest.raises(ValueError, match="at least one prompt token"):
        Sample.pack([], [2])


def test_a_loss_is_found_by_name_or_refused():
    assert find_loss("megatron_r1.training.losses:supervised") is supervised
    with pytest.raises(ValueError, match="loss nowhere:x"):
        find_loss("nowhere:x")
