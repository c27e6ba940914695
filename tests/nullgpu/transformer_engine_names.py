"""Builds the small models of Transformer Engine's layers, as every rank of each grid, and compares
names and shapes with the weight tables: `transformer_engine_names.py GRID…`.

Process groups are torch's fake ones, so one process takes every rank's place in turn. On the grid
"one" the keys of `sharded_state_dict` are compared with the table of stored names, too. Prints a
line of JSON: models compared, and the differences."""

import json
import math
import sys
from functools import partial

import torch.distributed as dist
from grids import allows, parallel_settings, sizes
from small_models import MODELS
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.hf_config import score_model_config
from megatron_r1.models.hf_config_names import resolve_aliases


def with_score_models() -> dict[str, dict]:
    models = {name: resolve_aliases(hf_config) for name, hf_config in MODELS.items()}
    names = ("deepseek-yarn-mtp", "qwen-untied", "llama3")
    return models | {f"{name}-score": score_model_config(models[name]) for name in names}


def fake_groups() -> None:
    """Have torch make fake process groups, whatever backend is asked for."""
    new_group = dist.new_group

    def fake(*args, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pg_options", "device_id")}
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.new_group = dist.distributed_c10d.new_group = fake


def take_place(rank: int, world: int, settings: Config) -> None:
    """Make this process rank `rank` of `world`, with Megatron's groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_r1.models.gradients import embedding_ranks

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    at = settings.parallel
    virtual = at.virtual_pipeline if at.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=at.tensor,
        pipeline_model_parallel_size=at.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=at.context,
        expert_model_parallel_size=at.expert,
        expert_tensor_parallel_size=at.expert_tensor,
        get_embedding_ranks=partial(embedding_ranks, at.pipeline_layout),
    )
    model_parallel_cuda_manual_seed(1)


def differences(built: dict[str, tuple], table: dict[str, tuple]) -> list[str]:
    """Return what two mappings of name to shape do not have in common."""
    wrong = [f"{name}: only one has it" for name in sorted(built.keys() ^ table.keys())]
    both = sorted(built.keys() & table.keys())
    unequal = [n for n in both if tuple(built[n]) != tuple(table[n])]
    return wrong + [f"{n}: built {tuple(built[n])}, table {tuple(table[n])}" for n in unequal]


def stored_shapes(tree) -> dict[str, tuple]:
    """Return key -> global shape of every ShardedTensor in a sharded state dict."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(tree, ShardedTensor):
        return {tree.key: tree.global_shape}
    if isinstance(tree, ShardedTensorFactory):
        return stored_shapes(tree.build())
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return {key: shape for part in parts for key, shape in stored_shapes(part).items()}


def compare(hf_config: dict, settings: Config, stored: bool) -> list[str]:
    """Return how this rank's chunks of a model differ from the tables."""
    from megatron_r1 import models
    from megatron_r1.models.weights.formats.megatron_weights import stored_layout
    from megatron_r1.models.weights.layout import parameter_layout
    from megatron_r1.models.weights.loading import chunk_shard, model_tensors

    config = models.transformer_config(hf_config, settings)
    virtual = config.virtual_pipeline_model_parallel_size
    wrong = []
    for stage in range(virtual) if virtual else [None]:
        chunk = models.build_model(hf_config, config, vp_stage=stage)
        assert config.transformer_impl == "transformer_engine"
        built = {name: tensor.shape for name, tensor in model_tensors(chunk).items()}
        table = {
            name: entry.shape
            for name, entry in parameter_layout(hf_config, chunk_shard(chunk)).items()
        }
        wrong += differences(built, table)
        if stored:
            expected = stored_layout(
                hf_config, transformer_engine=True, with_mtp=bool(config.mtp_num_layers)
            )
            wrong += differences(stored_shapes(chunk.sharded_state_dict()), expected.shapes)
    return wrong


def main() -> None:
    platform.prepare_process(0)
    from megatron_r1.models import patches

    patches.install()
    fake_groups()
    compared, wrong = 0, []
    for grid in sys.argv[1:]:
        for name, hf_config in with_score_models().items():
            at = sizes(grid, with_mtp=bool(hf_config.get("num_nextn_predict_layers")))
            if not allows(hf_config, at) or (at["layout"] and name.endswith("score")):
                continue
            world = math.prod(at[axis] for axis in ("tp", "pp", "cp", "dp")) * (
                1 if at["tp"] > 1 else at["ep"] * at["etp"]
            )
            parallel = parallel_settings(grid, bool(hf_config.get("num_nextn_predict_layers")))
            settings = Config.model_validate(
                {"model": {"path": "-", "dtype": "bfloat16"}, "parallel": parallel}
            )
            for rank in range(world):
                take_place(rank, world, settings)
                compared += 1
                found = compare(hf_config, settings, stored=grid == "one")
                wrong += [f"{grid} rank {rank} {name}: {line}" for line in found]
    print(json.dumps({"compared": compared, "wrong": wrong}))


if __name__ == "__main__":
    main()
