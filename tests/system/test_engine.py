"""A real vLLM server against transformers: log-probabilities, pushes, versions, and how things end.

Oracle: fp32 log-probabilities by transformers of the tokens that the engine sampled.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from file_trainer import FilePusher, FileTrainer
from liveness import wait_until_dead
from sampled import (
    PROMPTS,
    TOLERANCE,
    largest_by_version,
    largest_difference,
    sample,
    sample_amid_a_push,
    stamped,
    successions,
)
from tiny_models import (
    DEEPSEEK,
    PLAIN_ROPE,
    QWEN,
    reference_logprobs,
    reference_routing,
    write_model,
)

from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.client import GENERATE_PATH, EngineClient
from megatron_r1.engines.server.errors import EngineError, EngineLacksPush
from megatron_r1.engines.server.json_replies import parse_responses
from megatron_r1.engines.server.server import EngineServer
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.push.control_messages import PushInitInfo, PushUpdateInfo
from megatron_r1.push.matching import EngineLayout
from megatron_r1.trainer.operations import PushOperations

ENGINE = {"max_model_len": 256, "max_num_seqs": 64}
ROUTING = routing_shape(DEEPSEEK)


@pytest.fixture(scope="module")
def models(tmp_path_factory, oracle):
    """Folder with the models `a`, `b` (DeepSeek), `plain-a`, `plain-b`, `qwen-a`, `qwen-b`."""
    folder = tmp_path_factory.mktemp("models")
    for prefix, config in [("", DEEPSEEK), ("plain-", PLAIN_ROPE), ("qwen-", QWEN)]:
        for seed, name in enumerate("ab"):
            oracle(write_model, folder / f"{prefix}{name}", config, seed)
    return folder


@pytest.fixture(scope="module")
def fleet(models, loop, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    fleet = EngineFleet(1, logs, max_restarts=2, return_routing=True, **ENGINE)
    loop(fleet.start(models / "a", policy_version=0))
    yield fleet
    loop(fleet.close())


@pytest.fixture(scope="module")
def pusher(fleet):
    return FilePusher(DEEPSEEK, fleet)


@pytest.fixture
def push(models, pusher):
    """Push the model of that name as the next version."""
    return lambda name: pusher.push(models / name)


def test_logprobs_equal_transformers_through_pushes_a_b_a(models, oracle, loop, fleet, push):
    greedy = []
    for name in "aba":
        if greedy:
            loop(push(name))
        groups = loop(sample(fleet))
        assert stamped(groups) == {fleet.policy_version}
        assert all(len(c.token_ids) == 24 for group in groups for c in group)
        assert largest_difference(oracle, models / name, groups) <= TOLERANCE, name
        greedy.append(loop(sample(fleet, temperature=0.0, n=1)))
        assert largest_difference(oracle, models / name, greedy[-1]) <= TOLERANCE, name
    tokens = [[group[0].token_ids for group in groups] for groups in greedy]
    assert tokens[0] != tokens[1]
    assert tokens[0] == tokens[2]


def test_logprobs_are_those_of_the_tempered_distribution(models, oracle, loop, fleet, push):
    loop(push("a"))
    groups = loop(sample(fleet, temperature=0.7))
    assert largest_difference(oracle, models / "a", groups, 0.7) <= TOLERANCE
    assert largest_difference(oracle, models / "a", groups, 1.0) > 100 * TOLERANCE


def test_samples_as_bytes_equal_the_samples_that_vllm_sends_as_json(loop, fleet):
    client, prompt = fleet.engines[0].client, PROMPTS[2]
    sampling = {"n": 3, "max_tokens": 12, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
    call = {"token_ids": prompt, "sampling_params": sampling | {"detokenize": False, "seed": 5}}
    as_json = loop(client.request("POST", GENERATE_PATH, call))
    expected = parse_responses(as_json, len(prompt), ROUTING, client.vocab_size)
    found = loop(client.generate(prompt, n=3, max_tokens=12, seed=5, routing=ROUTING))
    for one, other in zip(found, expected, strict=True):
        # Two calls are batched differently, which rounds differently.
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        same = replace(one, logprobs=other.logprobs, engine="")
        assert same == other and len(one.token_ids) == 12
    assert isinstance(found[0].routing, memoryview) and len(expected[0].routing) > 0
    with pytest.raises(EngineError, match="status 400.*n must be 1"):
        loop(client.generate(prompt, n=2, max_tokens=12, temperature=0.0))


def test_responses_of_a_group_differ_and_a_seed_repeats_them(loop, fleet):
    def draw(seed):
        [*group] = loop(fleet.generate(PROMPTS[0], n=4, max_tokens=16, seed=seed))
        return [completion.token_ids for completion in group]

    first = draw(3)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert draw(3) == first
    assert draw(4) != first


def test_a_stop_token_ends_a_response_and_is_part_of_it(loop, fleet):
    [greedy] = loop(fleet.generate(PROMPTS[0], n=1, max_tokens=8, temperature=0.0))
    stop = greedy.token_ids[-1]
    [stopped] = loop(
        fleet.generate(PROMPTS[0], n=1, max_tokens=8, temperature=0.0, stop_token_ids=[stop])
    )
    first = greedy.token_ids.index(stop)
    assert stopped.token_ids == greedy.token_ids[: first + 1]
    assert (stopped.finish_reason, greedy.finish_reason) == ("stop", "length")


@pytest.mark.more
def test_a_push_amid_a_response_stamps_each_token_with_its_policy(
    models, oracle, loop, fleet, pusher
):
    """And the log-probabilities after it are those of the new weights given all earlier tokens, and
    the experts that were returned are those that computed them."""
    a, b = models / "a", models / "b"
    groups, made_by = loop(sample_amid_a_push(fleet, pusher.push, a, b, routing=ROUTING))
    assert successions(groups) == {tuple(made_by)}
    assert largest_by_version(oracle, made_by, groups) <= TOLERANCE
    before = min(made_by)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(completion.token_ids) for completion in group]
        experts_a = oracle(reference_routing, a, prompt, responses)
        experts_b = oracle(reference_routing, b, prompt, responses)
        for completion, x, y in zip(group, experts_a, experts_b, strict=True):
            versions = [before] * (len(prompt) - 1) + list(completion.policy_versions)
            expected = [
                old if v == before else new for v, old, new in zip(versions, x, y, strict=True)
            ]
            rows = np.frombuffer(completion.routing, np.uint8)
            rows = np.sort(rows.reshape(-1, len(ROUTING.moe_layers), ROUTING.topk), -1)
            # A near tie may fall either way.
            assert (rows == np.array(expected)).all((1, 2)).mean() > 0.98


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer " + "0" * 64}])
def test_an_engine_answers_only_who_knows_its_secret(loop, fleet, headers):
    """Not even that it was asked to pause, which vLLM's own key leaves open."""
    client = fleet.engines[0].client

    async def ask(method, path, headers):
        asked = aiohttp.request(method, client.url + path, headers=headers)
        async with asked as answer:
            return answer.status

    for method, path in [("POST", "/pause"), ("POST", "/inference/v1/generate"), ("GET", "/docs")]:
        assert loop(ask(method, path, headers)) == 401, path
        assert loop(ask(method, path, client.headers)) != 401, path
    loop(client.resume())
    assert loop(ask("GET", "/health", headers)) == 200


