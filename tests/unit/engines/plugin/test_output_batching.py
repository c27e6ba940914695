"""What an engine's core keeps back for its server (`engines.plugin.output_batching`), on stand-ins
with the fields of vLLM's messages."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_r1.engines.plugin.output_batching import MOST_TOKENS, OTHER_FIELDS, OutputBuffer


class Logprobs(NamedTuple):
    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray
    cu_num_generated_tokens: list[int] | None = None


class SamplingMasks(NamedTuple):
    token_ids: np.ndarray
    offsets: np.ndarray | None = None


def output(request: str, token: int, **fields: Any) -> SimpleNamespace:
    logprobs = Logprobs(np.array([[token]]), np.array([[-token / 2]]), np.array([0]))
    others = dict.fromkeys(OTHER_FIELDS)
    return SimpleNamespace(
        **{"request_id": request, "new_token_ids": [token], "new_logprobs": logprobs}
        | {"prefill_stats": None, "new_sampling_mask": None}
        | others
        | fields
    )


def step(held: OutputBuffer, *outputs: SimpleNamespace, whole: bool = True, **fields: Any) -> list:
    """The outputs that are sent after a step of one client."""
    others = {"scheduler_stats": None, "finished_requests": None, "wave_complete": None}
    message = SimpleNamespace(outputs=list(outputs), **others | fields)
    sent = held.buffer({0: message}, lambda request: whole)
    return sent[0].outputs if sent else []


def test_a_response_is_sent_whole_when_it_ends():
    held = OutputBuffer()
    assert step(held, output("a", 1, prefill_stats="prefill"), output("b", 5)) == []
    assert step(held, output("a", 2), output("b", 6)) == []
    (sent,) = step(held, output("a", 3, finish_reason="stop"), output("b", 7))
    assert sent.request_id == "a" and sent.new_token_ids == [1, 2, 3]
    assert (sent.finish_reason, sent.prefill_stats) == ("stop", "prefill")
    assert sent.new_logprobs.logprob_token_ids.tolist() == [[1], [2], [3]]
    assert sent.new_logprobs.logprobs.tolist() == [[-0.5], [-1.0], [-1.5]]
    assert sent.new_logprobs.sampled_token_ranks.tolist() == [0, 0, 0]
    assert held.flush()[0][0].new_token_ids == [5, 6, 7]  # b's
    assert held.flush() == {}


def test_sampling_masks_are_joined_token_by_token():
    held = OutputBuffer()
    one = SamplingMasks(np.array([4, 9], np.int32))
    drafted = SamplingMasks(np.array([1, 2, 3], np.int32), np.array([0, 1, 3]))
    assert step(held, output("a", 9, new_sampling_mask=one)) == []
    assert step(held, output("a", 3, new_token_ids=[1, 3], new_sampling_mask=drafted)) == []
    none = SamplingMasks(np.array([], np.int32))
    (sent,) = step(held, output("a", 7, new_sampling_mask=none, finish_reason="stop"))
    assert sent.new_token_ids == [9, 1, 3, 7]
    assert sent.new_sampling_mask.token_ids.tolist() == [4, 9, 1, 2, 3]
    assert sent.new_sampling_mask.offsets.tolist() == [0, 2, 3, 5, 5]


def test_clients_that_read_every_token_get_it_at_once():
    held = OutputBuffer()
    sent = step(held, output("a", 1), whole=False)
    assert [each.new_token_ids for each in sent] == [[1]]


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_what_is_more_than_tokens_is_sent_with_all_before_it(field):
    held = OutputBuffer()
    step(held, output("a", 1))
    (sent,) = step(held, output("a", 2, **{field: "something"}))
    assert sent.new_token_ids == [1, 2] and getattr(sent, field) == "something"


def test_a_long_response_is_sent_in_chunks():
    held = OutputBuffer()
    sent = [step(held, output("a", token)) for token in range(2 * MOST_TOKENS)]
    assert [len(each[0].new_token_ids) for each in sent if each] == [MOST_TOKENS, MOST_TOKENS]
    assert sent[MOST_TOKENS - 1][0].new_token_ids == list(range(MOST_TOKENS))


def test_a_message_without_outputs_is_kept_where_it_says_something_else():
    held = OutputBuffer()
    finished = {"scheduler_stats": None, "finished_requests": {"c"}, "wave_complete": None}
    message = SimpleNamespace(outputs=[output("a", 1)], **finished)
    assert held.buffer({0: message}, lambda request: True) == {0: message}
    assert message.outputs == []


def test_aborted_requests_leave_nothing():
    held = OutputBuffer()
    step(held, output("a", 1), output("b", 2))
    held.discard(["a", "unknown"])
    assert [each.request_id for each in held.flush()[0]] == ["b"]
