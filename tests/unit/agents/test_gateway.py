"""The gateway's secrets, limits, refusals and losses."""

import asyncio
import contextlib
import json
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from fakes import gateway as gateways
from fakes.gateway import check_tree, gateway
from waiting import until

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.gateway import SessionLimits, server
from megatron_r1.agents.hermes_parser import HermesParser
from megatron_r1.engines.server.errors import EngineDied
from tests.harness.chat_tokenizer import CHATML, chat_tokenizer

USER = {"role": "user", "content": "What is 12 * 34?"}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES, TOKENS = "/v1/messages", "/inference/v1/generate"
PATHS = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES, "tokens": TOKENS}
REFUSED = yaml.safe_load(
    Path(__file__).with_name("refused_requests.yaml").read_text(encoding="utf-8")
)


async def post(served, session, path, body, **headers):
    """Return the status and the body of a reply; `session` None for no key."""
    secret = {"Authorization": f"Bearer {session.secret}"} if session else {}
    data = body if isinstance(body, (str, bytes)) else json.dumps(body)
    async with (
        aiohttp.ClientSession() as http,
        http.post(served.url + path, data=data, headers=secret | headers) as reply,
    ):
        text = await reply.text()
        return reply.status, text if reply.content_type == "text/event-stream" else json.loads(text)


async def give_up(served, session, fleet, body):
    """Send a request, and close its connection while an engine samples."""
    asked = len(fleet.max_tokens)
    asking = asyncio.create_task(post(served, session, CHAT, body))
    await until(lambda: len(fleet.max_tokens) > asked)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await until(lambda: session.undelivered)


async def post_at_once(served, session, fleet, count, num_sampled):
    """Send requests, of which `num_sampled` are sampled next to each other and the others are
    refused; return all replies."""
    bodies = [{"messages": [{"role": "user", "content": f"Part {i}"}]} for i in range(count)]
    fleet.ready.clear()
    asking = [asyncio.create_task(post(served, session, CHAT, body)) for body in bodies]
    await until(lambda: len(fleet.max_tokens) == num_sampled)
    await until(lambda: sum(task.done() for task in asking) == count - num_sampled)
    fleet.ready.set()
    return await asyncio.gather(*asking)


def run(test, *texts, **options):
    async def main():
        async with gateway(*texts, **options) as served:
            return await test(*served)

    return asyncio.run(main())


def test_only_the_secrets_of_open_sessions_are_served():
    async def test(served, session, fleet):
        body = {"messages": [USER]}
        for key in ({}, {"x-api-key": "r1-"}, {"Authorization": "Bearer "}, {"X-Session-ID": "a"}):
            status, reply = await post(served, None, CHAT, body, **key)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        status, reply = await post(served, None, MESSAGES, body)
        assert (status, reply["error"]["type"]) == (401, "authentication_error")
        for key in ("x-api-key", "X-Session-ID"):
            assert (await post(served, None, CHAT, body, **{key: session.secret}))[0] == 200
        await served.end(session)
        assert (await post(served, session, CHAT, body))[0] == 401
        assert session.secret not in repr(session)

    run(test, "a", "b")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case['to']} {case['field']}")
def test_what_cannot_be_honoured_is_refused_by_its_name(case):
    path, field = PATHS[case["to"]], case["field"]

    async def test(served, session, fleet):
        needed = {"messages": [USER]} if path in (CHAT, MESSAGES) else {}
        status, reply = await post(served, session, path, needed | case["body"])
        assert status == 400 and field in reply["error"]["message"], reply
        if path != MESSAGES:
            assert reply["error"]["param"] == field
        assert session.status is None and not fleet.calls and not session.tree.nodes
        assert any("refused" in note for note in session.notes)

    run(test)


