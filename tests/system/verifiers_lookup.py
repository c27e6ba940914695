"""A taskset and a harness with a tool for verifiers 0.4.0, as its users write them.

Two entries of a table, which is drawn afresh for every task, lead to the answer. Imported by its
Python."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult

TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Return the entry of the table under a key.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


def entry(seed: int, key: str) -> str:
    return f"{random.Random(f'{seed}:{key}').randrange(100):02d}"


class LookupData(vf.TaskData):
    seed: int
    answer: str


class LookupTask(vf.Task[LookupData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)


class LookupConfig(vf.TasksetConfig):
    num_tasks: int = 2000


class LookupTaskset(vf.Taskset[LookupTask, LookupConfig]):
    def load(self):
        for seed in range(self.config.num_tasks):
            key = entry(seed, "question")
            answer = entry(seed, entry(seed, key))
            yield LookupTask(LookupData(prompt=key, seed=seed, answer=answer))


class LookUpConfig(vf.HarnessConfig):
    max_turns: int = 4
    seconds: float = 0.0
    """that the tool takes"""
    journal: str = ""
    """a file that gets a line for every call"""


class LookUp(vf.Harness[LookUpConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        _, prompt = self.resolve_prompt(data)
        messages = [{"role": "user", "content": prompt}]
        async with httpx.AsyncClient(timeout=None) as http:
            for _ in range(self.config.max_turns):
                reply = await http.post(
                    f"{endpoint}/chat/completions",
                    headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages, "tools": [TOOL]},
                )
                if reply.status_code == 400:
                    break  # a limit of the episode: what there is is graded
                if reply.status_code != 200:
                    return ProgramResult(exit_code=1, stdout="", stderr=reply.text)
                answer = reply.json()["choices"][0]["message"]
                messages.append(answer)
                if not answer.get("tool_calls"):
                    break
                for call in answer["tool_calls"]:
                    result = await self._call(data.seed, call["function"])
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return ProgramResult(exit_code=0, stdout="", stderr="")

    async def _call(self, seed: int, function: dict) -> str:
        if self.config.journal:
            with Path(self.config.journal).open("a") as file:
                print(seed, file=file)
        await asyncio.sleep(self.config.seconds)
        try:
            return entry(seed, str(json.loads(function["arguments"])["key"]))
        except (ValueError, KeyError, TypeError) as error:
            return f"error: {error}"


__all__ = ["LookUp", "LookupTaskset"]
