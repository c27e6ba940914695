import asyncio
import os
import random
import resource
from array import array
from functools import partial

import msgspec
import pytest

from megatron_r1.base.errors import RunError
from megatron_r1.base.files.framed_records import FRAME_HEADER, FramedFile, append_frame
from megatron_r1.config.schedule import ScheduleEntry, digest_until
from megatron_r1.controller.rollouts.dynamic_sampling import collect_dynamic_rollout
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.controller.rollouts.sample_log import (
    SampleLog,
    SamplingRecord,
    decode,
    encode,
    from_record,
    to_record,
)
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.sampling_mask import encode_mask

PROMPTS = [make_prompt(f"question {i}", "math", str(i), {}) for i in range(8)]
PAYLOADS = [b"first", b"", b"third, \xf5mr1 within", bytes(range(256))]


def write_frames(path) -> list[int]:
    """The payloads as frames; where each frame ends."""
    ends = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for payload in PAYLOADS:
        append_frame(descriptor, payload)
        ends.append(os.fstat(descriptor).st_size)
    os.close(descriptor)
    return ends


def test_torn_at_any_byte_the_whole_records_stay_and_more_can_be_appended(tmp_path):
    whole = tmp_path / "whole"
    ends = write_frames(whole)
    content = whole.read_bytes()
    for cut in range(len(content) + 1):
        path = tmp_path / "torn"
        path.write_bytes(content[:cut])
        kept = sum(end <= cut for end in ends)
        assert list(FramedFile.read(path)) == PAYLOADS[:kept], f"cut at byte {cut}"
        with open(path, "ab") as file:
            append_frame(file.fileno(), b"more")
        assert list(FramedFile.read(path)) == [*PAYLOADS[:kept], b"more"], f"cut at byte {cut}"


def test_a_flipped_byte_costs_its_own_record(tmp_path):
    path = tmp_path / "frames"
    ends = write_frames(path)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        hit = sum(end <= position for end in ends)
        expected = PAYLOADS[:hit] + PAYLOADS[hit + 1 :]
        file = FramedFile.read(path)
        assert list(file) == expected, f"byte {position}"
        assert file.num_damaged_bytes == FRAME_HEADER.size + len(PAYLOADS[hit]), f"byte {position}"


def graded_response(draw: random.Random, reward: float, *ungraded: str) -> GradedResponse:
    length = draw.choice([0, 1, 7])
    response = Response(
        array("i", [draw.randrange(150_000) for _ in range(length)]),
        array("f", [-draw.random() for _ in range(length)]),
        array("i", sorted(draw.randrange(3, 6) for _ in range(length))),
        draw.choice(["stop", "length"]),
        draw.randbytes(3 * length),
        draw.choice(["", "engine-1"]),
        draw.choice([b"", encode_mask([[1, 2 + at] for at in range(length)])]),
    )
    text = draw.choice(["", "half an emoji: \ud83d", "x² = 9"])
    rewards = {"accuracy": reward, "format": draw.random()}
    return GradedResponse(response, text, rewards, reward, "why \udc00", ungraded, not ungraded)


def group(index: int, *rewards: float, ungraded: tuple[str, ...] = ()) -> Group:
    draw = random.Random(index)
    responses = [graded_response(draw, reward, *ungraded) for reward in rewards]
    return Group(PROMPTS[index], [5, 6, index], responses)


def test_a_record_of_an_earlier_version_is_read_without_engine_and_sampling():
    sampling = SamplingRecord(0.7, 0.9, 64, (1, 2), ("</answer>",), 40, 0.1)
    whole = msgspec.msgpack.decode(encode(to_record(3, group(3, 1.0), "", sampling)))
    assert decode(msgspec.msgpack.encode(whole)).sampling == sampling
    # Records are arrays: those of before end earlier.
    before = whole[:-1]
    before[4] = [response[:-2] for response in before[4]]
    read = decode(msgspec.msgpack.encode(before))
    assert read.sampling is None
    kept, expected = from_record(read, PROMPTS[3]), group(3, 1.0)
    (response,) = kept.responses
    assert response.response.engine == ""
    assert response.response.token_ids == expected.responses[0].response.token_ids
    assert kept.prompt_ids == expected.prompt_ids


def test_groups_come_back_exactly_each_at_its_place(tmp_path):
    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(4)
        assert list(step.reserve(4)) == [0, 1, 2, 3]
        for position in (2, 0):
            step.append(position, group(position, 1.0, 0.1 + position))
        await log.close()  # as if it ended before the batch was complete

        log = SampleLog(tmp_path)
        step = await log.step(4)
        replayed = [step.restore(i, PROMPTS[i]) for i in range(4)]
        assert replayed == [group(0, 1.0, 0.1), None, group(2, 1.0, 2.1), None]
        assert step.num_restored == 2 and not step.is_committed
        assert (await log.step(5)).restore(0, PROMPTS[0]) is None, "another step has other groups"
        other = await log.step(4)
        assert other.restore(0, PROMPTS[1]) is None, "another question was drawn for this place"
        await log.close()

    asyncio.run(run())


