"""`POST /swap_weights`: one call of vLLM's server for all of a swap of weights.

vLLM's own calls for it are six, made while nothing generates, and /pause sleeps for 20 ms once the
engine has stopped (v1/engine/async_llm.py:984): 36 ms in all, where the engine itself needs 3."""

from typing import Annotated, Any

from fastapi import Body, Request
from fastapi.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.entrypoints.rl.online.api_router import engine_client, router
from vllm.entrypoints.rl.online.metrics import weight_operation_metrics

from megatron_r1.weight_sync.receive.errors import IncompletePush


async def swap_weights(
    request: Request,
    update_info: Annotated[dict[str, Any] | list[dict[str, Any]], Body()],
    weight_version: Annotated[str, Body()],
    resume: Annotated[bool, Body()] = True,
) -> JSONResponse:
    """Pause with requests in flight, have the backend load the received weights, set
    `weight_version`, drop all keys and values, and resume, if asked to. After an error the engine
    stays paused; for an incomplete push the body of status 500 has "kind": "incomplete_push".

    Without `reset_running_requests` vLLM keeps the whole cache while any sequence is in flight: new
    groups would then attend to keys of the weights before."""
    engine = engine_client(request)
    # Returns when no step is under way. The engine stamps tokens with their version, so it does not
    # matter when their receiver gets them.
    await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
    with weight_operation_metrics().record("update"):
        await engine.start_weight_update()
        try:
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        except Exception as error:  # of another process, whose class is lost
            if IncompletePush.CODE not in str(error):
                raise
            body = {"kind": IncompletePush.CODE, "error": str(error)}
            return JSONResponse(body, status_code=500)
        await engine.finish_weight_update(weight_version)
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("the prefix cache was not reset")
    if resume:
        await engine.resume_generation()
    return JSONResponse({"weight_version": weight_version})


def add() -> None:
    """Add the endpoint to the server that this process will start."""
    router.post("/swap_weights")(swap_weights)
