"""A fleet of engines without processes."""

import asyncio
from contextlib import nullcontext


class SmallFleet:
    def __init__(self, engines=()):
        self.engines, self.lost, self.awake = list(engines), [], asyncio.Event()
        self.awake.set()

    async def push(self, update, version): ...

    def patient(self, seconds):
        return nullcontext()

    def replace(self, engine, death):
        engine.is_up = False
        self.lost.append((engine.index, str(death)))
