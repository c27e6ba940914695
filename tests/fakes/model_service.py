"""A loopback HTTP server that stands in for a user's model service, and what a judge makes of a
message."""

import asyncio
import json
import re

from aiohttp import web

KEY = re.compile(r'\{"key": "([0-9a-f]{16})", "verdict": "<verdict>"\}')
SECTION = re.compile(
    r"^\[(?!end of)([\w ]+) ([0-9a-f]{16})\]\n(.*?)\n\[end of \1 \2\]$", re.M | re.S
)


class Served:
    """answer(path, body) gives an object (status 200), a web.Response, or raises. `requests` holds
    (path, headers, body) of each call; `url` is where it listens."""

    def __init__(self, answer):
        self.answer, self.requests, self.url = answer, [], ""
        self.num_open = self.most_open = 0

    async def __aenter__(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _handle(self, request):
        body = await request.json()
        self.requests.append((request.path, dict(request.headers), body))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            answer = self.answer(request.path, body)
            if asyncio.iscoroutine(answer):
                answer = await answer
        finally:
            self.num_open -= 1
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


def said(content, finish_reason="stop"):
    """An answer of /chat/completions."""
    message = {"role": "assistant", "content": content}
    return {"id": "1", "choices": [{"message": message, "finish_reason": finish_reason}]}


def sections(body):
    """name → text of what the judge is shown, and the key it has to repeat."""
    message = body["messages"][-1]["content"]
    match = KEY.search(message)
    if not match:
        return {}, ""
    return {name: text for name, key, text in SECTION.findall(message) if key == match[1]}, match[1]


def verdict(key, choice, before="It is so."):
    return f"{before}\n" + json.dumps({"key": key, "verdict": choice})


def by_answer(texts):
    """The verdict of a judge that looks for the reference answer in the response."""
    return "correct" if texts["reference answer"] in texts["response"] else "incorrect"


def judge_that(decide):
    """The answer function of a judge; decide(texts) gives the verdict. It passes any check."""

    def answer(path, body):
        assert path == "/v1/chat/completions"
        texts, key = sections(body)
        if not texts:
            return said("ready")
        if texts["question"] == "What is 7 + 5?":
            if "response" in texts:
                return said(verdict(key, "correct" if "12" in texts["response"] else "incorrect"))
            return said(verdict(key, "A" if "12" in texts["response A"] else "B"))
        choice = decide(texts)
        return choice if isinstance(choice, dict | web.Response) else said(verdict(key, choice))

    return answer
