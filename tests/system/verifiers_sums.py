"""A taskset and a harness for verifiers 0.4.0, as its users write them; imported by its Python."""

import re

import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(str(self.data.answer) in re.findall(r"-?\d+", trace.last_reply))


class SumConfig(vf.TasksetConfig):
    num_tasks: int = 3


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for number in range(self.config.num_tasks):
            yield SumTask(SumData(prompt=f"What is {number} + 1?", answer=number + 1))


class AskTwiceConfig(vf.HarnessConfig):
    pass


class AskTwice(vf.Harness[AskTwiceConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        _, prompt = self.resolve_prompt(data)
        messages = []
        async with httpx.AsyncClient(timeout=None) as http:
            for text in (prompt, "Sure?"):
                messages.append({"role": "user", "content": text})
                answer = await http.post(
                    f"{endpoint}/chat/completions",
                    headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages},
                )
                if answer.status_code != 200:
                    return ProgramResult(exit_code=1, stdout="", stderr=answer.text)
                messages.append(answer.json()["choices"][0]["message"])
        return ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AskTwice", "SumTaskset"]
