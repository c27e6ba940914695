"""Python imports this at the start of every process whose PYTHONPATH has this folder: it plants the
defect that PLANTED names in the module that has it."""

import importlib.abc
import importlib.machinery
import os
import sys


def refuse_mtp(module):
    """The push plans for stages without MTP layers."""
    from megatron_r1.weights.layout import stage_shards

    module.recipe_stages = lambda config, hf: stage_shards(
        hf,
        config.parallel.pipeline,
        config.parallel.virtual_pipeline,
        pipeline_layout=config.parallel.pipeline_layout,
        with_mtp=False,
    )


def confuse_single_tokens(module):
    """A row of padding counts as the batch's one token (vllm-project/vllm#50154)."""
    module.gather_single_tokens = lambda: None


def deliver_nothing(module):
    """Weights arrive and are not loaded after the first push (verl#7495)."""
    upstream = module.load
    calls = []

    def load(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            upstream(*arguments, **settings)

    module.load = load


PLANTED = {
    "mtp": ("megatron_r1.weight_sync.trainer_rank", refuse_mtp),
    "single_tokens": ("megatron_r1.vllm_plugin.sequence_parallel", confuse_single_tokens),
    "undelivered": ("megatron_r1.vllm_plugin.swap", deliver_nothing),
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


if "PLANTED" in os.environ:
    sys.meta_path.insert(0, Planter(*PLANTED[os.environ["PLANTED"]]))
