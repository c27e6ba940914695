"""`POST /swap_weights`: pauses an engine, swaps its weights and resumes it in one HTTP call.

vLLM's own calls for a swap are six, made while nothing generates, and /pause sleeps for 20 ms once
the engine has stopped (v1/engine/async_llm.py: `AsyncLLM.pause_generation`): 36 ms in all, where
the engine itself needs 3."""

import asyncio
from typing import Annotated, Any

from fastapi import Body, Request
from fastapi.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.entrypoints.rl.online.api_router import engine_client, router
from vllm.entrypoints.rl.online.metrics import weight_operation_metrics

from megatron_r1.push.control_messages import IncompletePush, UnusedPush

CORE_ENDED = "core_ended"
STATUS_OF_FAILURE = {CORE_ENDED: 500, IncompletePush.CODE: 500, UnusedPush.CODE: 409}
"""HTTP status of each "kind" of failure. Below 500: another engine would do no better."""
DEATH_SECONDS = 0.5
"""The pause between two checks whether the core is still alive."""


async def swap_weights(
    request: Request,
    update_info: Annotated[dict[str, Any] | list[dict[str, Any]], Body()],
    weight_version: Annotated[str, Body()],
    resume: Annotated[bool, Body()] = True,
) -> JSONResponse:
    """Swap as `_pause_and_swap` does. Where the engine's core ends meanwhile, reply so at once:
    vLLM's call to it never returns then, and its server, which waits for open calls, does not end.

    Args:
        request: the HTTP request, whose app has the engine.
        update_info: the fields of a `PushUpdateInfo`, alone or in a list.
        weight_version: the version that the loaded weights get.
        resume: whether generation continues after the swap."""
    engine = engine_client(request)
    swap = asyncio.ensure_future(_pause_and_swap(engine, update_info, weight_version, resume))
    while not swap.done():
        await asyncio.wait({swap}, timeout=DEATH_SECONDS)
        if engine.errored and not swap.done():
            swap.cancel()
            return _failure_reply(CORE_ENDED, "the engine's core has ended in the middle of a push")
    return swap.result()


async def _pause_and_swap(
    engine: Any,
    update_info: dict[str, Any] | list[dict[str, Any]],
    weight_version: str,
    resume: bool,
) -> JSONResponse:
    """Pause with requests in flight, have the backend load the received weights, set
    `weight_version`, drop all keys and values, and resume, if asked to. After an error the engine
    stays paused; "kind" in the reply's body is a key of `STATUS` where it is one of these.

    Without `reset_running_requests` vLLM keeps the whole cache while any sequence is in flight: new
    groups would then attend to keys of the weights before.

    Args:
        engine: vLLM's engine client.
        update_info: the fields of a `PushUpdateInfo`, alone or in a list.
        weight_version: the version of the received weights.
        resume: whether requests go on at once."""
    # Returns when no step is under way. The engine stamps tokens with their version, so it does not
    # matter when their receiver gets them.
    await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
    with weight_operation_metrics().record("update"):
        await engine.start_weight_update()
        try:
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except Exception as error:  # of another process, whose class is lost
            for kind in STATUS_OF_FAILURE:
                if kind in str(error):
                    return _failure_reply(kind, str(error).partition(f"{kind}: ")[2])
            raise
        await engine.finish_weight_update(weight_version)
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("the prefix cache was not reset")
    if resume:
        await engine.resume_generation()
    return JSONResponse({"weight_version": weight_version})


def _failure_reply(kind: str, error: str) -> JSONResponse:
    return JSONResponse({"kind": kind, "error": error}, status_code=STATUS_OF_FAILURE[kind])


def add_swap() -> None:
    """Add the endpoint to the server that this process will start."""
    router.post("/swap_weights")(swap_weights)
