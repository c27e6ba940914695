"""A server on loopback in the place of an engine's, which fails in ways in which a real one fails
rarely."""

import asyncio
import contextlib
import json

from aiohttp import web

from fakes.loopback import serving
from megatron_r1.engines.server.errors import EngineError


def choice(**wrong):
    right = {
        "finish_reason": "stop",
        "token_ids": [7],
        "logprobs": {"content": [{"logprob": -0.5}]},
        "weight_versions": [{"version": "0", "start": 0, "end": 1}],
    }
    return right | wrong


class Peer:
    """In the place of an engine's server.

    Attributes:
        reply: a function of k, the number of the generate call from 0; it returns a response's
            wrong fields, a status with a text, `cut` to close the connection, or `hang`.
        cuts: a path on which it closes the connection.
        fails: path → text of its status 500.
        holds: path → event that it waits for.
        asked: the number of responses of each generate call that it answered."""

    def __init__(self, reply, cuts=None, fails=None, holds=None):
        self.cuts, self.fails, self.holds = cuts, fails or {}, holds or {}
        self.reply, self.num_calls, self.is_running = reply, 0, False
        self.is_lost, self.called, self.asked = False, [], []

    def __call__(self, model, log, **settings):
        self.is_running = True
        return self

    @contextlib.asynccontextmanager
    async def served(self):
        async with serving(self._answer) as self.url:
            yield

    async def _answer(self, request):
        body = await request.read()
        if request.path == self.cuts:
            request.transport.close()
            return web.Response()
        if request.path in self.holds:
            await self.holds[request.path].wait()
        if request.path in self.fails:
            return web.Response(status=500, text=self.fails[request.path])
        if request.path != "/inference/v1/generate":
            self.called.append(request.path_qs)
            return web.json_response({"is_sleeping": False, "success": True})
        reply = self.reply(self.num_calls)
        self.num_calls += 1
        if reply == "hang":
            await asyncio.sleep(1e5)
        if reply == "cut":
            request.transport.close()
            return web.Response()
        if isinstance(reply, tuple):
            return web.Response(status=reply[0], text=reply[1])
        n = json.loads(body)["sampling_params"]["n"]
        self.asked.append(n)
        return web.json_response({"choices": [choice(**reply)] * n})

    def start(self): ...

    async def wait_ready(self, timeout_seconds):
        if not self.is_running:
            raise EngineError("it has ended")

    def is_alive(self):
        return self.is_running

    def stop(self):
        self.is_running = False

    def describe_end(self):
        return "stopped by the test"
