"""Python imports this at the start of every process whose PYTHONPATH has this folder: it plants the
defect that PLANTED names in the module that has it.

A fault that happens once leaves a file at PLANTED_AT, by which all processes, also those of a
restarted run, know that it has happened."""

import asyncio
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time


def strike():
    """Return whether the fault is to happen now: the first time only."""
    try:
        flags = os.O_CREAT | os.O_EXCL
        os.close(os.open(os.environ.get("PLANTED_AT", os.devnull), flags))
    except FileExistsError:
        return False
    return True


def refuse_mtp(module):
    """The push plans for stages without MTP layers."""
    from megatron_r1.models.weights.layout import stage_shards

    module.recipe_stages = lambda config, hf_config: stage_shards(
        hf_config,
        config.parallel.pipeline,
        config.parallel.virtual_pipeline,
        pipeline_layout=config.parallel.pipeline_layout,
        with_mtp=False,
    )


def confuse_single_tokens(module):
    """A row of padding counts as the batch's one token (vllm-project/vllm#50154)."""
    module.gather_single_tokens = lambda layer: None


def deliver_nothing(module):
    """Weights arrive and are not loaded after the first push (verl#7495)."""
    upstream = module.load_layers
    calls = []

    def load(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            upstream(*arguments, **settings)
        else:
            strike()

    module.load_layers = load


def lose_a_request(module):
    """A request of the second step never returns, and nothing raises (SkyRL#1173)."""
    upstream = module.EngineClient.generate
    calls = []

    async def generate(self, *arguments, **sampling):
        calls.append(1)
        if len(calls) > 8 and strike():
            await asyncio.Event().wait()
        return await upstream(self, *arguments, **sampling)

    module.EngineClient.generate = generate


def kill_a_sending_rank(module):
    """Trainer rank 1 dies in the middle of its second push (huggingface/trl#6796)."""
    upstream, regions = module.WeightSender.send, module.EncodedRegions
    now = {}

    def send(self, push, *arguments, **named):
        now.update(push=push, rank=self.rank)
        return upstream(self, push, *arguments, **named)

    class Regions(regions):
        def __getitem__(self, index):
            if now["rank"] == 1 and now["push"] == 2 and index == len(self._regions) // 2:
                kill_once()
            return super().__getitem__(index)

    module.WeightSender.send, module.EncodedRegions = send, Regions


def kill_a_loading_engine(module):
    """The engine dies when half of its second push is loaded (huggingface/trl#6796)."""
    upstream = module.load_layers
    calls = []

    def load(model, placed, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            upstream(model, placed[: len(placed) // 2], *arguments, **settings)
            kill_once()
        upstream(model, placed, *arguments, **settings)

    module.load_layers = load


def kill_once():
    if strike():
        os.kill(os.getpid(), signal.SIGKILL)


def spread_a_nan(module):
    """In the second update the last rank has one gradient that is NaN, before ranks add theirs up
    (facebookresearch/habitat-lab#2226)."""
    upstream = module.optimizer_step
    calls = []

    def optimizer_step(chunks, optimizer, learning_rate, run, **settings):
        import torch.distributed as dist

        calls.append(1)
        if len(calls) == 2 and dist.get_rank() == dist.get_world_size() - 1 and strike():
            trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
            trained[0].register_hook(lambda gradient: gradient.fill_(float("nan")))
        return upstream(chunks, optimizer, learning_rate, run, **settings)

    module.optimizer_step = optimizer_step


def stop_a_rank(module):
    """The last rank is stopped where its third update begins: the others wait for it in the first
    collective of theirs."""
    upstream = module.optimizer_step
    calls = []

    def optimizer_step(*arguments, **settings):
        import torch.distributed as dist

        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == dist.get_world_size() - 1 and strike():
            os.kill(os.getpid(), signal.SIGSTOP)
        return upstream(*arguments, **settings)

    module.optimizer_step = optimizer_step


def make_an_old_logprob_nan(module):
    """In the second step one token's log-probability under the old policy is NaN (verl#721)."""
    upstream = module.Trainer.compute_logprobs
    calls = []

    def compute_logprobs(self, *arguments, **settings):
        metrics = upstream(self, *arguments, **settings)
        calls.append(1)
        if len(calls) == 2 and strike():
            batch = self.rollout.minibatches[-1][-1]
            batch.logprobs["old"][batch.is_response.nonzero()[0]] = float("nan")
        return metrics

    module.Trainer.compute_logprobs = compute_logprobs


def keep_the_router_bias(module):
    """The router's bias is left out of every push but the first (NovaSky-AI/SkyRL#1505)."""
    upstream = module.load_layers
    calls = []

    def load(model, placed, *arguments, **settings):
        calls.append(1)
        if len(calls) > 1:
            placed = [at for at in placed if not at.parameter.name.endswith("correction_bias")]
            strike()
        upstream(model, placed, *arguments, **settings)

    module.load_layers = load


def round_the_router_bias(module):
    """The engine's router biases are rounded to bfloat16 (NVIDIA-NeMo/RL#3540)."""
    upstream = module.load_layers

    def load(model, *arguments, **settings):
        upstream(model, *arguments, **settings)
        for layer in model.modules():
            bias = getattr(layer, "e_score_correction_bias", None)
            if bias is not None:
                bias.data.copy_(bias.data.bfloat16())
                if bias.any():
                    strike()

    module.load_layers = load


def leave_out_the_drafter(module):
    """A push reaches the model and not the MTP layer that drafts (sgl-project/sglang#27718)."""

    def name_no_drafter():
        from vllm.v1.worker.gpu_worker import Worker

        upstream = Worker.init_weight_transfer_engine

        def init_weight_transfer_engine(self, init_info):
            strike()
            upstream(self, init_info)

        Worker.init_weight_transfer_engine = init_weight_transfer_engine

    module.expose_models = name_no_drafter


def keep_the_drafter(module):
    """The drafter's new weights arrive and are not loaded after the first push."""
    upstream = module.load_layers
    calls = []

    def load(model, placed, *arguments, **settings):
        calls.append(1)
        if len(calls) > 1:
            placed = [at for at in placed if not at.parameter.title.startswith("drafter.")]
            strike()
        upstream(model, placed, *arguments, **settings)

    module.load_layers = load


def keep_first_settings(module):
    """A schedule is a comment: every step samples as the first."""
    upstream = module.StepSampler._sample_step

    async def sample(self, step):
        first = self.config.at(1)
        at, module.Config.at = module.Config.at, lambda config, step: first
        try:
            return await upstream(self, step)
        finally:
            module.Config.at = at

    module.StepSampler._sample_step = sample


def block(module):
    """The controller's event loop is busy with samples and answers nobody."""

    async def collect(*arguments, **settings):
        time.sleep(3600)

    module.RolloutCollector.collect = collect


def wait_for_ever(module):
    """A rollout that never ends, without an error (SkyRL#1173)."""

    async def collect(*arguments, **settings):
        await asyncio.sleep(3600)

    module.RolloutCollector.collect = collect


def link_all_pairs(module):
    """Every slice comes from the least busy of the ranks that hold it: nearly all are linked."""
    upstream = module.plan_sets

    def planned(planner, num_bytes, sets, sent, largest):
        return upstream(planner, num_bytes, sets, sent, 1e-9)

    module.plan_sets = planned


def split_shared_experts(module):
    """The plan splits shared experts over tensor ranks where vLLM keeps them whole."""
    upstream = module.PredictedSharding.__init__

    def init(self, *arguments, **settings):
        upstream(self, *arguments, **settings)
        self.replicates_shared_experts = False

    module.PredictedSharding.__init__ = init


def train_frozen_layers(module):
    """MTP layers are trained, though the recipe freezes them."""
    upstream = module.Trainer.__init__

    def init(self, config, *arguments, **settings):
        model = config.model.model_copy(update={"mtp": "train"})
        upstream(self, config.model_copy(update={"model": model}), *arguments, **settings)

    module.Trainer.__init__ = init


PLANTED = {
    "schedule": ("megatron_r1.controller.rollouts.step_sampler", keep_first_settings),
    "blocked": ("megatron_r1.controller.rollouts.collector", block),
    "lost": ("megatron_r1.controller.rollouts.collector", wait_for_ever),
    "trained": ("megatron_r1.trainer.trainer", train_frozen_layers),
    "mtp": ("megatron_r1.push.rank_push", refuse_mtp),
    "all_pairs": ("megatron_r1.push.link_planner", link_all_pairs),
    "split_shared": ("megatron_r1.push.matching.predicted_sharding", split_shared_experts),
    "single_tokens": ("megatron_r1.engines.plugin.deepseek_patches", confuse_single_tokens),
    "undelivered": ("megatron_r1.engines.plugin.layer_reload", deliver_nothing),
    "lost_request": ("megatron_r1.engines.server.client", lose_a_request),
    "dead_sender": ("megatron_r1.push.sender", kill_a_sending_rank),
    "dead_receiver": ("megatron_r1.engines.plugin.layer_reload", kill_a_loading_engine),
    "nan_gradient": ("megatron_r1.trainer.passes", spread_a_nan),
    "stopped_rank": ("megatron_r1.trainer.passes", stop_a_rank),
    "nan_logprob": ("megatron_r1.trainer.trainer", make_an_old_logprob_nan),
    "left_out_drafter": ("megatron_r1.engines.plugin.patches", leave_out_the_drafter),
    "kept_drafter": ("megatron_r1.engines.plugin.layer_reload", keep_the_drafter),
    "kept_bias": ("megatron_r1.engines.plugin.layer_reload", keep_the_router_bias),
    "rounded_bias": ("megatron_r1.engines.plugin.layer_reload", round_the_router_bias),
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
