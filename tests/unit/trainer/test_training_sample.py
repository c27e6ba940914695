"""Samples on their way to a rank: a share arrives as it was sent, in parts of any size."""

import random
from array import array

import pytest
from refusals import raised

from megatron_r1.models.sampling_mask import concat_masks, encode_mask
from megatron_r1.trainer import sample_encoding
from megatron_r1.trainer.sample_encoding import ReplicaSamples, decode_samples, encode_samples
from megatron_r1.trainer.training_sample import Sample


def share(draw: random.Random) -> ReplicaSamples:
    def sample() -> Sample:
        prompt, length = [1, 2, 70_000], draw.choice([0, 1, 5, 300])
        response = array("i", [draw.randrange(1 << 17) for _ in range(length)])
        logprobs = array("f", [-draw.random() for _ in range(length)])
        teacher = draw.choice([None, logprobs])
        routing = draw.choice([b"", draw.randbytes(64 * length)])
        given = draw.choice([None, logprobs])
        kept = draw.choice([b"", encode_mask([[token, token + 1] for token in response])])
        whole = Sample.pack(prompt, response, given, draw.random(), routing, teacher, 1.0, kept)
        if length < 2 or given is None or draw.random() < 0.5:
            return whole
        is_sampled = bytes([0, 0, 0, 1, *(draw.choice([0, 1]) for _ in response[1:])])
        return Sample.pack_branch(
            *([*prompt, *response], is_sampled, [0.0] * 3 + list(given), draw.random()),
            **{
                "weight": draw.random(),
                "num_responses": draw.choice([0, 1]),
                "routing": routing,
                "sampling_mask": concat_masks([(b"", 3), (kept, length)]),
            },
        )

    return [[[sample() for _ in range(draw.choice([0, 1, 4]))] for _ in range(3)] for _ in range(2)]


@pytest.mark.parametrize("joined_bytes", [1, 200, 1 << 16])
def test_a_share_arrives_as_it_was_sent(joined_bytes, monkeypatch):
    monkeypatch.setattr(sample_encoding, "JOINED_BYTES", joined_bytes)
    for seed in range(20):
        sent = share(random.Random(seed))
        headers, *parts = encode_samples(sent)
        got = decode_samples(headers, memoryview(b"".join(parts)))
        assert got == sent
        assert [s.teacher_logprobs is None for u in got for m in u for s in m] == [
            s.teacher_logprobs is None for u in sent for m in u for s in m
        ]


def test_large_buffers_are_sent_without_a_copy():
    logprobs = array("f", [0.5]) * sample_encoding.JOINED_BYTES
    sample = Sample.pack([1], array("i", [2]) * len(logprobs), logprobs)
    [part] = [p for p in encode_samples([[[sample]]]) if isinstance(p, memoryview)]
    logprobs[-1] = 0.25
    assert part.cast("f")[-1] == 0.25


def test_lists_and_arrays_pack_alike():
    ids, floats = [5, 6], [-0.1, -0.2]
    of_arrays = Sample.pack(array("i", [1, 2]), array("i", ids), array("f", floats))
    assert Sample.pack([1, 2], ids, floats) == of_arrays
    assert of_arrays.token_ids == array("i", [1, 2, 5, 6]).tobytes()
    assert Sample.pack([1, 2], ids, array("d", floats)) == of_arrays


def test_a_branch_is_packed_from_its_first_to_its_last_sampled_token():
    tokens, is_sampled = array("i", range(10, 18)), bytes([0, 0, 1, 1, 0, 1, 0, 0])
    logprobs, routing = array("f", [0, 0, -1, -2, 0, -3, 0, 0]), bytes(range(7 * 2))
    sample = Sample.pack_branch(
        *(tokens, is_sampled, logprobs, 0.5),
        **{
            "weight": 0.25,
            "num_responses": 0,
            "routing": routing,
            "teacher_logprobs": [-4, -5, -6],
        },
        sampling_mask=encode_mask([[], [], [12, 30], [13], [], [9, 15], [], []]),
    )
    assert sample.sampling_mask == encode_mask([[12, 30], [13], [], [9, 15]])
    assert sample.token_ids == tokens[:6].tobytes() and sample.prompt_length == 2
    assert sample.is_sampled == bytes([1, 1, 0, 1]) and sample.routing == routing[: 5 * 2]
    assert sample.rollout_logprobs == array("f", [-1, -2, 0, -3]).tobytes()
    assert sample.teacher_logprobs == array("f", [-4, -5, 0, -6]).tobytes()
    assert (sample.outcome_advantage, sample.weight, sample.num_responses) == (0.5, 0.25, 0)


def test_a_branch_of_one_turn_is_a_single_turn_s_sample():
    numbers = [0.0, 0.0, -1.0, -2.0]
    whole = {"weight": 1.0, "num_responses": 1}
    branch = Sample.pack_branch([1, 2, 3, 4], bytes([0, 0, 1, 1]), numbers, 0.5, **whole)
    assert branch == Sample.pack([1, 2], [3, 4], numbers[2:], 0.5)


@pytest.mark.parametrize("is_sampled", [bytes(3), bytes([1, 0, 0]), bytes([0, 1])])
def test_a_branch_without_prompt_or_sampled_token_is_refused(is_sampled):
    with raised(ValueError, 3, len(is_sampled)):
        Sample.pack_branch([1, 2, 3], is_sampled, [0.0] * 3, 0.0, weight=1.0, num_responses=1)
