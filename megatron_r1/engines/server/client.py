"""HTTP client of one engine: token ids in, sampled tokens out; weight updates."""

from __future__ import annotations

import asyncio
import contextlib
import re
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar

import aiohttp
import msgspec

from megatron_r1.engines.server.errors import (
    ConnectionBroken,
    EngineDied,
    EngineError,
    EngineFault,
    EngineLacksPush,
    EngineTimeout,
)
from megatron_r1.engines.server.json_replies import parse_prompt_logprobs, parse_responses
from megatron_r1.engines.server.reply_reader import MEDIA_TYPE, read_reply_body
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.push.control_messages import PushInitInfo, PushUpdateInfo

BODY_EXCERPT_CHARS = 500
HEALTH_SECONDS = 5.0
GENERATE_PATH = "/inference/v1/generate"
ROUTING_SLOTS = 2
"""Choices per engine whose routed experts are in memory at once: 14 MB each, of 30,000 tokens."""
COUNTER_LINE = re.compile(r"^([\w:]+)(?:\{.*\})? (\S+)$", re.MULTILINE)
"""A counter in Prometheus' text: its name, labels and value."""
T = TypeVar("T")


class ErrorReply(msgspec.Struct):
    """The part of the plugin's error body that is read: `kind`, the class of a refused swap."""

    kind: str = ""
    error: str = ""