def test_versions_only_rise(loop, fleet):
    with pytest.raises(ValueError, match=f"engines hold version {fleet.policy_version}"):
        loop(fleet.swap_weights({"push_number": 1}, fleet.policy_version))


def test_a_push_that_arrives_otherwise_than_it_was_sent_changes_nothing(
    models, oracle, loop, fleet, pusher, push
):
    """It is refused by the tensor's name, and the engine goes on with the weights before."""
    loop(push("a"))
    pusher.trainer.load(models / "b")
    loop(pusher.check_damage("model.layers.1.mlp.experts.5.up_proj.weight"))
    assert largest_difference(oracle, models / "a", loop(sample(fleet))) <= TOLERANCE


def test_a_push_that_does_not_come_to_its_end_changes_nothing(models, oracle, loop, fleet, push):
    client = fleet.engines[0].client
    loop(push("a"))

    async def update():
        with pytest.raises(EngineLacksPush, match="trainer ranks 0 have not sent all of it"):
            await client.swap_weights(PushUpdateInfo(2000, timeout_seconds=0.5), 2000)
        await client.resume()

    loop(update())
    assert largest_difference(oracle, models / "a", loop(sample(fleet))) <= TOLERANCE


def test_a_model_without_one_of_the_engines_tensors_is_refused(loop, fleet, pusher):
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = [item for item in pusher.trainer.shapes.items() if item[0] != name]
    store = "127.0.0.1", pusher.trainer.store.port
    init = PushInitInfo(store, "other", tensors, timeout_seconds=5)
    with pytest.raises(EngineError, match=r"o_proj.*0 of its"):
        loop(fleet.engines[0].client.init_weight_transfer(init))


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_an_engine_that_dies_or_hangs_is_replaced_and_its_calls_are_answered(
    how, models, oracle, loop, fleet, push
):
    loop(push("b"))
    said, restarts = [], fleet.num_restarts

    def heard(message: str) -> None:  # from now on the limit would be the new engine's
        said.append(message)
        fleet.replacer.unresponsive_seconds = 120.0

    fleet.state.notify = heard
    # A death is noticed on its own: on a busy machine that may take longer than 3 seconds.
    fleet.replacer.unresponsive_seconds = 120.0 if how == signal.SIGKILL else 3.0

    async def stop_amid():
        running = asyncio.ensure_future(sample(fleet, max_tokens=200))
        await asyncio.sleep(0.3)
        os.kill(engine_core_of(fleet.engines[0].server.process.pid), how)
        return await running

    groups = loop(stop_amid())
    assert fleet.num_restarts == restarts + 1
    # Its server may answer once more before it ends.
    killed = ("engine-0 died: ", "engine-0 cannot go on: ")
    reasons = killed if how == signal.SIGKILL else ("engine-0 has not answered for 3 seconds",)
    assert said[0].startswith(reasons), said
    # The new engine was started on the model `a`, and given what was pushed last.
    assert stamped(groups) == {fleet.policy_version}
    assert largest_difference(oracle, models / "b", groups) <= TOLERANCE


