"""A gateway before an engine whose answers are written beforehand."""

import asyncio
import contextlib
import functools
import itertools
from array import array
from collections import Counter

from fakes.agent_sessions import parse
from megatron_r1.agents.gateway import Gateway, SessionLimits, TurnSampling
from megatron_r1.agents.parsed_turn import ParsedTurn
from megatron_r1.engines.server.responses import Response
from tests.harness.chat_tokenizer import chat_tokenizer

LIMITS = SessionLimits(max_turns=20, max_tokens=4000)


class WrittenFleet:
    """Answers each call with the next text of `texts` (an exception is raised); journals calls."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.calls, self.max_tokens = [], []
        self.logprobs = itertools.count(1)
        self.ready = asyncio.Event()
        self.ready.set()

    async def generate(self, prompt_token_ids, max_tokens):
        self.max_tokens.append(max_tokens)
        text = self.texts.pop(0)
        await self.ready.wait()
        if isinstance(text, Exception):
            raise text
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, self.tokenizer.eos_token_id][:max_tokens]
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        logprobs = array("f", [-next(self.logprobs) / 1024 for _ in ids])
        response = Response(array("i", ids), logprobs, array("i", [7] * len(ids)), reason)
        self.calls.append((list(prompt_token_ids), response))
        return response


class WrittenParsers:
    """Reads answers as the tests' sessions do, in this process."""

    async def check(self):
        pass

    async def close(self):
        pass

    async def parse(self, job):
        message = parse(job.text)
        calls = message.get("tool_calls", [])
        return ParsedTurn(message.get("reasoning_content"), message["content"], calls)


class ChatText:
    """What is used of `data.prompt_tokenizer.PromptTokenizer`, without a folder."""

    def __init__(self, tokenizer):
        self.hf_tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.end_tokens, self.stop_token_ids = (), [self.end]

    def decode(self, token_ids):
        ends = len(token_ids) and token_ids[-1] == self.end
        ids = list(token_ids[:-1] if ends else token_ids)
        return self.hf_tokenizer.decode(ids, skip_special_tokens=False)


@functools.cache
def text_of():
    return ChatText(chat_tokenizer())


def gateway_of(text, **options):
    return Gateway(text, WrittenParsers(), **options)


@contextlib.asynccontextmanager
async def gateway(*texts, limits=LIMITS, max_model_len=2000, **options):
    """Yield a gateway with one session and the fleet behind it."""
    text = text_of()
    fleet = WrittenFleet(text.hf_tokenizer, texts)
    async with gateway_of(text, **options) as served:
        session = served.open(limits, TurnSampling(fleet.generate, max_model_len))
        yield served, session, fleet


def check_tree(session, calls, is_cut=False):
    """What is trained is what the engine sampled, each token once, after what it was given; all of
    it, unless stop strings have cut answers."""
    sampled = Counter()
    for prompt, response in calls:
        for at, pair in enumerate(zip(response.token_ids, response.logprobs, strict=True)):
            sampled[pair, *prompt, *response.token_ids[: at + 1]] += 1
    trained = Counter()
    for branch in session.tree.branches():
        for at, flag in enumerate(branch.is_sampled):
            if flag:
                pair = branch.token_ids[at], branch.logprobs[at]
                trained[pair, *branch.token_ids[: at + 1]] += 1
    assert trained <= sampled
    assert trained.total() == session.num_tokens
    assert is_cut or trained == sampled
