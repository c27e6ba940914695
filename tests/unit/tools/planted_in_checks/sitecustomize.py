"""Plants the defect that PLANTED names in a subject of `tools/gpu_check`.

Python imports this at the start of every process whose PYTHONPATH has this folder. What the subject
is compared with has no defect."""

import importlib.abc
import importlib.machinery
import os
import sys

OF_GPUS = "NVTE_DEBUG"
"""A variable that `tests.gpu.trainer_layers` sets for the ranks on GPUs."""


def attend_to_other_samples(module):
    """Attention takes a packed batch for one sample."""
    upstream = module.attend_packed

    def attend_packed(query, key, value, lengths, *settings):
        return upstream(query, key, value, lengths.sum()[None], *settings)

    if OF_GPUS in os.environ:
        module.attend_packed = attend_packed


def train_the_other_way(module):
    """An update follows half of the samples' gradients the wrong way."""
    upstream = module.pack_batch

    def pack_batch(*arguments, **settings):
        batch = upstream(*arguments, **settings)
        batch.advantages[::2].neg_()
        return batch

    if OF_GPUS in os.environ:
        module.pack_batch = pack_batch


def shift_the_bytes(module):
    """Every bucket of a push begins a byte too late."""
    upstream = module.enqueue_send_recv

    def exchange(handle, sent, received, stream):
        if sent and sent[1].num_bytes:
            peer, memory = sent
            sent = peer, memory._replace(address=memory.address + 1)
        upstream(handle, sent, received, stream)

    module.enqueue_send_recv = exchange


PLANTED = {
    "packing": ("megatron_r1.models.attention", attend_to_other_samples),
    "gradient": ("megatron_r1.trainer.sequence_packing", train_the_other_way),
    "bytes": ("megatron_r1.push.transports.nccl_communicator", shift_the_bytes),
}


class Planter(importlib.abc.MetaPathFinder):
    def __init__(self, name, plant):
        self.name, self.plant = name, plant

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        upstream = spec.loader.exec_module

        def exec_module(module):
            upstream(module)
            self.plant(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Planter(*PLANTED[os.environ["PLANTED"]]))
