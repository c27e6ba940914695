"""The trainer's end of the pusher for weights that lie in a safetensors file: one rank that holds
every tensor whole. Engines see no difference; tests of the real trainer are in test_push.py."""

import asyncio

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.models.weights.adapter_table import (
    PEFT_PREFIX,
    adapter_config,
    adapter_table,
)
from megatron_r1.models.weights.layout import stage_shards
from megatron_r1.models.weights.splits import Piece
from megatron_r1.push.checksum import copy_with_checksum
from megatron_r1.push.control_messages import AdapterSettings, OpenedPush, PushUpdateInfo
from megatron_r1.push.matching import EngineLayout, TrainerGrid
from megatron_r1.push.matching.tensors import pushed_tensors
from megatron_r1.push.sender import WeightSender
from megatron_r1.push.transports import shared_memory
from megatron_r1.push.transports.base import gpu_uuid


class FileTrainer:
    """Of the model that `config` describes; `load` puts a folder's weights in place. drafts: with
    its MTP layers. lora: of adapters alone."""

    def __init__(self, config, drafts=False, lora=None):
        adapters = lora and adapter_table(config, lora)
        self.shapes = dict(pushed_tensors(config, fp8=False, drafts=drafts, adapters=adapters))
        self.prefix = PEFT_PREFIX if lora else ""
        self.tensors = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        held = {
            name: [(tensor, Piece(name, 0, 0, 0, tensor.shape[0]))]
            for name, tensor in self.tensors.items()
        }
        stages = stage_shards(config, with_mtp=drafts)
        grid = TrainerGrid(1)
        # On the GPU of the calling thread, if it has one.
        gpus = [gpu_uuid(torch.cuda.current_device())] if torch.cuda.is_initialized() else ()
        self.sender = WeightSender(
            config,
            grid,
            held,
            self.store,
            stages=stages,
            drafts=drafts,
            gpus=gpus,
            adapters=adapters,
        )

    def load(self, folder):
        file = "adapter_model.safetensors" if self.prefix else "model.safetensors"
        for stored, tensor in load_file(folder / file).items():
            if (name := stored.removeprefix(self.prefix)) in self.tensors:
                self.tensors[name].copy_(tensor)

    async def call(self, operation, **arguments):
        operations = {
            "open_push": lambda: OpenedPush(("127.0.0.1", self.store.port)),
            "connect_sets": self.sender.connect,
            "send_weights": self.sender.send,
        }
        return await asyncio.to_thread(operations[operation.__name__], **arguments)

    async def call_all(self, operation, on_start=None, **arguments):
        if on_start is not None:
            on_start()
        return [await self.call(operation, **arguments)]


class FilePusher:
    """A pusher from such a trainer to a fleet: `await push(folder)` is the next version."""

    def __init__(
        self,
        config,
        fleet,
        *,
        layout=None,
        tensors=None,
        drafts=False,
        colocated=False,
        lora=None,
        **settings,
    ):
        self.trainer = FileTrainer(config, drafts, lora)
        self.fleet = fleet
        tensors = tensors or list(self.trainer.shapes.items())
        push = PushConfig(**settings)
        adapter = None
        if lora is not None:
            known = adapter_config(adapter_table(config, lora), lora, "")
            adapter = AdapterSettings(PEFT_PREFIX, known)
        shape = EngineLayout(**layout or {})
        links = EngineLinks(
            self.trainer, push, tensors, shape, colocated=colocated, adapter=adapter
        )
        self.pusher = WeightPusher(fleet, links)
        self._is_open = False

    async def push(self, folder):
        async with self.pusher.updating_weights():
            if not self._is_open:
                await self.pusher.open()
            self._is_open = True
            self.trainer.load(folder)
            return await self.pusher.push(self.fleet.policy_version + 1)

    async def check_damage(self, tensor):
        """Send the trainer's weights with another checksum of one tensor's chunk: the engine
        refuses the push by the tensor's name."""
        client = self.fleet.engines[0].client
        (name_of_set,) = self.trainer.sender._sets
        sender = self.trainer.sender._sets[name_of_set].links[0].sender
        names = (sender.table.slots[d.slot].name for d in sender.chunks)

        def damaged(*arguments):
            return copy_with_checksum(*arguments) ^ (next(names) == tensor)

        number = self.pusher._push_number + 1
        self.pusher._push_number += 2  # the next one fills the same buffer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_memory, "copy_with_checksum", damaged)
            self.trainer.sender.send(number, [name_of_set])
        with pytest.raises(EngineError, match=rf"1 tensors arrived otherwise.*{tensor}"):
            await client.swap_weights(PushUpdateInfo(number), 1000)
        await client.resume()
