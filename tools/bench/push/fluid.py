"""A fluid simulation of transfers that share links: rates are max-min fair at every moment.

A task moves bytes through *resources* (links, memory) at the same time. Tasks of one *lane* run
one after another; a task also waits for the tasks that it depends on, and for its own latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tasks:
    """Tasks in the order in which their lanes run them. Add them in blocks with `add`."""

    _lane: list[np.ndarray] = field(default_factory=list)
    _size: list[np.ndarray] = field(default_factory=list)
    _latency: list[np.ndarray] = field(default_factory=list)
    _uses: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    _waits: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    count: int = 0

    def add(
        self,
        lane: Sequence[int] | np.ndarray,
        size: Sequence[float] | np.ndarray,
        uses: Sequence[tuple[np.ndarray, np.ndarray | float]],
        latency: float = 0.0,
    ) -> np.ndarray:
        """Add tasks and return their numbers.

        uses: pairs of a resource per task (-1: none) and the bytes through it per byte of the task.
        """
        size = np.asarray(size, float)
        numbers = np.arange(self.count, self.count + len(size))
        self.count += len(size)
        self._lane.append(np.asarray(lane))
        self._size.append(size)
        self._latency.append(np.full(len(size), latency))
        for resource, weight in uses:
            resource = np.asarray(resource)
            weights = np.broadcast_to(np.asarray(weight, float), resource.shape)
            used = (resource >= 0) & (weights > 0)
            self._uses.append((numbers[used], resource[used], weights[used]))
        return numbers

    def wait(self, task: np.ndarray, on: np.ndarray) -> None:
        """Let each of `task` begin after the one of `on` at the same place has ended."""
        self._waits.append((np.asarray(task), np.asarray(on)))

    def finish_times(self, capacity: np.ndarray, batch: float = 0.0) -> np.ndarray:
        """Return the second at which each task ends.

        capacity: bytes/s of each resource. batch: rates are computed again when this share of the
        running tasks has ended, instead of after every one; each task's own clock stays exact."""
        return _Run(self, np.asarray(capacity, float), batch).run()


class _Grouped:
    """Values by task: `of(tasks)` returns the places of all values of these tasks."""

    def __init__(self, key: np.ndarray, count: int):
        self.order = np.argsort(key, kind="stable")
        self.start = np.searchsorted(key[self.order], np.arange(count + 1))

    def of(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (the places, the position in `keys` of each)."""
        first, num = self.start[keys], self.start[keys + 1] - self.start[keys]
        owner = np.repeat(np.arange(len(keys)), num)
        ends = np.cumsum(num)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - num, num)
        return self.order[np.repeat(first, num) + within], owner


class _Run:
    def __init__(self, tasks: Tasks, capacity: np.ndarray, batch: float):
        join = np.concatenate
        empty = (np.zeros(0, int), np.zeros(0, int))
        self.capacity, self.batch, count = capacity, batch, tasks.count
        self.lane, self.left = join(tasks._lane), join(tasks._size)
        self.latency = join(tasks._latency)
        self.used_by, self.resource, self.weight = map(join, zip(*tasks._uses, strict=True))
        self.uses = _Grouped(self.used_by, count)
        waiting, on = map(join, zip(*(tasks._waits or [empty]), strict=True))
        self.num_waits = np.bincount(waiting, minlength=count)
        self.followers, self.follower = _Grouped(on, count), waiting
        self.lanes = _Grouped(self.lane, self.lane.max() + 1)
        self.head = self.lanes.start[:-1].copy()
        self.ready = np.zeros(count)  # when the last task that it waits for ended
        self.free = np.zeros(len(self.head))  # when the lane's last task ended
        self.clock = np.zeros(count)  # until when a running task's progress is counted
        self.end = np.full(count, np.nan)

    def run(self) -> np.ndarray:
        """Return the time at which each task ends. Raises ValueError for tasks that wait for each
        other."""
        running = self._startable(np.arange(len(self.head)))
        now = 0.0
        while len(running):
            flowing = running[self.clock[running] <= now]
            if not len(flowing):
                now = self.clock[running].min()
                continue
            rate = self._rates(flowing)
            done_at = self.clock[flowing] + self.left[flowing] / rate
            starts = self.clock[running]
            events = np.concatenate([done_at, starts[starts > now]])
            until = np.quantile(events, self.batch, method="lower") if self.batch else events.min()
            is_done = done_at <= until * (1 + 1e-12)
            self.left[flowing] -= rate * (until - self.clock[flowing])
            self.clock[flowing] = until
            done = flowing[is_done]
            self.end[done] = done_at[is_done]
            self.left[done] = 0.0
            now = max(now, until)
            if len(done):
                running = np.concatenate([running[np.isnan(self.end[running])], self._after(done)])
        if np.isnan(self.end).any():
            raise ValueError(f"{int(np.isnan(self.end).sum())} tasks wait for each other")
        return self.end

    def _after(self, done: np.ndarray) -> np.ndarray:
        """Return the tasks that can start once `done` have ended."""
        lanes = self.lane[done]
        self.free[lanes] = self.end[done]
        self.head[lanes] += 1
        places, owner = self.followers.of(done)
        followers = self.follower[places]
        np.subtract.at(self.num_waits, followers, 1)
        np.maximum.at(self.ready, followers, self.end[done][owner])
        return self._startable(np.unique(np.concatenate([lanes, self.lane[followers]])))

    def _startable(self, lanes: np.ndarray) -> np.ndarray:
        lanes = lanes[self.head[lanes] < self.lanes.start[lanes + 1]]
        tasks = self.lanes.order[self.head[lanes]]
        tasks = tasks[(self.num_waits[tasks] == 0) & (self.clock[tasks] == 0)]
        start = np.maximum(self.free[self.lane[tasks]], self.ready[tasks]) + self.latency[tasks]
        self.clock[tasks] = np.maximum(start, 1e-12)  # 0: not started
        return tasks

    def _rates(self, flowing: np.ndarray) -> np.ndarray:
        """Return max-min fair rates: the flows of a link that is tighter for each of them than any
        other link get their share of it, and leave; then the next such links."""
        places, flow = self.uses.of(flowing)
        resource, weight = self.resource[places], self.weight[places]
        left, count = self.capacity.copy(), len(self.capacity)
        rate = np.zeros(len(flowing))
        while len(flow):
            load = np.bincount(resource, weight, count)
            share = np.divide(left, load, out=np.full(count, np.inf), where=load > 1e-12)
            least = np.full(len(flowing), np.inf)
            np.minimum.at(least, flow, share[resource])
            is_tight = np.ones(count, bool)
            looser = least[flow] < share[resource] * (1 - 1e-9)
            is_tight[resource[looser]] = False
            fixed = np.zeros(len(flowing), bool)
            fixed[flow[is_tight[resource]]] = True
            rate[fixed] = least[fixed]
            going = fixed[flow]
            used = np.bincount(resource[going], (weight * rate[flow])[going], count)
            left = np.maximum(left - used, 0.0)
            flow, resource, weight = flow[~going], resource[~going], weight[~going]
        return rate
