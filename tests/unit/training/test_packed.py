"""Packed batches and their denominators; nothing here needs the platform's patches."""

import pytest
import torch

from megatron_r1.training.losses import denominator, supervised
from megatron_r1.training.packed import TokenSplit, check_token_ids, packed_batch
from megatron_r1.training.wire import Sample
from megatron_r1.user_code import find_function

CPU = torch.device("cpu")


def batch(multiple_of=1):
    first = Sample.pack([7, 8, 9], [10, 11], [-0.5, -0.25], advantage=2.0)
    second = Sample.pack([5], [6, 1, 2], [-1.0, -2.0, -3.0], advantage=-1.0)
    return packed_batch([first, second], TokenSplit(tensor=multiple_of), CPU)


def test_positions_targets_and_borders_by_hand():
    b = batch()
    assert b.input_ids.tolist() == [[7, 8, 9, 10, 11, 5, 6, 1, 2]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9]
    seen = b.is_response
    assert b.response_rows.tolist() == [2, 3, 5, 6, 7]
    assert b.targets[seen].tolist() == [10, 11, 6, 1, 2]
    assert b.rollout_logprobs[seen].tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0]
    assert b.advantages[seen].tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert b.num_samples == 2


def test_padding_for_sequence_parallelism_adds_a_sample_that_counts_nothing():
    b = batch(multiple_of=4)
    assert b.input_ids.shape == (1, 12)
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert b.is_response.sum() == 5 and b.num_samples == 2


def test_a_microbatch_without_samples_counts_nothing():
    b = packed_batch([], TokenSplit(tensor=2), CPU)
    assert b.input_ids.shape == (1, 2) and len(b.response_rows) == 0
    assert denominator(b, "sequence") == 0 and denominator(b, "token") == 0


def test_denominators_count_response_tokens_or_responses():
    assert denominator(batch(), "token") == 5
    assert denominator(batch(), "sequence") == denominator(batch(), "constant") == 2
    with pytest.raises(ValueError, match="use token, sequence or constant"):
        denominator(batch(), "sample")


def test_given_tokens_between_sampled_ones_count_nothing():
    tokens, mask = [3, 4, 5, 6, 7, 8], bytes([0, 0, 1, 0, 0, 1])
    scores = {"weight": 0.25, "trajectories": 0, "teacher": [-7.0, -8.0]}
    first = Sample.pack_branch(tokens, mask, [9.0, 9.0, -1.0, 9.0, 9.0, -2.0], 0.5, **scores)
    second = Sample.pack([1], [2], [-3.0], 1.5, teacher=[-9.0])
    b = packed_batch([first, second], TokenSplit(), CPU)
    assert b.response_rows.tolist() == [1, 4, 6]
    assert b.targets[b.is_response].tolist() == [5, 8, 2]
    assert b.rollout_logprobs.tolist() == [0, -1.0, 0, 0, -2.0, 0, -3.0, 0]
    assert b.advantages.tolist() == [0, 0.5, 0, 0, 0.5, 0, 1.5, 0]
    assert b.logprobs["teacher"].tolist() == [0, -7.0, 0, 0, -8.0, 0, -9.0, 0]
    assert b.sequence_weights.tolist() == [0, 0.125, 0, 0, 0.125, 0, 1.0, 0]
    # The first is not the first branch of its trajectory.
    assert denominator(b, "token") == 3 and denominator(b, "sequence") == 1
    assert packed_batch([second], TokenSplit(), CPU).sequence_weights is None


def test_a_response_may_be_empty():
    b = packed_batch([Sample.pack([3, 4], [])], TokenSplit(), CPU)
    assert len(b.response_rows) == 0 and denominator(b, "sequence") == 1


def test_samples_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="2 response tokens but 1 logprobs"):
        Sample.pack([1], [2, 3], [-1.0])
    with pytest.raises(ValueError, match="at least one prompt token"):
        Sample.pack([], [2])


def test_a_loss_is_found_by_name_or_refused():
    assert find_function("megatron_r1.training.losses:supervised") is supervised
    with pytest.raises(ValueError, match="nowhere.*neither installed"):
        find_function("nowhere:x")


@pytest.mark.parametrize("wrong", [12, -1])
def test_tokens_that_the_model_does_not_have_are_refused(wrong):
    check_token_ids([Sample.pack([0, 11], [3])], 12)
    with pytest.raises(ValueError, match=f"token {wrong}, .* vocab_size is 12: .* model.path"):
        check_token_ids([Sample.pack([0], [11]), Sample.pack([1, 2], [wrong])], 12)
