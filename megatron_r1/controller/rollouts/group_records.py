"""The binary form of a finished group in the sample log: as bytes and back, exact to the bit
(`to_record`, `from_record`).

`GradedResponse` is not encoded itself: its arrays would become lists, eight times larger, and its
texts may hold lone surrogates, which strings of msgpack must not."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import asdict

from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.episodes import Branch, Episode, EpisodeStatus, Turn
from megatron_r1.engines.server.responses import Response


class TurnRecord(msgspec.Struct, array_like=True, frozen=True):
    """A `Turn`, its text as bytes.

    Attributes:
        role: as in `Turn`.
        text: UTF-8 with surrogates.
        num_tokens: as in `Turn`.
        trained: as in `Turn`.
        policy_version: as in `Turn`."""

    role: str
    text: memoryview
    num_tokens: int
    trained: bool
    policy_version: int | None


class BranchRecord(msgspec.Struct, array_like=True, frozen=True):
    """A `Branch`, its arrays as bytes.

    Attributes:
        token_ids: int32, the whole branch.
        is_sampled: one byte a token.
        logprobs: float32, one per token.
        policy_versions: int32, one per token.
        routing: as in `Branch`.
        sampling_mask: as in `Branch`."""

    token_ids: memoryview
    is_sampled: memoryview
    logprobs: memoryview
    policy_versions: memoryview
    routing: memoryview
    sampling_mask: memoryview = memoryview(b"")


class EpisodeRecord(msgspec.Struct, array_like=True, frozen=True):
    """An `Episode` of the sample log, its texts and arrays as bytes.

    Attributes:
        status: how the episode ended.
        turns: its messages in order.
        branches: its token sequences.
        num_tool_calls: tool calls that the policy made.
        num_tool_errors: those of them whose result was an error.
        tool_seconds: the time in the environment's methods.
        engine_seconds: the time of waiting for engines.
        reason: UTF-8, what ended the episode, if the policy did not."""

    status: EpisodeStatus
    turns: tuple[TurnRecord, ...]
    branches: tuple[BranchRecord, ...]
    num_tool_calls: int
    num_tool_errors: int
    tool_seconds: float
    engine_seconds: float
    reason: memoryview


class ResponseRecord(msgspec.Struct, array_like=True, frozen=True):
    """A `GradedResponse`, flat: arrays as little-endian bytes, texts as UTF-8 with surrogates.

    What was decoded refers to the file: routing may be larger than the memory.

    Attributes:
        token_ids: int32, the response's tokens.
        logprobs: float32, one per token.
        policy_versions: one version where all are the same.
        finish_reason: vLLM's: "stop" or "length".
        routing: the experts' indices, as in `Sample.routing`; empty without replay.
        text: the decoded response.
        rewards: each term alone.
        reward: their weighted sum.
        reason: the grader's explanation.
        ungraded_terms: terms whose grader failed.
        is_graded: whether the response is trained on.
        teacher_logprobs: float32, one per token; None where no teacher computed them.
        episode: None for a single turn.
        engine: the name of the engine that sampled it.
        sampling_mask: the tokens that the sampler kept (`models.sampling_mask`); empty: all.
    """

    token_ids: memoryview
    logprobs: memoryview
    policy_versions: memoryview
    finish_reason: str
    routing: memoryview
    text: memoryview
    rewards: dict[str, float]
    reward: float
    reason: memoryview
    ungraded_terms: tuple[str, ...]
    is_graded: bool
    teacher_logprobs: memoryview | None = None
    episode: EpisodeRecord | None = None
    engine: str = ""
    sampling_mask: memoryview = memoryview(b"")


class SamplingRecord(msgspec.Struct, array_like=True, frozen=True):
    """What the engines were asked for, as `EngineClient.generate` and `truncate_at_stop` take
    it.

    Attributes:
        temperature: divides the logits.
        top_p: the probability mass of a draw.
        max_tokens: the longest response.
        stop_token_ids: the tokens that end a response.
        stop: the strings that end one.
        top_k: the most tokens of a draw; None for all.
        min_p: the least probability of a token, as a share of the likeliest one's."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    top_k: int | None = None
    min_p: float = 0.0


class GroupRecord(msgspec.Struct, array_like=True, frozen=True, tag="group"):
    """One finished group of the sample log.

    Attributes:
        prompt_index: the index of the group's prompt among all that the step drew.
        prompt_id: the id of that prompt.
        prompt_ids: int32, the prompt's tokens.
        responses: all of the group.
        schedule: `config.schedule.digest_until` the step, under which it was sampled.
        sampling: how it was sampled; None in the records of earlier versions of this program.
    """

    prompt_index: int
    prompt_id: str
    prompt_ids: memoryview
    responses: tuple[ResponseRecord, ...]
    schedule: str = ""
    sampling: SamplingRecord | None = None


