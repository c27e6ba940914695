"""Packed batches and their denominators; nothing here needs the platform's patches."""

import random

import pytest
import torch
from refusals import raised, refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.user_code import find_function
from megatron_r1.controller.trainer_calls.packing import pack_by_prompt
from megatron_r1.models.sampling_mask import encode_mask
from megatron_r1.models.shared_prefixes import marked_prefixes
from megatron_r1.trainer.losses import loss_denominator, supervised_loss
from megatron_r1.trainer.prefix_matching import MIN_SHARED_TOKENS
from megatron_r1.trainer.sequence_packing import check_token_ids, pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample

CPU = torch.device("cpu")


def batch(multiple_of=1):
    first = Sample.pack([7, 8, 9], [10, 11], [-0.5, -0.25], outcome_advantage=2.0)
    second = Sample.pack([5], [6, 1, 2], [-1.0, -2.0, -3.0], outcome_advantage=-1.0)
    return pack_batch([first, second], TokenSplit(tensor_size=multiple_of), CPU)


def test_positions_targets_and_borders_by_hand():
    b = batch()
    assert b.input_ids.tolist() == [[7, 8, 9, 10, 11, 5, 6, 1, 2]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9]
    seen = b.is_response
    assert b.response_positions.tolist() == [2, 3, 5, 6, 7]
    assert b.targets[seen].tolist() == [10, 11, 6, 1, 2]
    assert b.rollout_logprobs[seen].tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0]
    assert b.advantages[seen].tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]
    assert b.num_responses == 2


def test_padding_for_sequence_parallelism_adds_a_sample_that_counts_nothing():
    b = batch(multiple_of=4)
    assert b.input_ids.shape == (1, 12)
    assert b.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert b.is_response.sum() == 5 and b.num_responses == 2


def test_a_microbatch_without_samples_counts_nothing():
    b = pack_batch([], TokenSplit(tensor_size=2), CPU)
    assert b.input_ids.shape == (1, 2) and len(b.response_positions) == 0
    assert loss_denominator(b, "sequence") == 0 and loss_denominator(b, "token") == 0


def test_denominators_count_response_tokens_or_responses():
    assert loss_denominator(batch(), "token") == 5
    assert loss_denominator(batch(), "sequence") == loss_denominator(batch(), "constant") == 2
    with raised(ValueError, "sequence"):
        loss_denominator(batch(), "sample")


def test_given_tokens_between_sampled_ones_count_nothing():
    tokens, mask = [3, 4, 5, 6, 7, 8], bytes([0, 0, 1, 0, 0, 1])
    fields = {"weight": 0.25, "num_responses": 0, "teacher_logprobs": [-7.0, -8.0]}
    first = Sample.pack_branch(tokens, mask, [9.0, 9.0, -1.0, 9.0, 9.0, -2.0], 0.5, **fields)
    second = Sample.pack([1], [2], [-3.0], 1.5, teacher_logprobs=[-9.0])
    b = pack_batch([first, second], TokenSplit(), CPU)
    assert b.response_positions.tolist() == [1, 4, 6]
    assert b.targets[b.is_response].tolist() == [5, 8, 2]
    assert b.rollout_logprobs.tolist() == [0, -1.0, 0, 0, -2.0, 0, -3.0, 0]
    assert b.advantages.tolist() == [0, 0.5, 0, 0, 0.5, 0, 1.5, 0]
    assert b.logprobs["teacher"].tolist() == [0, -7.0, 0, 0, -8.0, 0, -9.0, 0]
    assert b.sequence_weights.tolist() == [0, 0.125, 0, 0, 0.125, 0, 1.0, 0]
    # The first is not the first branch of its episode.
    assert loss_denominator(b, "token") == 3 and loss_denominator(b, "sequence") == 1
    assert pack_batch([second], TokenSplit(), CPU).sequence_weights is None


def kept_at(mask, position):
    return mask.token_ids[mask.offsets[position] : mask.offsets[position + 1]].tolist()


