"""The gateway: an HTTP server between agents and the fleet, with the protocols of their clients.

Every turn goes through the fleet: it survives the death of an engine and a weight push. The tokens
that are trained are those that the engine sampled (`continuation`). A client names its session by
the session's secret, as its API key."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Protocol, Self

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from megatron_r1.agents.continuation import Continuation, RenderError
from megatron_r1.agents.conversation_matching import NextPrompt, continue_tokens
from megatron_r1.agents.gateway import chat, messages, responses, tokens
from megatron_r1.agents.gateway.body import Body
from megatron_r1.agents.gateway.request import (
    SERVED_MODEL,
    Message,
    RequestError,
    TurnReply,
    TurnRequest,
)
from megatron_r1.agents.gateway.session import (
    GatewaySession,
    SampledTurn,
    SessionLimits,
    TurnSampling,
)
from megatron_r1.agents.turn_parsing import Parser, TurnReader, require_finished
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.stop_strings import truncate_at_stop, truncate_response

MAX_BODY_BYTES = 64 * 2**20
BYTES_PER_TOKEN = 32
"""The most bytes of a request's JSON for each token of the context, far more than any text has. To
tokenize a longer request would hold up all other sessions, for seconds a megabyte."""
MAX_OTHER_BYTES = 2**18
"""The most bytes that a body may have besides its conversation."""
KEEP_ALIVE_SECONDS = 10.0
"""The pause between comments in a stream whose turn is still being sampled."""
KEY_HEADERS = ("x-api-key", "X-Session-ID", "X-R1-Session")
"""Headers that may carry the key, besides Authorization; the last is for clients that set the
others themselves."""
SamplingOptions = Literal["run", "refuse"]


class WireFormat(Protocol):
    """One protocol, a module: reads a body, and writes a reply, a stream and an error."""

    KEEP_ALIVE: bytes

    def parse_request(self, body: Body, stored: Mapping[str, list[Message]]) -> TurnRequest:
        """Return what a body asks for.

        Args:
            body: the request's JSON object.
            stored: conversations of earlier replies by their id."""

    def format_reply(self, turn: TurnReply, request: TurnRequest) -> dict[str, Any]:
        """Return a sampled turn as the body of a reply that is not streamed, in this API's form."""

    def format_events(self, turn: TurnReply, request: TurnRequest) -> Iterator[bytes]:
        """Yield the reply as server-sent events."""

    def format_error(self, refused: RequestError) -> dict[str, Any]:
        """Return the body of a refusal."""

    def format_error_event(self, refused: RequestError) -> bytes:
        """Return a refusal as an event of a stream that has begun."""


ROUTES: dict[str, WireFormat] = {
    "/v1/chat/completions": chat,
    "/v1/responses": responses,
    "/v1/messages": messages,
    "/v1/v1/messages": messages,  # Anthropic's client adds /v1 to OpenAI's base URL
    "/inference/v1/generate": tokens,
    "/v1/inference/v1/generate": tokens,
}