@pytest.mark.parametrize("body", ["", "{", "[]", b"\xff", "[" * 100_000, '"x"'])
def test_a_body_that_is_no_object_is_refused(body):
    async def test(served, session, fleet):
        for path in (CHAT, RESPONSES, MESSAGES, TOKENS):
            status, reply = await post(served, session, path, body)
            assert (status, reply["error"]["type"]) == (400, "invalid_request_error")

    run(test)


def test_bodies_have_a_size(monkeypatch):
    async def test(served, session, fleet):
        body = {"messages": [{"role": "user", "content": "x" * 3000}]}
        status, reply = await post(served, session, CHAT, body)
        assert (status, reply["error"]["type"]) == (413, "request_too_large")

    monkeypatch.setattr(server, "MAX_BODY_BYTES", 2000)
    run(test)


def test_a_body_that_no_engine_could_take_is_not_tokenized(monkeypatch):
    async def test(served, session, fleet):
        body = {"messages": [{"role": "user", "content": "x" * 3000}]}
        status, reply = await post(served, session, CHAT, body)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        assert (session.status, "3,0" in session.reason) == ("max_tokens", True)

    monkeypatch.setattr(server, "MAX_OTHER_BYTES", 2000)
    monkeypatch.setattr(Continuation, "next_prompt", None)
    run(test, max_model_len=20)