def test_kept_tokens_lie_where_their_token_is_predicted():
    tokens, mask = [3, 4, 5, 6, 7, 8], bytes([0, 0, 1, 0, 0, 1])
    fields = {"weight": 0.25, "num_responses": 1}
    kept = encode_mask([[], [], [1, 5], [], [], [8]])
    first = Sample.pack_branch(tokens, mask, [0.0] * 6, 0.5, sampling_mask=kept, **fields)
    second = Sample.pack([1], [2], [-3.0], 1.5, sampling_mask=encode_mask([[0, 2, 9]]))
    untrained = Sample.pack([1], [], [], float("nan"))
    b = pack_batch([first, untrained, second], TokenSplit(), CPU)
    assert b.sampling_mask.token_ids.tolist() == [1, 5, 8, 0, 2, 9]
    assert b.sampling_mask.offsets.tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 6, 6]
    assert b.targets[b.is_response].tolist() == [5, 8, 2]
    without = Sample.pack([1], [2], [-3.0], 1.5)
    assert pack_batch([without], TokenSplit(), CPU).sampling_mask is None
    with raised(ValueError, "sampling masks"):
        pack_batch([second, without], TokenSplit(), CPU)
    with raised(ValueError, "sampling mask", "2 tokens"):
        pack_batch([Sample.pack([1], [2, 3], sampling_mask=kept)], TokenSplit(), CPU)


def test_context_ranks_hold_the_kept_tokens_of_their_positions():
    draw = random.Random(0)
    samples = []
    for length in (1, 9, 30):
        response = [draw.randrange(50) for _ in range(length)]
        kept = [sorted({token, *draw.sample(range(50), draw.randrange(6))}) for token in response]
        prompt = [60] * draw.randrange(1, 7)
        samples.append(
            Sample.pack(prompt, response, [0.0] * length, sampling_mask=encode_mask(kept))
        )
    whole = pack_batch(samples, TokenSplit(context_size=2), CPU)
    assert whole.sampling_mask is not None
    found = []
    for rank in range(2):
        part = pack_batch(samples, TokenSplit(context_size=2, context_rank=rank), CPU)
        assert part.sampling_mask.offsets[-1] == len(part.sampling_mask.token_ids)
        for row in range(len(part.targets)):
            own = kept_at(part.sampling_mask, row)
            assert bool(own) == bool(part.is_response[row])
            if own:
                assert int(part.targets[row]) in own
                found.append((int(part.targets[row]), own))
    every = pack_batch(samples, TokenSplit(), CPU)
    rows = every.response_positions.tolist()
    expected = [(int(every.targets[row]), kept_at(every.sampling_mask, row)) for row in rows]
    assert sorted(found) == sorted(expected) and len(expected) == 40


def test_a_prompt_of_several_samples_lies_there_once():
    made = [
        Sample.pack([7, 8, 9], [1, 2], [-1.0, -2.0], 0.5),
        Sample.pack([7, 8], [3], [-3.0], 1.5),
        Sample.pack([7, 8, 9], [4], [-4.0], 2.5),
        Sample.pack([7, 8, 9], [], []),
    ]
    b = pack_batch(made, TokenSplit(tensor_size=4), CPU, share_prompts=True)
    assert b.input_ids.tolist() == [[7, 8, 9, 1, 2, 8, 3, 9, 4, 9, 0, 0]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 1, 2, 2, 3, 2, 0, 1]]
    assert b.response_positions.tolist() == [2, 3, 5, 7]
    assert b.targets[b.is_response].tolist() == [1, 2, 3, 4]
    assert b.advantages[b.is_response].tolist() == [0.5, 0.5, 1.5, 2.5]
    assert b.last_token_positions.tolist() == [4, 6, 8, 9] and b.num_responses == 4
    assert b.cu_seqlens.tolist() == [0, 5, 7, 9, 10, 12] and b.num_shared_tokens == 5
    continued = marked_prefixes(b.packed_seq_params.cu_seqlens_q)
    assert continued.parent.tolist() == [-1, 0, 0, 0, -1]
    assert continued.start.tolist() == [0, 1, 2, 2, 0]
    assert b.packed_seq_params.max_seqlen_q == 5
    alone = pack_batch(made[:1], TokenSplit(), CPU, share_prompts=True)
    assert alone.num_shared_tokens == 0
    assert marked_prefixes(alone.packed_seq_params.cu_seqlens_q) is None


def branch(tokens, sampled, advantage, **fields):
    """A branch whose tokens at the places `sampled` are trained on."""
    mask = bytes(place in sampled for place in range(len(tokens)))
    logprobs = [-float(token) for token in tokens]
    return Sample.pack_branch(tokens, mask, logprobs, advantage, **fields)


