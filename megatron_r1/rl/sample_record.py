"""A finished group as bytes and back, exact to the bit."""

from __future__ import annotations

from array import array

import msgspec

from megatron_r1.data.prompts import Prompt
from megatron_r1.engine.client import Response
from megatron_r1.rl.sampling import Group, Output


class ResponseRecord(msgspec.Struct, array_like=True, frozen=True):
    """One response; the arrays as in `Response` and `Output`, little-endian. text, reason: UTF-8
    that may hold lone surrogates, which msgpack's strings must not."""

    token_ids: bytes
    logprobs: bytes
    policy_versions: bytes
    finish_reason: str
    routing: bytes
    text: bytes
    rewards: dict[str, float]
    reward: float
    reason: bytes
    ungraded: tuple[str, ...]
    is_graded: bool
    teacher_logprobs: bytes | None = None


class GroupRecord(msgspec.Struct, array_like=True, frozen=True, tag="group"):
    """position: of its prompt among all that the step drew; prompt_id: which one that was."""

    position: int
    prompt_id: str
    prompt_ids: bytes
    outputs: tuple[ResponseRecord, ...]


class Accepted(msgspec.Struct, array_like=True, frozen=True, tag="accepted"):
    """The step's batch was complete and found good: from here on it may have been trained on."""


Record = GroupRecord | Accepted

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Record).decode


def pack(position: int, group: Group) -> GroupRecord:
    outputs = tuple(_pack_output(output) for output in group.outputs)
    ids = array("i", group.prompt_ids).tobytes()
    return GroupRecord(position, group.prompt.id, ids, outputs)


def unpack(record: GroupRecord, prompt: Prompt) -> Group:
    """The group as it was; `prompt`: the one with the record's id."""
    outputs = [_unpack_output(output) for output in record.outputs]
    return Group(prompt, _array("i", record.prompt_ids).tolist(), outputs)


def _pack_output(output: Output) -> ResponseRecord:
    made, taught = output.completion, output.teacher_logprobs
    return ResponseRecord(
        made.token_ids.tobytes(),
        made.logprobs.tobytes(),
        made.policy_versions.tobytes(),
        made.finish_reason,
        made.routing,
        output.text.encode("utf-8", "surrogatepass"),
        output.rewards,
        output.reward,
        output.reason.encode("utf-8", "surrogatepass"),
        output.ungraded,
        output.is_graded,
        None if taught is None else taught.tobytes(),
    )


def _unpack_output(record: ResponseRecord) -> Output:
    made = Response(
        _array("i", record.token_ids),
        _array("f", record.logprobs),
        _array("i", record.policy_versions),
        record.finish_reason,
        record.routing,
    )
    return Output(
        made,
        record.text.decode("utf-8", "surrogatepass"),
        record.rewards,
        record.reward,
        record.reason.decode("utf-8", "surrogatepass"),
        record.ungraded,
        record.is_graded,
        None if record.teacher_logprobs is None else _array("f", record.teacher_logprobs),
    )


def _array(code: str, content: bytes) -> array:
    values = array(code)
    values.frombytes(content)
    return values
