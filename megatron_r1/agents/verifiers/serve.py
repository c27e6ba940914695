"""Runs verifiers' environment server; `python serve.py OPTIONS` in verifiers' own Python.

OPTIONS: JSON with `environment`, an EnvConfig of verifiers, `workers`, and `list`, to print the
tasks of the taskset, a line of JSON each, and end. Otherwise jobs are read from stdin and replies
written to stdout, both as lines of JSON; verifiers' own client talks to its server. The script
imports verifiers and the standard library only: the rest of this repository is not there."""

import asyncio
import json
import multiprocessing
import os
import sys
from functools import partial
from typing import Any, TextIO

SESSION_HEADER = "X-R1-Session"
"""The header with the session's key: verifiers sends one Authorization for all episodes of a
process."""
START_SECONDS = 300.0


def _list_tasks(options: dict[str, Any], output: TextIO) -> None:
    """Print the taskset's tasks."""
    from verifiers.v1.utils.loaders import load_taskset, resolve_env_config

    taskset = load_taskset(resolve_env_config(options["environment"]).taskset)
    for task in taskset:
        print(json.dumps(task.data.model_dump(mode="json")), file=output)
    output.flush()


async def serve_jobs(options: dict[str, Any], output: TextIO) -> None:
    """Serve jobs until stdin ends."""
    from verifiers.v1.serve.client import EnvClient
    from verifiers.v1.serve.pool import serve_env

    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    parent_end, server_end = context.Pipe()
    server = context.Process(
        target=serve_env,
        kwargs={
            "max_workers": options["workers"],
            "address": "tcp://127.0.0.1:0",
            "address_queue": addresses,
            "death_pipe": server_end,  # the server ends when this process does
            "config_data": options["environment"],
        },
    )
    server.start()
    server_end.close()
    # The harness starts this script again where it ends: without its server no episode would.
    asyncio.get_running_loop().add_reader(server.sentinel, os._exit, 1)
    address = await asyncio.to_thread(addresses.get, True, START_SECONDS)
    client = EnvClient(address)
    await client.wait_for_server_startup(START_SECONDS)
    print(json.dumps({"id": "", "ready": True}), file=output, flush=True)
    running_tasks: dict[str, asyncio.Task[None]] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        if "cancel" in job:
            if job["cancel"] in running_tasks:
                running_tasks[job["cancel"]].cancel()
            continue
        task = asyncio.create_task(_run_job(client, job, output))
        running_tasks[job["id"]] = task
        task.add_done_callback(partial(_forget_job, running_tasks, job["id"]))
    asyncio.get_running_loop().remove_reader(server.sentinel)
    parent_end.close()
    server.terminate()


def _forget_job(running: dict[str, Any], job_id: str, task: object) -> None:
    running.pop(job_id, None)


async def _run_job(client: Any, job: dict[str, Any], output: TextIO) -> None:
    from verifiers.v1.configs.client import EvalClientConfig, TrainClientConfig
    from verifiers.v1.types import SamplingConfig

    reply: dict[str, Any] = {"id": job["id"], "ok": False, "errors": []}
    endpoint = {"base_url": job["base_url"], "headers": {SESSION_HEADER: job["key"]}}
    endpoint["api_key_var"] = "R1_NO_KEY"
    try:
        config = (
            TrainClientConfig(
                **endpoint, renderer=job["renderer"], renderer_model_name=job["tokenizer"]
            )
            if job["client"] == "tokens"
            else EvalClientConfig(**endpoint)
        )
        episode = await client.run(config, "policy", SamplingConfig(), job["task"])
        reply |= _episode_outcome(episode)
    except Exception as error:  # noqa: BLE001 - the controller decides what it means
        reply["errors"].append(f"{type(error).__name__}: {error}")
    print(json.dumps(reply), file=output, flush=True)


def _episode_outcome(episode: Any) -> dict[str, Any]:
    """Return an episode's reward, tokens and errors. `ok` tells a failed trace, whose reward is 0,
    from one that earned 0."""
    traces = episode.traces
    errors = [f"{e.type}: {e.message}" for part in (episode, *traces) for e in part.errors]
    sequences = []
    for trace in traces:
        for branch in trace.branches:
            ids: list[int] = []
            end = 0
            for node in branch.nodes:
                sampled_indices = [index for index, flag in enumerate(node.mask) if flag]
                end = len(ids) + sampled_indices[-1] + 1 if sampled_indices else end
                ids += node.token_ids
            sequences.append(ids[:end])
    return {
        "ok": episode.ok and len(traces) == 1 and traces[0].ok,
        "reward": traces[0].reward if len(traces) == 1 else None,
        "is_timeout": episode.is_timeout or any(trace.is_timeout for trace in traces),
        "traces": len(traces),
        "sequences": sequences,
        "errors": errors,
    }


if __name__ == "__main__":
    # Prints of environments go to stderr; sys.path without this folder, whose names are the
    # project's.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[0] = os.getcwd()
    settings = json.loads(sys.argv[1])
    if settings.get("list"):
        _list_tasks(settings, lines)
    else:
        asyncio.run(serve_jobs(settings, lines))