class EngineClient:
    """Asynchronous client of one vLLM server: `async with EngineClient(url) as client`.

    Every method raises EngineError: EngineTimeout after `timeout_seconds`, ConnectionBroken where
    the connection fails, EngineFault for status 5xx or an unusable reply, and EngineError itself
    for a refusal (status 4xx)."""

    def __init__(
        self,
        url: str,
        *,
        secret: str = "",
        timeout_seconds: float = 1800.0,
        vocab_size: int | None = None,
        name: str = "",
    ) -> None:
        """Prepare calls to one engine.

        Args:
            url: `http://host:port`.
            secret: the server's bearer token (`EngineSettings.secret`); empty if the server has
                none.
            timeout_seconds: the time limit of one call, from sending to the last byte.
            vocab_size: the size of the model's vocabulary; a token beyond it is a fault.
            name: the engine's, which its responses carry."""
        self.url, self.name = url.rstrip("/"), name
        self.headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.timeout_seconds, self.vocab_size = timeout_seconds, vocab_size
        self._session: aiohttp.ClientSession | None = None
        self._routing_slots = asyncio.Semaphore(ROUTING_SLOTS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the HTTP session."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        sampling_mask: bool = False,
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
        routing: RoutingShape | None = None,
    ) -> list[Response]:
        """Sample n responses to one prompt in one request.

        Args:
            prompt_token_ids: the prompt.
            n: the number of responses.
            max_tokens: the longest response.
            temperature: 0 is greedy; the log-probabilities are then reported at temperature 1.
            top_p: the probability mass of nucleus sampling; 1 for all tokens.
            top_k: the most tokens of a draw; None for all.
            min_p: the least probability of a token, as a share of the likeliest one's.
            sampling_mask: whether to return the tokens that these three kept, from an engine that
                was started with `return_sampling_mask`; needs a top_k, which bounds their number.
            stop_token_ids: the only tokens that end a response.
            seed: makes the n responses reproducible for the same weights and the same batch
                composition. The engine then draws sequence by sequence, which is slower. None: the
                engine draws from its own seed.
            routing: the shape of the model's routing, to get the experts of every token from an
                engine that was started with `return_routing`.

        Raises:
            EngineFault: the reply is not n responses as `parse_responses` requires them."""
        sampling = {
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k or 0,  # vLLM's word for no limit
            "min_p": min_p,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,  # config.json's eos_token_id stops nothing unless it is named
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "seed": seed,
        }
        assert top_k or not sampling_mask, "vLLM returns the kept tokens where top_k bounds them"
        expected = len(prompt_token_ids), routing, self.vocab_size, sampling_mask

        async def read(reply: aiohttp.ClientResponse) -> list[Response]:
            if reply.content_type == MEDIA_TYPE:
                try:
                    return await read_reply_body(reply.content, *expected, self._routing_slots)
                except ValueError as error:
                    raise EngineFault(f"{self.url}{GENERATE_PATH}: {error}") from error
            body = await reply.read()
            try:
                return parse_responses(body, *expected)
            except ValueError as error:
                raise self._unusable_reply_error(body, error) from error

        # vLLM without our plugin sends JSON all the same.
        accept = {"Accept": f"{MEDIA_TYPE}, application/json"}
        call = {"token_ids": list(prompt_token_ids), "sampling_params": sampling}
        responses = await self._send_request("POST", GENERATE_PATH, call, read, accept)
        if len(responses) != n:
            raise EngineFault(f"{self.url}: asked for {n} responses, got {len(responses)}")
        return [replace(response, engine=self.name) for response in responses]

    async def compute_logprobs(self, token_ids: Sequence[int], first: int) -> array[float]:
        """Return the log-probability, float32, of each of token_ids[first:] after all tokens before
        it, at temperature 1.

        Args:
            token_ids: the tokens, at most one less than the engine's max_model_len: vLLM always
                samples one more, which is dropped.
            first: the index of the first of those tokens, at least 1.

        Raises:
            EngineFault: the reply is not one finite number for each of these tokens."""
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,  # the token's own only
            "detokenize": False,
        }
        call = {"token_ids": list(token_ids), "sampling_params": sampling}
        body = await self.request("POST", GENERATE_PATH, call)
        try:
            return parse_prompt_logprobs(body, token_ids, first)
        except ValueError as error:
            raise self._unusable_reply_error(body, error) from error

    async def pause(self, mode: Literal["keep", "wait", "abort"] = "keep") -> None:
        """Stop sampling: `keep` freezes running sequences, `wait` lets them end, `abort` returns
        them as they are."""
        await self.request("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        """Let the engine go on with the requests that `pause` has held."""
        await self.request("POST", "/resume")

    async def init_weight_transfer(self, init_info: PushInitInfo, *, resume: bool = True) -> None:
        """Pause the engine, connect it to a trainer, and resume it.

        Paused because every rank waits for the trainer, and data-parallel ranks that still compute
        would wait for it. After an error the engine stays paused.

        Args:
            init_info: the trainer's address, and what it sends.
            resume: whether to resume it."""
        await self.pause()
        await self.request("POST", "/init_weight_transfer_engine", {"init_info": init_info})
        if resume:
            await self.resume()

    async def swap_weights(
        self, update_info: PushUpdateInfo, policy_version: int, *, resume: bool = True
    ) -> None:
        """Pause the engine, load the received weights, name them `policy_version`, and `resume`.

        A sequence in flight continues under the new weights, with the keys and values of its
        earlier tokens recomputed, so that each token's log-probability is that of the policy
        version recorded for it.

        After an error the engine is still paused, and must not resume unless none of its weights
        has changed yet.

        Args:
            update_info: the description of the received push.
            policy_version: the version of the new weights.
            resume: whether the engine samples on after the swap.

        Raises:
            EngineLacksPush: the engine did not get all of the push.
            EngineError: the push arrived damaged or could not be loaded.
        """
        update = {
            "update_info": update_info,
            "weight_version": str(policy_version),
            "resume": resume,
        }
        await self.request("POST", "/swap_weights", update)

    async def set_policy_version(self, policy_version: int) -> None:
        """Name the weights that the engine holds already."""
        await self.request("POST", "/update_weight_version", {"new_version": str(policy_version)})

    async def sleep(self) -> None:
        """Free the GPU's memory: weights and caches are dropped. Nothing may be in flight."""
        await self.request("POST", "/sleep?level=2&mode=wait")

    async def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Allocate memory again. The weights are undefined until they are updated; the engine
        samples again once it has both."""
        await self.request("POST", f"/wake_up?tags={tag}")

    async def is_sleeping(self) -> bool:
        """Query the engine core, which replies between two of its steps."""
        body = await self.request("GET", "/is_sleeping")
        return bool(msgspec.json.decode(body)["is_sleeping"])

    async def read_counters(
        self, names: Collection[str], within_seconds: float
    ) -> Counter[str] | None:
        """Return what vLLM has counted since the engine's start, None where it does not answer.

        Args:
            names: the counters' names; one that vLLM does not have is 0.
            within_seconds: the time limit."""
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(within_seconds):
                body = await self.request("GET", "/metrics")
            counters: Counter[str] = Counter()
            for name, value in COUNTER_LINE.findall(body.decode()):  # a line for each copy (data)
                if name in names:
                    counters[name] += int(float(value))
            return counters
        return None

    async def request(self, method: str, path: str, json: Any = None) -> bytes:
        """Send one request and return the body of its reply.

        Args:
            method: the HTTP method.
            path: the path with its query.
            json: the body, encoded as JSON; None: no body."""
        return await self._send_request(method, path, json, aiohttp.ClientResponse.read)

    async def _send_request(
        self,
        method: str,
        path: str,
        json: Any,
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send one request and return what `read` makes of its reply.

        Args:
            method: "GET" or "POST".
            path: the path of the endpoint.
            json: the body, which is encoded as JSON; None for no body.
            read: reads the reply's body.
            headers: headers besides those of every request."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # One connection per call: vLLM closes idle ones after 5 seconds, and any after a
                # status 500, unannounced; a call on such a one would fail. No limit on their
                # number, as the default of 100 would hold groups back.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self.timeout_seconds),
                headers=self.headers,
            )
        payload = None if json is None else msgspec.json.encode(json)
        content_type = {} if json is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, self.url + path, data=payload, headers={**content_type, **(headers or {})}
            ) as reply:
                if reply.status == 200:
                    return await read(reply)
                body = await reply.read()
        except TimeoutError as error:
            raise EngineTimeout(
                f"{self.url}{path}: no answer in {self.timeout_seconds:.0f} seconds"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            message = f"{self.url}{path}: {type(error).__name__}: {error}"
            raise ConnectionBroken(message) from error
        raise _refusal_error(self.url + path, reply.status, body)

    def _unusable_reply_error(self, body: bytes, error: ValueError) -> EngineFault:
        return EngineFault(f"{self.url}{GENERATE_PATH}: {error}: {_shorten_body(body)}")


async def is_healthy(url: str, path: str = "/health") -> bool:
    """Return whether the server at `url` replies to GET `path` with status 200."""
    try:
        async with EngineClient(url, timeout_seconds=HEALTH_SECONDS) as client:
            await client.request("GET", path)
    except EngineError:
        return False
    return True


def _refusal_error(address: str, status: int, body: bytes) -> EngineError:
    """Return the error of a reply with another status than 200."""
    try:
        reply = msgspec.json.decode(body, type=ErrorReply)
    except msgspec.MsgspecError:  # vLLM's own errors are of another form, or plain text
        reply = ErrorReply()
    kinds = {EngineLacksPush.KIND: EngineLacksPush, EngineDied.KIND: EngineDied}
    error = EngineError if status < 500 else kinds.get(reply.kind, EngineFault)
    return error(f"{address}: {reply.error or f'status {status}: {_shorten_body(body)}'}", status)


def _shorten_body(body: bytes) -> str:
    text = body.decode(errors="replace")
    return text if len(text) <= BODY_EXCERPT_CHARS else text[:BODY_EXCERPT_CHARS] + "..."