def test_groups_of_another_schedule_are_sampled_again(tmp_path):
    entry = ScheduleEntry.model_validate({"from_step": 4, "rl.group_size": 2})
    before, after = digest_until([], 4), digest_until([entry], 4)
    assert before == digest_until([entry], 3) != after

    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(4, before)
        step.append(0, group(0, 1.0))
        await step.commit()

        step = await log.step(4, after)
        assert step.restore(0, PROMPTS[0]) is None and not step.is_committed
        step.append(0, group(0, 1.0, 0.5))
        await step.commit()
        again = await log.step(4, after)
        assert again.restore(0, PROMPTS[0]) == group(0, 1.0, 0.5) and again.is_committed
        assert (await log.step(4, before)).restore(0, PROMPTS[0]) == group(0, 1.0)
        await log.close()

    asyncio.run(run())


def test_an_ungraded_response_is_graded_again_unless_it_was_trained_on(tmp_path):
    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(1)
        step.append(0, group(0, 0.0, ungraded=("accuracy",)))
        step.append(1, group(1, 1.0))
        await log.finish(tmp_path / "step_00000001.log")
        again = await log.step(1)
        finals = [again.is_final(again.restore(i, PROMPTS[i])) for i in (0, 1)]
        assert finals == [False, True]
        again.append(0, group(0, 1.0))  # with the reward repaired
        await again.commit()
        trained_on = await log.step(1)
        assert trained_on.is_committed
        assert trained_on.restore(0, PROMPTS[0]) == group(0, 1.0), "the later record counts"
        await log.close()

    asyncio.run(run())


def test_steps_before_the_oldest_checkpoint_are_deleted(tmp_path):
    async def run():
        log = SampleLog(tmp_path)
        for number in (1, 2, 3):
            step = await log.step(number)
            step.append(0, group(0, 1.0))
        await log.prune(2)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.log"]
        await log.prune()
        assert list(tmp_path.iterdir()) == []
        await log.close()

    asyncio.run(run())


def test_a_full_disk_stops_the_batch_and_what_was_whole_is_kept(tmp_path):
    async def run():
        log = SampleLog(tmp_path)
        step = await log.step(1)
        step.append(0, group(0, 1.0))
        step.append(1, group(1, *[1.0] * 400))  # larger than the disk
        with pytest.raises(RunError, match=str(tmp_path)):
            await step.commit()
        await log.close()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    async def resume():
        messages = []
        log = SampleLog(tmp_path, messages.append)
        step = await log.step(1)
        assert step.restore(0, PROMPTS[0]) == group(0, 1.0)
        assert step.restore(1, PROMPTS[1]) is None and not step.is_committed
        assert len(messages) == 1
        await log.close()

    asyncio.run(resume())


def test_a_record_that_cannot_be_made_stops_the_batch_with_its_own_error(tmp_path):
    def broken():
        raise TypeError("no record")

    async def run():
        log = SampleLog(tmp_path)
        log.append(tmp_path / "step_00000001.log", broken)
        with pytest.raises(TypeError, match="no record"):
            await log.finish(tmp_path / "step_00000001.log")
        await log.close()

    asyncio.run(run())


def test_a_batch_drawn_in_rounds_goes_on_where_it_was(tmp_path):
    """Questions 0 and 2 … teach; the run ends in the middle of the second of three rounds."""
    sampled: list[int] = []

    async def collect(prompts, finished, limit: int) -> Rollout:
        groups = []
        for prompt, position in zip(prompts, finished.reserve(len(prompts)), strict=True):
            index = PROMPTS.index(prompt)
            known = finished.restore(position, prompt)
            if known is None:
                if len(sampled) == limit:
                    raise KeyboardInterrupt
                sampled.append(index)
                known = group(index, 1.0, float(index % 2))
                finished.append(position, known)
            groups.append(known)
        return Rollout(groups, 1.0, 0.0)

    async def run(limit: int) -> Rollout:
        draws = iter(PROMPTS)
        log = SampleLog(tmp_path)
        try:
            finished = await log.step(1)
            draw = lambda n: [next(draws) for _ in range(n)]  # noqa: E731
            collect_some = partial(collect, finished=finished, limit=limit)
            return await collect_dynamic_rollout(collect_some, draw, num_groups=4, max_rounds=3)
        finally:
            await log.close()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run(limit=5))
    rollout = asyncio.run(run(limit=100))
    assert sampled == list(range(7)), "none twice"
    assert [PROMPTS.index(g.prompt) for g in rollout.groups] == [0, 2, 4, 6]