def test_turns_of_a_tree_lie_there_once_each_trained_in_its_own_branch():
    prompt = [*range(20, 40)]
    fields = {"weight": 0.5, "num_responses": 1}
    first = branch([*prompt, 1, 2, 50, 3], {20, 21, 23}, 0.5, **fields)
    # Goes on after token 2, which only the first branch trains.
    second = branch([*prompt, 1, 2, 51, 4, 5], {23, 24}, 1.5, **fields)
    third = branch([*prompt, 1, 2, 51, 4, 52, 6], {25}, 2.5, **fields)
    b = pack_batch([first, second, third], TokenSplit(), CPU, share_prompts=True)
    assert b.input_ids.tolist() == [[*prompt, 1, 2, 50, 3, 51, 4, 5, 52, 6]]
    assert b.position_ids.tolist() == [[*range(24), 22, 23, 24, 24, 25]]
    continued = marked_prefixes(b.packed_seq_params.cu_seqlens_q)
    assert continued.parent.tolist() == [-1, 0, 1] and continued.start.tolist() == [0, 22, 24]
    assert b.cu_seqlens.tolist() == [0, 24, 27, 29] and b.num_shared_tokens == 46
    assert b.response_positions.tolist() == [19, 20, 22, 24, 25, 27]
    assert b.targets[b.is_response].tolist() == [1, 2, 3, 4, 5, 6]
    assert b.rollout_logprobs[b.is_response].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert b.advantages[b.is_response].tolist() == [0.5, 0.5, 0.5, 1.5, 1.5, 2.5]
    # The packing puts them into an order in which each has its host before it.
    packing = pack_by_prompt([third, first, second], 1, 29, float)
    assert packing.shares == [[[1, 2, 0]]] and packing.fill_fraction == 1.0
    # Two micro-batches: the third shares nothing, as its host is in the other.
    cut = pack_by_prompt([third, first, second], 1, 27, float)
    assert sorted(cut.shares[0]) == [[0], [1, 2]]


def test_equal_beginnings_of_different_questions_are_shared_from_a_length_on():
    for shared, saved in ((MIN_SHARED_TOKENS - 1, 0), (MIN_SHARED_TOKENS, MIN_SHARED_TOKENS)):
        made = [Sample.pack([*range(shared), 90 + i, 7], [3]) for i in range(2)]
        b = pack_batch(made, TokenSplit(), CPU, share_prompts=True)
        assert b.num_shared_tokens == saved


def test_samples_of_one_prompt_are_packed_together_as_far_as_the_limit_goes():
    draw = random.Random(0)
    made = [Sample.pack([p] * 20, [1] * draw.randrange(1, 9)) for p in range(6) for _ in range(7)]
    draw.shuffle(made)
    packing = pack_by_prompt(made, 2, 64, float)
    assert sorted(i for own in packing.shares for m in own for i in m) == [*range(42)]
    batches = [
        pack_batch([made[i] for i in m], TokenSplit(), CPU, share_prompts=True)
        for own in packing.shares
        for m in own
    ]
    assert max(b.input_ids.shape[1] for b in batches) <= 64
    saved, possible = sum(b.num_shared_tokens for b in batches), 6 * 6 * 19
    assert saved > 0.7 * possible, "a prompt of 7 samples fits into two micro-batches"
    group = [Sample.pack([*range(20)], [n % 7, n]) for n in range(256)]
    whole = pack_by_prompt(group, 1, 22 + 255 * 3, float)
    assert [len(m) for own in whole.shares for m in own] == [256]
    few = pack_by_prompt(made[:3], 3, 64, float)
    assert [len(m) for own in few.shares for m in own] == [1, 1, 1]


def test_a_response_may_be_empty():
    b = pack_batch([Sample.pack([3, 4], [])], TokenSplit(), CPU)
    assert len(b.response_positions) == 0 and loss_denominator(b, "sequence") == 1


def test_samples_that_do_not_fit_together_are_refused():
    with raised(ValueError, 2, 1):
        Sample.pack([1], [2, 3], [-1.0])
    with raised(ValueError, "prompt"):
        Sample.pack([], [2])


def test_a_loss_is_found_by_name_or_refused():
    assert find_function("megatron_r1.trainer.losses:supervised_loss") is supervised_loss
    with raised(ValueError, "nowhere"):
        find_function("nowhere:x")


@pytest.mark.parametrize("wrong", [12, -1])
def test_tokens_that_the_model_does_not_have_are_refused(wrong):
    check_token_ids([Sample.pack([0, 11], [3])], 12)
    with refused("model.path", Cause.CONFLICT, wrong, "vocab_size", 12):
        check_token_ids([Sample.pack([0], [11]), Sample.pack([1, 2], [wrong])], 12)
