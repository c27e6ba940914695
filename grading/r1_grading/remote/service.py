"""A client of a served model, over HTTP."""

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from typing import Any, Generic, TypeVar

import aiohttp
import msgspec

from r1_grading.base.errors import Cause, RunError, UserError, shorten
from r1_grading.remote.settings import ServiceSettings


class Message(msgspec.Struct):
    """A reply in a chat.

    A server that parses reasoning removes the thought from `content` and returns it as
    `reasoning_content` or `reasoning`, depending on the server.

    Attributes:
        content: the reply, or what follows its thought.
        reasoning_content: the thought.
        reasoning: the thought."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(msgspec.Struct):
    """One response from `/chat/completions`.

    Without a message it does not match, and the request counts as failed (`service.Service`)."""

    message: Message
    finish_reason: str | None = None


class CompletionChoice(msgspec.Struct):
    """One response: `message` from `/chat/completions`, `text` from `/completions`.

    Attributes:
        finish_reason: why the response ended.
        message: the reply of a chat.
        text: the continuation of a text."""

    finish_reason: str | None = None
    message: Message | None = None
    text: str | None = None


class Usage(msgspec.Struct):
    """The token counts of a request."""

    completion_tokens: int | None = None
    """None where a server does not count tokens."""


ChoiceType = TypeVar("ChoiceType", ChatChoice, CompletionChoice)


class Completion(msgspec.Struct, Generic[ChoiceType]):
    """The body of a reply."""

    choices: list[ChoiceType]
    usage: Usage | None = None


# Caused by this request: its length, a character the tokenizer refuses, a content filter.
REFUSED_STATUSES = frozenset({400, 413, 422})
# Temporary: too many requests, starting up, overloaded.
BUSY_STATUSES = frozenset({408, 409, 425, 429, 503, 504, 529})
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
TRIES_BEFORE_PROBE = 3
EXCERPT_CHARS = 300


class ServiceError(RunError):
    """The service is down, refuses the client, or does not serve a fitting model."""


class Ungradable(Exception):
    """The service works, but cannot answer this request."""


class _TryAgain(Exception):
    """A failed request that may succeed if it is repeated.

    Attributes:
        is_fault: the request itself may be the cause.
        wait_seconds: requested by the service."""

    def __init__(self, message: str, is_fault: bool, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.is_fault, self.wait_seconds = is_fault, wait_seconds


class Service:
    """POSTs JSON to `url`, at most `settings.concurrency` requests at once.

    Belongs to the event loop of its first `request`.

    Args:
        settings: how it is reached: requests at once, limits and retries.
        url: its address.
        reply_type: a msgspec type; a reply that does not match it counts as a failed try.
        probe: a request that the service can answer whenever it works.

    Attributes:
        trouble: why the latest try failed, for progress messages; "" before the first failure."""

    def __init__(
        self, settings: ServiceSettings, url: str, reply_type: type[Any], probe: dict[str, Any]
    ) -> None:
        self.settings = settings
        self.url = url
        self.counters: Counter[str] = Counter()
        self.trouble = ""
        self._probe = probe
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(reply_type)
        self._headers = {"Content-Type": "application/json", **_authorization_header(settings)}
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def request(self, body: dict[str, Any], retry_seconds: float | None = None) -> Any:
        """Return the decoded reply to `body`.

        Args:
            body: the request as JSON.
            retry_seconds: how long to retry; None: the setting.

        Raises:
            Ungradable: only this request cannot be answered.
            ServiceError: the service fails; with the URL, the last failure and the remedy."""
        patience = self.settings.retry_seconds if retry_seconds is None else retry_seconds
        deadline = time.monotonic() + patience
        num_faults = 0
        for attempt in itertools.count():
            try:
                async with self._slots:
                    return await self._post_request(body)
            except _TryAgain as failure:
                self.trouble = str(failure)
                num_faults += failure.is_fault
                # Half of the wait is random, so that many requests do not return at once.
                wait = min(FIRST_WAIT_SECONDS * 2 ** min(attempt, 9), LONGEST_WAIT_SECONDS)
                wait = max(wait * random.uniform(0.5, 1.0), failure.wait_seconds)
                is_over = time.monotonic() + wait > deadline
                # A text that breaks the model server must cost one sample only; the probe shows
                # whether it is an outage instead.
                is_suspect = num_faults >= TRIES_BEFORE_PROBE or (num_faults and is_over)
                if is_suspect and await self._answers_probe():
                    raise Ungradable(f"{failure} ({num_faults} times)") from None
                if is_over:
                    raise ServiceError(
                        f"{self.url}: {failure}; gave up after {attempt + 1} tries in "
                        f"{patience:g} s. Start the service or correct its url; the same "
                        f"command continues from here (longer patience: retry_seconds)"
                    ) from None
            self.counters["retries"] += 1
            await asyncio.sleep(wait)

    async def close(self) -> None:
        """Close the connections; pending requests raise ServiceError. Safe to call again."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _answers_probe(self) -> bool:
        try:
            await self._post_request(self._probe)
        except (_TryAgain, Ungradable, ServiceError):
            return False
        return True

    async def _post_request(self, body: dict[str, Any]) -> Any:
        if self._is_closed:
            raise ServiceError(f"{self.url}: this client was closed")
        self.counters["requests"] += 1
        if self._session is None:
            # One connection per call: vLLM closes idle ones unannounced.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout_seconds),
            )
        try:
            async with self._session.post(
                self.url,
                data=msgspec.json.encode(body),
                headers=self._headers,
                allow_redirects=False,  # the key goes to the named host only
            ) as response:
                return self._read_response(response, await response.read())
        except TimeoutError:
            seconds = self.settings.timeout_seconds
            # The reply's length is bounded, so a slow reply is due to load, not to this request.
            raise _TryAgain(f"no answer in {seconds:g} s", is_fault=False) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError) as error:
            raise _TryAgain(f"it hung up ({type(error).__name__})", is_fault=True) from None
        except aiohttp.InvalidURL:
            raise ServiceError(f"{self.url}: not a URL; correct its url") from None
        except aiohttp.ClientError as error:
            raise _TryAgain(f"cannot be reached ({error})", is_fault=False) from None

    def _read_response(self, response: aiohttp.ClientResponse, content: bytes) -> Any:
        status = response.status
        message = f"status {status}: {shorten(content.decode(errors='replace'), EXCERPT_CHARS)}"
        if status == 200:
            try:
                return self._decoder.decode(content)
            except msgspec.MsgspecError as error:
                raise _TryAgain(f"an answer of another kind ({error})", is_fault=True) from None
        if status in REFUSED_STATUSES:
            raise Ungradable(message)
        if status in BUSY_STATUSES:
            raise _TryAgain(message, is_fault=False, wait_seconds=_retry_after(response))
        if status >= 500:
            raise _TryAgain(message, is_fault=True)
        remedy = {401: "api_key_env", 403: "api_key_env", 404: "url and model"}.get(status, "url")
        raise ServiceError(f"{self.url}: {message}; check {remedy}")


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Return the seconds of a Retry-After header, at most 60; 0 without one, or for a date."""
    header = response.headers.get("Retry-After", "")
    return min(float(header), 60.0) if header.isdecimal() else 0.0


def _authorization_header(settings: ServiceSettings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    if not (key := os.environ.get(settings.api_key_env)):
        raise UserError(
            f"api_key_env: the environment variable {settings.api_key_env} is not set; "
            f"export it, or leave api_key_env out for a service without a key",
            key="api_key_env",
            cause=Cause.NOT_FOUND,
        )
    return {"Authorization": f"Bearer {key}"}