class CommitRecord(msgspec.Struct, array_like=True, frozen=True, tag="accepted"):
    """The step's batch was complete and its grades were checked: it may have been trained on.

    Attributes:
        schedule: as in `GroupRecord`."""

    schedule: str = ""


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(GroupRecord | CommitRecord).decode


def to_record(
    prompt_index: int, group: Group, schedule: str = "", sampling: SamplingRecord | None = None
) -> GroupRecord:
    """Return the record of `group`.

    Args:
        prompt_index: the index of the group's prompt among all that the step drew.
        group: the finished group.
        schedule: as in `GroupRecord`.
        sampling: how it was sampled."""
    records = tuple(_to_response_record(graded) for graded in group.responses)
    prompt_ids = memoryview(array("i", group.prompt_ids))
    return GroupRecord(prompt_index, group.prompt.id, prompt_ids, records, schedule, sampling)


def from_record(record: GroupRecord, prompt: Prompt) -> Group:
    """Return the group that `record` was made from.

    Args:
        record: the group as it is in the log.
        prompt: the prompt with the record's id."""
    responses = [_from_response_record(response) for response in record.responses]
    return Group(prompt, _read_array("i", record.prompt_ids).tolist(), responses)


def _to_response_record(graded: GradedResponse) -> ResponseRecord:
    response, teacher = graded.response, graded.teacher_logprobs
    return ResponseRecord(
        token_ids=memoryview(response.token_ids),
        logprobs=memoryview(response.logprobs),
        policy_versions=_shorten_versions(response.policy_versions),
        finish_reason=response.finish_reason,
        routing=memoryview(response.routing),
        text=_encode_text(graded.text),
        rewards=graded.rewards,
        reward=graded.reward,
        reason=_encode_text(graded.reason),
        ungraded_terms=graded.ungraded_terms,
        is_graded=graded.is_graded,
        teacher_logprobs=None if teacher is None else memoryview(teacher),
        episode=None if graded.episode is None else _to_episode_record(graded.episode),
        engine=response.engine,
        sampling_mask=memoryview(response.sampling_mask),
    )


def _to_episode_record(episode: Episode) -> EpisodeRecord:
    """Return the record, which has the same fields, its texts and arrays as bytes."""
    turns = [TurnRecord(**vars(turn) | {"text": _encode_text(turn.text)}) for turn in episode.turns]
    branches = [
        BranchRecord(**{name: memoryview(value) for name, value in vars(branch).items()})
        for branch in episode.branches
    ]
    parts = {
        "turns": tuple(turns),
        "branches": tuple(branches),
        "reason": _encode_text(episode.reason),
    }
    return EpisodeRecord(**vars(episode) | parts)


def _from_response_record(record: ResponseRecord) -> GradedResponse:
    teacher = record.teacher_logprobs
    token_ids = _read_array("i", record.token_ids)
    versions = _read_array("i", record.policy_versions)
    if len(versions) == 1:
        versions *= len(token_ids)
    logprobs = _read_array("f", record.logprobs)
    return GradedResponse(
        Response(
            token_ids=token_ids,
            logprobs=logprobs,
            policy_versions=versions,
            finish_reason=record.finish_reason,
            routing=record.routing,
            engine=record.engine,
            sampling_mask=bytes(record.sampling_mask),
        ),
        _decode_text(record.text),
        record.rewards,
        record.reward,
        _decode_text(record.reason),
        record.ungraded_terms,
        record.is_graded,
        None if teacher is None else _read_array("f", teacher),
        None if record.episode is None else _from_episode_record(record.episode),
    )


def _from_episode_record(record: EpisodeRecord) -> Episode:
    turns = [Turn(**asdict(turn) | {"text": _decode_text(turn.text)}) for turn in record.turns]
    branches = [
        Branch(
            _read_array("i", branch.token_ids),
            bytes(branch.is_sampled),
            _read_array("f", branch.logprobs),
            _read_array("i", branch.policy_versions),
            bytes(branch.routing),
            bytes(branch.sampling_mask),
        )
        for branch in record.branches
    ]
    parts = {"turns": turns, "branches": branches, "reason": _decode_text(record.reason)}
    return Episode(**asdict(record) | parts)


def _encode_text(text: str) -> memoryview:
    return memoryview(text.encode("utf-8", "surrogatepass"))


def _decode_text(content: memoryview) -> str:
    return str(content, "utf-8", "surrogatepass")


def _shorten_versions(versions: array[int]) -> memoryview:
    """Return all versions, or one if they are the same: they would be a quarter of a record."""
    numbers = np.asarray(versions)
    is_uniform = len(numbers) > 1 and (numbers == numbers[0]).all()
    return memoryview(versions[:1] if is_uniform else versions)


def _read_array(typecode: str, content: memoryview) -> array[Any]:
    values: array[Any] = array(typecode)
    values.frombytes(content)
    return values