class Gateway:
    """Serves sessions from `start` to `close`; `async with` does both.

    Args:
        tokenizer: tokenizer and template.
        parser: the parser of reasoning and tool calls.
        host: the address to listen on, at a free port.
        sampling_options: `run` replaces a request's options that differ from the run's, and notes
            it in the session, as only the policy's own distribution can be trained on; `refuse`
            answers 400.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        parser: Parser,
        *,
        host: str = "127.0.0.1",
        sampling_options: SamplingOptions = "run",
    ) -> None:
        self._continuation = Continuation(tokenizer.hf_tokenizer, tokenizer.end_tokens)
        self._tokenizer, self._reader = tokenizer, TurnReader(parser, self._continuation)
        self._host, self._port = host, 0
        self._sampling_options = sampling_options
        self._sessions: dict[bytes, GatewaySession] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start to listen.

        Raises:
            OSError: the address is taken.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for path, wire_format in ROUTES.items():
            app.router.add_post(path, self._make_endpoint(wire_format, self._serve_turn))
            if wire_format is messages:
                count = self._make_endpoint(wire_format, self._count_tokens)
                app.router.add_post(f"{path}/count_tokens", count)
        app.router.add_get("/v1/models", self._make_endpoint(chat, self._list_models))
        app.router.add_route("*", "/{path:.*}", self._make_endpoint(chat, self._refuse_path))
        # A handler is cancelled when its client goes away; its turn waits for a repeated request.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    @property
    def url(self) -> str:
        """The base URL without a path, for Anthropic's clients; OpenAI's take `url + "/v1"`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    def open(self, limits: SessionLimits, sampling: TurnSampling) -> GatewaySession:
        """Return a new session; requests with its secret are served until `end`."""
        session = GatewaySession(limits, sampling)
        self._sessions[_secret_digest(session.secret)] = session
        return session

    async def end(self, session: GatewaySession) -> None:
        """End a session: its secret is unknown from now on, its turns in flight are aborted."""
        self._sessions.pop(_secret_digest(session.secret), None)
        await session.close()

    async def close(self) -> None:
        """End all sessions and stop listening. Safe to call again."""
        for session in list(self._sessions.values()):
            await self.end(session)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _make_endpoint(
        self,
        wire_format: WireFormat,
        handle: Callable[[WireFormat, GatewaySession, web.Request], Awaitable[web.StreamResponse]],
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def endpoint(request: web.Request) -> web.StreamResponse:
            session = None
            try:
                session = self._authenticated_session(request.headers)
                return await handle(wire_format, session, request)
            except RequestError as error:
                refusal = error
            except web.HTTPRequestEntityTooLarge:
                message = f"the body has more than {MAX_BODY_BYTES} bytes"
                refusal = RequestError(message, status=413, kind="request_too_large")
            except RecursionError:
                refusal = RequestError("the request is nested too deep")
            except Exception as error:  # noqa: BLE001 - our fault, or that of the parsers' start
                transport = request.transport
                if isinstance(error, ConnectionError) and (not transport or transport.is_closing()):
                    return web.Response(status=499)  # the client is gone, and reads no reply
                refusal = RequestError("the gateway failed", status=500, kind="api_error")
                if session is not None:
                    session.end("protocol_error", f"{type(error).__name__}: {error}")
            if session is not None:
                session.notes[f"refused: {refusal}"[:200]] += 1
            return _json_response(wire_format.format_error(refusal), refusal.status)

        return endpoint

    def _authenticated_session(self, headers: Mapping[str, str]) -> GatewaySession:
        """Return the session whose secret the headers carry.

        Raises:
            RequestError: no session has this secret; the status is 401.
        """
        bearer = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        for secret in (bearer, *(headers.get(name, "") for name in KEY_HEADERS)):
            session = self._sessions.get(_secret_digest(secret))
            if session is not None:
                return session
        raise RequestError(
            "no session has this key; give the episode's own as `Authorization: Bearer KEY` or "
            "`x-api-key: KEY` (an episode that has ended has none)",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
        )

    async def _serve_turn(
        self, wire_format: WireFormat, session: GatewaySession, http_request: web.Request
    ) -> web.StreamResponse:
        body = await _read_body(http_request, session)
        request = wire_format.parse_request(_parse_body(body), session.stored)
        self._replace_options(session, request)
        prompt = self._next_prompt(session, request)
        key = hashlib.sha256(http_request.path.encode() + body).digest()
        task = session.undelivered.pop(key, None)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            prompt_ids = [*session.tree.token_ids(prompt.parent), *prompt.token_ids]
            limit = session.max_tokens(request.max_tokens, len(prompt_ids))
            task = asyncio.create_task(
                self._sample_turn(session, request, prompt, prompt_ids, limit)
            )
            session.running.add(task)
            task.add_done_callback(partial(session.on_turn_done, key))
        try:
            if not request.stream:
                return _json_response(
                    wire_format.format_reply(session.add(await asyncio.shield(task)), request)
                )
            return await _stream_turn(wire_format, session, task, request, http_request)
        except (asyncio.CancelledError, ConnectionError):
            session.undelivered[key] = task
            raise

    async def _sample_turn(
        self,
        session: GatewaySession,
        request: TurnRequest,
        prompt: NextPrompt,
        prompt_ids: list[int],
        max_tokens: int,
    ) -> SampledTurn:
        """Sample a turn.

        Raises:
            RequestError: no engine could sample, or other turns at once have used up the episode's
                tokens.
        """
        num_prompt, decode = len(prompt_ids), self._tokenizer.decode
        with session.waiting():
            try:
                response = await session.sampling.generate(prompt_ids, max_tokens)
                require_finished(response)
            except EngineError as error:
                raise RequestError(
                    "no engine could sample this turn", status=503, kind="api_error"
                ) from error
            response, text, stop_string = truncate_at_stop(
                response, num_prompt, request.stop, decode
            )
            if (num_kept := session.claim(len(response.token_ids))) < len(response.token_ids):
                response = truncate_response(response, num_prompt, num_kept, "length")
                text, stop_string = decode(response.token_ids), None
            message = await self._reader.read(
                text, response.token_ids, prompt_ids, request.tools, request.max_calls
            )
        model = request.model or SERVED_MODEL
        reply = TurnReply(model, num_prompt, response, message, stop_string)
        return SampledTurn(prompt, request, reply)

    def _replace_options(self, session: GatewaySession, request: TurnRequest) -> None:
        """Note, or refuse, sampling options that are not the run's."""
        run_options: dict[str, Any] = {
            "temperature": session.sampling.temperature,
            "top_p": session.sampling.top_p,
            "stop_token_ids": self._tokenizer.stop_token_ids,
        }
        for name, value in request.options.items():
            if name in run_options and value == run_options[name]:
                continue
            # The run's other end tokens end a turn as well, also where a client lists its own.
            if (
                name == "stop_token_ids"
                and isinstance(value, list)
                and set(value) <= set(run_options[name])
            ):
                continue
            if self._sampling_options == "refuse":
                remedy = (
                    f"the run samples with {run_options[name]}"
                    if name in run_options
                    else "leave it out"
                )
                raise RequestError(f"{value!r} would change the sampling; {remedy}", name)
            session.notes[f"{name}={value}"[:80]] += 1

    def _next_prompt(self, session: GatewaySession, request: TurnRequest) -> NextPrompt:
        if request.token_ids is not None:
            if (max_id := max(request.token_ids)) >= (size := self._continuation.vocabulary_size):
                raise RequestError(
                    f"token {max_id} is not one of the vocabulary's {size}", "token_ids"
                )
            return continue_tokens(session.tree, request.token_ids)
        try:
            return self._continuation.next_prompt(session.tree, request.messages, request.tools)
        except RenderError as error:
            raise RequestError(str(error), "messages") from None

    async def _count_tokens(
        self, wire_format: WireFormat, session: GatewaySession, http_request: web.Request
    ) -> web.StreamResponse:
        request = wire_format.parse_request(
            _parse_body(await _read_body(http_request, session)), session.stored
        )
        prompt = self._next_prompt(session, request)
        num_tokens = len(session.tree.token_ids(prompt.parent)) + len(prompt.token_ids)
        return _json_response({"input_tokens": num_tokens})

    async def _list_models(
        self, wire_format: WireFormat, session: GatewaySession, http_request: web.Request
    ) -> web.StreamResponse:
        """Reply with the one model that there is, in the forms of OpenAI, vLLM and Anthropic."""
        model = {"id": SERVED_MODEL, "object": "model", "created": 0, "owned_by": "megatron-r1"}
        model |= {"max_model_len": session.sampling.max_model_len}  # as vLLM
        date = "1970-01-01T00:00:00Z"
        model |= {"type": "model", "display_name": SERVED_MODEL, "created_at": date}  # Anthropic
        return _json_response({"object": "list", "data": [model], "has_more": False})

    async def _refuse_path(
        self, wire_format: WireFormat, session: GatewaySession, http_request: web.Request
    ) -> web.StreamResponse:
        raise RequestError(
            f"there is no {http_request.method} {http_request.path}",
            status=404,
            kind="not_found_error",
        )


async def _stream_turn(
    wire_format: WireFormat,
    session: GatewaySession,
    task: asyncio.Task[SampledTurn],
    request: TurnRequest,
    http_request: web.Request,
) -> web.StreamResponse:
    """Send a turn as server-sent events, after comments that keep the connection alive while the
    turn is being sampled."""
    head = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    stream = web.StreamResponse(headers=head)
    await stream.prepare(http_request)
    while not (await asyncio.wait({task}, timeout=KEEP_ALIVE_SECONDS))[0]:
        await stream.write(wire_format.KEEP_ALIVE)
    try:
        for event in wire_format.format_events(session.add(task.result()), request):
            await stream.write(event)
    except RequestError as refused:
        await stream.write(wire_format.format_error_event(refused))
    await stream.write_eof()
    return stream


async def _read_body(http_request: web.Request, session: GatewaySession) -> bytes:
    """Return a request's body.

    Raises:
        RequestError: it is not encoded as its headers name it, or is so long that no engine could
            take it.
    """
    try:
        body = await http_request.read()
    except (PayloadEncodingError, web.RequestPayloadError) as error:
        raise RequestError(f"the body cannot be read: {error}") from None
    if len(body) > BYTES_PER_TOKEN * session.sampling.max_model_len + MAX_OTHER_BYTES:
        raise session.end_out_of_tokens(
            f"a body of {len(body):,} bytes leaves no room for an answer: the engines take "
            f"{session.sampling.max_model_len} tokens"
        )
    return body


def _parse_body(body: bytes) -> Body:
    try:
        return Body(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def _json_response(value: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def _secret_digest(secret: str) -> bytes:
    """Return the key of a session's look-up: a look-up of the secret itself could be timed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
