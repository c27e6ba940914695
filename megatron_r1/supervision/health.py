"""GET /health (JSON, 503 when stalled) and GET /metrics (Prometheus), served by the controller."""

from __future__ import annotations

import time
from typing import Any

import prometheus_client
from aiohttp import web

from megatron_r1.errors import UserError
from megatron_r1.files import atomic_write
from megatron_r1.rl.in_flight import PHASES
from megatron_r1.supervision.prometheus import RunCollector
from megatron_r1.supervision.watchdog import Watchdog

ADDRESS_FILE = "health_address"


def health(watchdog: Watchdog) -> dict[str, Any]:
    """Return the state of the run as JSON.

    status: ok; degraded: the run goes on with fewer engines or ranks; stalled: no progress for
    `run.hang_seconds`.
    """
    run = watchdog.run
    trainer, rollouts = run.trainer, run.rollouts
    phase, detail = run.recorder.view.doing
    waiting = trainer.waiting
    facts: dict[str, Any] = {
        "status": "ok",
        "step": run.recorder.latest.get("step", run.recorder.state.step),
        "steps": run.config.run.steps,
        "phase": phase,
        "detail": detail,
        "seconds_since_progress": round(watchdog.quiet_seconds, 1),
        "hang_reports": watchdog.num_reports,
        "trainer": {
            "ranks": trainer.world_size,
            "ready": len(trainer.ranks),
            "restarts": trainer.num_restarts,
            "operation": waiting.operation if waiting else None,
            "seconds": round(time.monotonic() - waiting.since, 1) if waiting else None,
            "without_reply": sorted(waiting.missing) if waiting else [],
        },
    }
    engines_down = 0
    if rollouts is not None:
        fleet, in_flight = rollouts.fleet, rollouts.in_flight
        engines_down = sum(not engine.is_up for engine in fleet.engines)
        facts["engines"] = {
            "up": len(fleet.engines) - engines_down,
            "down": engines_down,
            "restarts": fleet.num_restarts,
            "policy_version": fleet.version,
            "sequences": {engine.name: engine.num_running for engine in fleet.engines},
        }
        facts["groups"] = {phase: in_flight.count(phase) for phase in PHASES}
        facts["rewards"] = rollouts.pool.snapshot()
    if watchdog.is_stalled:
        facts["status"] = "stalled"
    elif engines_down or len(trainer.ranks) < trainer.world_size:
        facts["status"] = "degraded"
    return facts


class HealthServer:
    """Serves while an `async with` block runs, at `address`."""

    def __init__(self, watchdog: Watchdog, host: str, port: int) -> None:
        """port: 0 for any free one."""
        self._watchdog, self._host, self._port = watchdog, host, port
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(RunCollector(watchdog))
        self._file = watchdog.run.folder / ADDRESS_FILE
        self.address = ""

    async def __aenter__(self) -> HealthServer:
        """Raises UserError if the port is taken."""
        application = web.Application()
        application.add_routes(
            [web.get("/health", self._health), web.get("/metrics", self._metrics)]
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise UserError(
                f"run.health_port: {self._port} cannot be used ({error}); choose another, or 0 for "
                "any that is free"
            ) from None
        port = self._runner.addresses[0][1]
        self.address = f"http://{self._host}:{port}"
        atomic_write(self._file, self.address + "\n")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        facts = health(self._watchdog)
        return web.json_response(facts, status=503 if facts["status"] == "stalled" else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        body = prometheus_client.generate_latest(self._registry)
        return web.Response(
            body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        )
