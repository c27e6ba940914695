"""A fleet of engines without processes."""

import asyncio
from contextlib import nullcontext

from megatron_r1.push.control_messages import ConnectedSets, OpenedPush, SentWeights
from megatron_r1.trainer.operations import PushOperations


def push_result(operation, port=1, failures=None):
    """What a trainer rank with links to no engine returns. failures: of each set."""
    return {
        PushOperations.open_push: OpenedPush(("127.0.0.1", port)),
        PushOperations.connect_sets: ConnectedSets({}, {}, {}),
        PushOperations.send_weights: SentWeights(failures or {}),
    }[operation]


class SmallFleet:
    def __init__(self, engines=()):
        self.engines, self.lost, self.awake = list(engines), [], asyncio.Event()
        self.awake.set()

    @property
    def engines_use_memory(self):
        return self.awake.is_set() and any(e.is_up and not e.is_asleep for e in self.engines)

    async def swap_weights(self, update, version): ...

    def set_weight_sender(self, send_weights): ...

    def liveness_grace(self, seconds):
        return nullcontext()

    def replace(self, engine, death):
        engine.is_up = False
        self.lost.append((engine.index, str(death)))