def test_what_cannot_be_read_is_refused_and_ends_nothing():
    def nested(depth):
        return '{"a":' * depth + "1" + "}" * depth

    def call(arguments):
        function = {"name": "f", "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}

    async def test(served, session, fleet):
        encoded = {"Content-Encoding": "gzip"}
        assert (await post(served, session, CHAT, b"no gzip", **encoded))[0] == 400
        for depth in (*range(950, 1000, 5), 3000):
            tool = {"type": "function", "function": {"name": "f"}}
            body = {"messages": [USER], "tools": [tool]}
            text = json.dumps(body).replace('"f"', '"f", "parameters": ' + nested(depth))
            told = json.dumps({"messages": [USER, call(nested(depth)), USER]})
            for each in (text, told):
                assert (await post(served, session, CHAT, each))[0] in (200, 400)
                assert session.status is None, session.reason
        assert (await post(served, session, CHAT, told))[0] == 400
        used = {"type": "tool_use", "id": "c", "name": "f", "input": "i"}
        body = {"messages": [{"role": "assistant", "content": [used]}, USER], "max_tokens": 9}
        for depth, statuses in ((985, (200, 400)), (3000, (400,))):
            text = json.dumps(body).replace('"i"', nested(depth))
            assert (await post(served, session, MESSAGES, text))[0] in statuses
            assert session.status is None, session.reason

    run(test, *["a"] * 30, limits=SessionLimits(max_turns=50, max_tokens=4000), max_model_len=9000)


def test_a_stream_whose_client_is_gone_is_sent_again(monkeypatch):
    real = web.StreamResponse.write

    async def broken(stream, content):
        stream._req.transport.close()
        raise ConnectionResetError("the client is gone")

    async def test(served, session, fleet):
        body = {"messages": [USER], "stream": True}
        monkeypatch.setattr(web.StreamResponse, "write", broken)
        with pytest.raises(aiohttp.ClientError):
            await post(served, session, CHAT, body)
        monkeypatch.setattr(web.StreamResponse, "write", real)
        assert session.status is None, session.reason
        assert "first" in str(await post(served, session, CHAT, body))
        assert (len(fleet.calls), session.num_turns) == (1, 1)
        check_tree(session, fleet.calls)

    run(test, "first")


def test_the_runs_sampling_wins_and_the_difference_is_noted():
    async def test(served, session, fleet):
        wishes = {"temperature": 0.2, "top_p": 1.0, "seed": 5, "presence_penalty": 0}
        body = {"messages": [USER], "tool_choice": "required"} | wishes
        assert (await post(served, session, CHAT, body))[0] == 200
        assert set(session.notes) == {"temperature=0.2", "seed=5", "tool_choice=required"}

    run(test, "a")


def test_or_other_sampling_is_refused():
    async def test(served, session, fleet):
        body = {"messages": [USER], "temperature": 1.0}
        assert (await post(served, session, CHAT, body))[0] == 200
        status, reply = await post(served, session, CHAT, body | {"temperature": 0.2})
        assert (status, reply["error"]["param"]) == (400, "temperature")
        assert "1.0" in reply["error"]["message"]

    run(test, "a", sampling_options="refuse")


def test_turns_and_tokens_of_an_episode_end():
    async def test(served, session, fleet):
        body = {"messages": [USER]}
        status, reply = await post(served, session, CHAT, body | {"max_tokens": 2})
        assert reply["choices"][0]["finish_reason"] == "length"
        assert (await post(served, session, CHAT, body))[0] == 200
        assert fleet.max_tokens == [2, 8]
        status, reply = await post(served, session, CHAT, body)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        assert (session.status, session.num_tokens) == ("max_tokens", 10)
        other = served.open(SessionLimits(max_turns=1, max_tokens=10), session.sampling)
        assert (await post(served, other, CHAT, body))[0] == 200
        status, reply = await post(served, other, CHAT, body)
        assert (status, reply["error"]["code"], other.status) == (400, "max_turns", "max_turns")

    run(test, "x" * 99, "x" * 99, "x", limits=SessionLimits(max_turns=5, max_tokens=10))


def test_a_context_that_is_full_ends_the_episode():
    async def test(served, session, fleet):
        status, reply = await post(served, session, CHAT, {"messages": [USER]})
        assert (status, session.status) == (400, "max_tokens")
        assert "8" in reply["error"]["message"]

    run(test, max_model_len=8)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_lost_is_no_fault_of_the_policy(stream):
    async def test(served, session, fleet):
        body = {"messages": [USER], "stream": stream}
        status, reply = await post(served, session, CHAT, body)
        assert status == (200 if stream else 503)
        assert "api_error" in str(reply)
        assert session.status is None, "the client may repeat it"
        session.end("harness_error", "RuntimeError")
        assert (session.status, session.reason) == ("engine_error", "engine-0 died")
        assert not session.tree.nodes

    run(test, EngineDied("engine-0 died"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_and_repeats_gets_the_same_turn(stream):
    async def test(served, session, fleet):
        body = {"messages": [USER], "stream": stream}
        fleet.ready.clear()
        await give_up(served, session, fleet, body)
        assert not session.tree.nodes
        fleet.ready.set()
        status, reply = await post(served, session, CHAT, body)
        assert status == 200 and "first" in str(reply)
        assert len(fleet.calls) == 1 and not session.undelivered
        # The same request again wants another answer.
        assert "second" in str(await post(served, session, CHAT, body))
        check_tree(session, fleet.calls)

    run(test, "first", "second")


def test_a_turn_that_reaches_no_client_is_not_trained():
    async def test(served, session, fleet):
        fleet.ready.clear()
        await give_up(served, session, fleet, {"messages": [USER]})
        await served.end(session)
        assert not session.running and not session.tree.branches()

    run(test, "first")


def test_a_stream_is_kept_alive_while_its_turn_is_sampled(monkeypatch):
    async def test(served, session, fleet):
        fleet.ready.clear()
        body = {"messages": [USER], "stream": True, "max_tokens": 5}
        key = {"Authorization": f"Bearer {session.secret}"}
        async with (
            aiohttp.ClientSession() as http,
            http.post(served.url + CHAT, json=body, headers=key) as reply,
        ):
            assert (await reply.content.readline()).startswith(b":"), "a comment of the stream"
            fleet.ready.set()
            assert (await reply.read()).endswith(b"data: [DONE]\n\n")

    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.05)
    run(test, "a")


def test_stop_strings_cut_after_the_token_that_completes_them():
    async def test(served, session, fleet):
        body = {"messages": [USER], "stop": ["Observation:", "unused"]}
        _, reply = await post(served, session, CHAT, body)
        choice = reply["choices"][0]
        assert choice["message"]["content"] == "Think. " and choice["finish_reason"] == "stop"
        [branch] = session.tree.branches()
        sampled = [t for t, flag in zip(branch.token_ids, branch.is_sampled, strict=True) if flag]
        text = fleet.tokenizer.decode(sampled)
        whole = fleet.calls[0][1]
        assert sampled == whole.token_ids[: len(sampled)].tolist() and len(sampled) < len(
            whole.token_ids
        )
        assert "Observation:" in text
        assert "Observation:" not in fleet.tokenizer.decode(sampled[:-1])
        said = [USER, choice["message"], {"role": "user", "content": "Observation: 408"}]
        body = {"messages": [{k: v for k, v in m.items() if v is not None} for m in said]}
        assert (await post(served, session, CHAT, body))[0] == 200
        assert len(session.tree.branches()) == 1, "a cut turn is closed and continued"
        body = {"messages": [USER], "max_tokens": 99, "stop_sequences": ["b"]}
        _, reply = await post(served, session, MESSAGES, body)
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "b")

    run(test, "Think. Observation: 5 and so on", "408", "abc")


def test_token_mode_continues_what_was_sampled():
    async def test(served, session, fleet):
        body = {
            "model": "policy",
            "token_ids": [5, 6, 7],
            "sampling_params": {
                **{"temperature": 1.0, "max_tokens": 50, "logprobs": 1},
                **{"skip_special_tokens": False, "stop_token_ids": [fleet.tokenizer.eos_token_id]},
            },
        }
        _, reply = await post(served, None, TOKENS, body, **{"X-Session-ID": session.secret})
        [choice] = reply["choices"]
        _, response = fleet.calls[0]
        assert choice["token_ids"] == response.token_ids.tolist()
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == [
            f"token_id:{token}" for token in response.token_ids
        ]
        assert [entry["token_id"] for entry in content] == choice["token_ids"]
        assert [entry["logprob"] for entry in content] == response.logprobs.tolist()
        assert choice["weight_versions"] == [
            {"version": "7", "start": 0, "end": len(response.token_ids)}
        ]
        assert not session.notes
        body["token_ids"] += [*choice["token_ids"], 9]
        await post(served, session, TOKENS, body)
        body["token_ids"][0] = 4
        await post(served, session, TOKENS, body)
        check_tree(session, fleet.calls)
        assert len(session.tree.branches()) == 2, "one continued, one new"

    run(test, "one", "two", "three")


def test_turns_at_once_are_branches_of_one_episode():
    async def test(served, session, fleet):
        replies = await post_at_once(served, session, fleet, 8, 4)
        statuses = [status for status, _ in replies]
        assert statuses.count(200) == 4 and statuses.count(429) == 4
        check_tree(session, fleet.calls)
        assert len(session.tree.branches()) == 4

    run(test, *"abcd", limits=SessionLimits(max_turns=9, max_tokens=99, max_parallel=4))


def test_turns_at_once_keep_to_the_turns_of_an_episode():
    async def test(served, session, fleet):
        replies = await post_at_once(served, session, fleet, 5, 2)
        statuses = [status for status, _ in replies]
        assert statuses.count(200) == 2 and statuses.count(429) == 3
        assert (session.num_turns, session.status) == (2, None), "one in flight may fail"
        assert (await post(served, session, CHAT, {"messages": [USER]}))[0] == 400
        assert session.status == "max_turns"

    run(test, *"abcde", limits=SessionLimits(max_turns=2, max_tokens=99))


def test_turns_at_once_keep_to_the_tokens_of_an_episode():
    async def test(served, session, fleet):
        replies = await post_at_once(served, session, fleet, 3, 3)
        assert fleet.max_tokens == [10] * 3, "each began with all that was left"
        ends = [reply["choices"][0]["finish_reason"] for status, reply in replies if status == 200]
        assert sorted(ends) == ["length", "stop"]
        [refused] = [reply["error"] for status, reply in replies if status == 400]
        assert refused["code"] == "context_length_exceeded"
        assert (session.num_tokens, session.status) == (10, "max_tokens")
        counts = sorted(branch.num_sampled for branch in session.tree.branches())
        assert counts == [4, 6]
        check_tree(session, fleet.calls, is_cut=True)
        for branch in session.tree.branches():
            flagged = zip(branch.token_ids, branch.is_sampled, strict=True)
            text = fleet.tokenizer.decode([token for token, flag in flagged if flag])
            said = [node.messages[0]["content"] for node in session.tree.nodes if node.is_sampled]
            assert text.removesuffix("<|im_end|>") in said, "the message is of the kept tokens"

    run(test, "abcde", "abcde", "abcde", limits=SessionLimits(max_turns=9, max_tokens=10))


def test_calls_that_the_template_refuses_are_content(monkeypatch):
    one = "{% if m.tool_calls and m.tool_calls|length > 1 %}{{ raise_exception('one') }}{% endif %}"
    loop = "{% for c in m.tool_calls or [] %}"
    refusing = gateways.ChatText(chat_tokenizer(CHATML.replace(loop, one + loop)))
    monkeypatch.setattr(gateways, "text_of", lambda: refusing)
    monkeypatch.setattr(gateways, "WrittenParsers", HermesParser)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'

    async def test(served, session, fleet):
        messages = [USER]
        found = []
        for _ in range(3):
            status, reply = await post(served, session, CHAT, {"messages": messages})
            assert status == 200
            answer = reply["choices"][0]["message"]
            found.append((answer["content"] or "", len(answer.get("tool_calls") or ())))
            messages += [answer, {"role": "user", "content": "Go on."}]
        assert found == [("", 1), (call * 2, 0), ("Done.", 0)]
        assert len(session.tree.branches()) == 1

    run(test, call, call * 2, "Done.")


@pytest.mark.parametrize("arguments", ['"x"', '"{}"', "[1]", '""', "{}"])
@pytest.mark.parametrize(("path", "sent"), [(CHAT, "messages"), (RESPONSES, "input")])
def test_a_reply_can_be_sent_back_whatever_the_model_writes_as_arguments(path, sent, arguments):
    async def test(served, session, fleet):
        said = [{"role": "user", "content": "?"}]
        status, reply = await post(served, session, path, {sent: said})
        assert status == 200
        back = reply["output"] if path == RESPONSES else [reply["choices"][0]["message"]]
        is_call = "call_id" in back[-1] or bool(back[-1].get("tool_calls"))
        assert is_call == (arguments == "{}")
        body = {sent: [*said, *back, {"role": "user", "content": "Go on."}]}
        assert (await post(served, session, path, body))[0] == 200, reply
        assert len(session.tree.branches()) == 1, "continued with the tokens that were sampled"
        check_tree(session, fleet.calls)

    run(test, f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', "Done.")


@pytest.mark.parametrize("arguments", ['"x"', "{}"])
def test_a_reply_of_messages_can_be_sent_back(arguments):
    async def test(served, session, fleet):
        body = {"messages": [USER], "max_tokens": 99}
        status, reply = await post(served, session, MESSAGES, body)
        assert (status, reply["content"][-1]["type"] == "tool_use") == (200, arguments == "{}")
        body["messages"] += [{"role": "assistant", "content": reply["content"]}, USER]
        assert (await post(served, session, MESSAGES, body))[0] == 200
        assert len(session.tree.branches()) == 1
        check_tree(session, fleet.calls)

    run(test, f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', "Done.")


def test_paths_that_do_not_exist():
    async def test(served, session, fleet):
        status, reply = await post(served, session, "/v1/embeddings", {})
        assert (status, reply["error"]["type"]) == (404, "not_found_error")

    run(test)
