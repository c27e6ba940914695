"""The rewards that request a served model."""

import asyncio
import importlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from r1_grading.remote.service import Service, Ungradable
from r1_grading.remote.settings import ServiceSettings, read_settings
from r1_grading.rewards import SERVED_REWARDS, Grade


class RemoteReward(Protocol):
    """The interface of a class named in `rewards.SERVED_REWARDS`."""

    settings_type: type[ServiceSettings]
    service: Service

    def __init__(self, settings: Any) -> None: ...
    async def check(self) -> None:
        """Raise ServiceError when the service cannot grade."""

    async def grade(self, response: str, truth: object, **entry: object) -> Grade:
        """Request a grade from the service.

        Raises:
            ValueError: a mistake in the row.
            Ungradable: the service cannot grade this response.
            ServiceError: the service is down.
        """

    async def close(self) -> None:
        """Close the connections to the service."""


class RemoteGraders:
    """All served rewards of a run. Each service is checked once, before its first grade.

    Belongs to the event loop of its first `grade`."""

    def __init__(self) -> None:
        self._graders: dict[str, RemoteReward] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._counters: Counter[str] = Counter()

    async def grade(self, kind: str, response: str, truth: object, fields: dict[str, Any]) -> Grade:
        """Return the grade of one response.

        It is `Grade.ungraded` if only this response cannot be graded.

        Args:
            kind: a served reward.
            response: the text that the policy sampled.
            truth: what the reward compares with.
            fields: settings of `kind`, and the prompt's fields.

        Raises:
            ServiceError: the service is down, refuses the client, or fails its check: that is never
                turned into a reward."""
        names = settings_names(kind)
        options = {name: value for name, value in fields.items() if name in names}
        entry = {name: value for name, value in fields.items() if name not in names}
        key = json.dumps([kind, options], sort_keys=True, default=str)
        if key not in self._graders:
            self._graders[key] = reward_class(kind)(check_options(kind, options))
            self._checks[key] = asyncio.create_task(self._graders[key].check())
        # Shielded: other callers still wait for the check when this one is cancelled.
        await asyncio.shield(self._checks[key])
        try:
            grade = await self._graders[key].grade(response, truth, **entry)
        except Ungradable as error:
            self._counters["ungraded"] += 1
            return Grade.ungraded(error)
        self._counters["graded"] += 1
        return grade

    def snapshot(self) -> dict[str, int]:
        """Return counts since the start; empty while no served reward is used.

        They are remote/graded, /ungraded, /requests, /retries, /cached and /no_verdict."""
        if not self._graders:
            return {}
        counters = sum((g.service.counters for g in self._graders.values()), self._counters)
        names = ("graded", "ungraded", "requests", "retries", "cached", "no_verdict")
        return {f"remote/{name}": counters[name] for name in names}

    async def close(self) -> None:
        """Cancel checks that are under way and close every grader."""
        for check in self._checks.values():
            check.cancel()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)
        await asyncio.gather(*(grader.close() for grader in self._graders.values()))


def reward_class(kind: str) -> type[RemoteReward]:
    """Import and return the class of a served reward."""
    module, _, name = SERVED_REWARDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def settings_names(kind: str) -> frozenset[str]:
    """Return the options of a served reward."""
    return frozenset(reward_class(kind).settings_type.model_fields)


def check_options(kind: str, options: Mapping[str, Any]) -> ServiceSettings:
    """Return the settings of reward `kind`; no key is read.

    Raises:
        UserError: an unknown option, or an invalid value.
    """
    return read_settings(kind, reward_class(kind).settings_type, options)
