"""The binary format of the sample log: a finished group as bytes and back, exact to the bit.

`GradedResponse` is not encoded itself: its arrays would become lists, eight times larger, and its
texts may hold lone surrogates, which strings of msgpack must not."""

from array import array

import msgspec

from megatron_r1.data.prompts import Prompt
from megatron_r1.engine.responses import Response
from megatron_r1.rl.rollout import GradedResponse, Group


class ResponseRecord(msgspec.Struct, array_like=True, frozen=True):
    """A `GradedResponse`, flat: arrays as little-endian bytes, texts as UTF-8 with surrogates."""

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
    """One finished group of the sample log. position: of the group's prompt among all that the step
    drew. prompt_id: of that prompt."""

    position: int
    prompt_id: str
    prompt_ids: bytes
    responses: tuple[ResponseRecord, ...]


class Accepted(msgspec.Struct, array_like=True, frozen=True, tag="accepted"):
    """The step's batch was complete and its grades were checked: it may have been trained on."""


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(GroupRecord | Accepted).decode


def pack(position: int, group: Group) -> GroupRecord:
    """Return the record of `group`."""
    records = tuple(_pack_response(graded) for graded in group.responses)
    prompt_ids = array("i", group.prompt_ids).tobytes()
    return GroupRecord(position, group.prompt.id, prompt_ids, records)


def unpack(record: GroupRecord, prompt: Prompt) -> Group:
    """Return the group that `record` was packed from; `prompt`: the one with the record's id."""
    responses = [_unpack_response(response) for response in record.responses]
    return Group(prompt, _array("i", record.prompt_ids).tolist(), responses)


def _pack_response(graded: GradedResponse) -> ResponseRecord:
    response, teacher = graded.response, graded.teacher_logprobs
    return ResponseRecord(
        response.token_ids.tobytes(),
        response.logprobs.tobytes(),
        response.policy_versions.tobytes(),
        response.finish_reason,
        response.routing,
        graded.text.encode("utf-8", "surrogatepass"),
        graded.rewards,
        graded.reward,
        graded.reason.encode("utf-8", "surrogatepass"),
        graded.ungraded,
        graded.is_graded,
        None if teacher is None else teacher.tobytes(),
    )


def _unpack_response(record: ResponseRecord) -> GradedResponse:
    teacher = record.teacher_logprobs
    token_ids, versions = _array("i", record.token_ids), _array("i", record.policy_versions)
    logprobs = _array("f", record.logprobs)
    return GradedResponse(
        Response(token_ids, logprobs, versions, record.finish_reason, record.routing),
        record.text.decode("utf-8", "surrogatepass"),
        record.rewards,
        record.reward,
        record.reason.decode("utf-8", "surrogatepass"),
        record.ungraded,
        record.is_graded,
        None if teacher is None else _array("f", teacher),
    )


def _array(typecode: str, content: bytes) -> array:
    values: array = array(typecode)
    values.frombytes(content)
    return values