@pytest.mark.slow  # without an engine: tests/unit/engines/fleet/test_fleet.py
def test_without_a_restart_left_a_death_fails_its_calls_with_the_reason(models, loop, tmp_path):
    async def run():
        async with EngineFleet(1, tmp_path, **ENGINE) as fleet:
            await fleet.start(models / "a")
            running = asyncio.ensure_future(sample(fleet, max_tokens=100))
            await asyncio.sleep(0.3)
            os.kill(engine_core_of(fleet.engines[0].server.process.pid), signal.SIGKILL)
            with pytest.raises(EngineError, match=r"engine-0 died: .*engine-0\.log"):
                await running
            with pytest.raises(EngineError, match="no engine can be used.*engine-0 died"):
                await sample(fleet)

    loop(run())


def engine_core_of(pid):
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.more
def test_an_architecture_vllm_does_not_know_is_named_first(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(QWEN | {"architectures": ["AbacusForCausalLM"]})
    )
    server = EngineServer(tmp_path, tmp_path / "engine.log", **ENGINE)
    server.start()
    with pytest.raises(EngineError, match=r"did not start: exit code 1; .*\n  Value error.*Abacus"):
        asyncio.run(server.wait_ready())


START_AND_WAIT = """
import asyncio, sys, time
from megatron_r1.engines.server.server import EngineServer
server = EngineServer(sys.argv[1], sys.argv[2], max_model_len=256, max_num_seqs=64)
server.start()
asyncio.run(server.wait_ready())
print(server.url, server.process.pid, flush=True)
time.sleep(600)
"""


CACHED = np.random.default_rng(1).integers(3, 60, 200).tolist()
"""Longer than a block of keys and values: without a reset of the prefix cache at a push, its keys
are the old weights'."""


@pytest.mark.more
@pytest.mark.parametrize("family", [pytest.param("plain", marks=pytest.mark.slow), "qwen"])
def test_other_models_and_no_orphans(family, models, oracle, tmp_path):
    """Plain rope in MLA; grouped-query attention, tied embeddings and prefix caching.

    A prompt that a push finds in the cache, and in a response under way, is read with the new
    weights.

    The parent of the engine is then killed with SIGKILL: nothing of the engine may be left.
    """
    a, b = models / f"{family}-a", models / f"{family}-b"
    command = [sys.executable, "-c", START_AND_WAIT, str(a), str(tmp_path / "engine.log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url, pid = parent.stdout.readline().split()

        async def sample_and_push():
            async with EngineClient(url) as client:
                await client.set_policy_version(0)
                before = await sample(client)
                await client.generate(CACHED, n=1, max_tokens=1)
                cached = [await client.generate(CACHED, n=2, max_tokens=8)]
                trainer = FileTrainer(QWEN if family == "qwen" else PLAIN_ROPE)
                trainer.load(b)
                await connect(client, trainer)
                running = asyncio.ensure_future(client.generate(CACHED, n=2, max_tokens=50))
                await trainer.call(PushOperations.send_weights, push_number=1, sets=["alone"])
                await client.swap_weights(PushUpdateInfo(1), 1)
                after = await sample(client)
                cached.append(await client.generate(CACHED, n=2, max_tokens=8))
                await running
                return before, after, cached, await seeded(client)

        before, after, cached, (together, alone) = asyncio.run(sample_and_push())
        core = engine_core_of(int(pid))
    finally:
        parent.kill()
        parent.wait()
    assert largest_difference(oracle, a, before) <= TOLERANCE
    assert largest_difference(oracle, b, after) <= TOLERANCE
    assert (stamped(before), stamped(after)) == ({0}, {1})
    for folder, group in zip((a, b), cached, strict=True):
        responses = [list(completion.token_ids) for completion in group]
        expected = oracle(reference_logprobs, folder, CACHED, responses, 1.0)
        for completion, wanted in zip(group, expected, strict=True):
            assert completion.logprobs == pytest.approx(wanted, abs=TOLERANCE)
    assert together == alone
    assert wait_until_dead(int(pid)) and wait_until_dead(core)


async def seeded(client):
    """Responses to prompts of which a step computes some in parts, and to the same one by one."""
    prompts = np.random.default_rng(0).integers(3, 60, (40, 200)).tolist()

    async def respond(number):
        [only] = await client.generate(prompts[number], n=1, max_tokens=4, seed=number)
        return only.token_ids

    together = await asyncio.gather(*map(respond, range(40)))
    return together[::5], [await respond(number) for number in range(0, 40, 5)]


async def connect(client, trainer):
    store = (await trainer.call(PushOperations.open_push)).store
    init = PushInitInfo(store, "alone", list(trainer.shapes.items()))
    sets = {"sets": [("alone", 1)], "transport": "shm", "timeout_seconds": 60}
    agreeing = trainer.call(PushOperations.connect_sets, layout=EngineLayout(), **sets)
    _, answer = await asyncio.gather(client.init_weight_transfer(init), agreeing)
    assert answer.problems == {}
