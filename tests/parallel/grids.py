"""Names of parallel grids: tp2, dp2, cp2 … joined by x, a layout of pipeline stages by its word;
"one" is one process.

tp2xsequence is two tensor ranks with sequence parallelism, of models that do without by default.
pp2xvp2 is two pipeline ranks with two chunks each; pp4xapart is four with LAYOUTS["apart"].
"""

import re

from random_models import models_in
from small_models import FIRST, MODELS

LAYOUTS = {
    # The last decoder layer, and so the final norm, before the head's stage; stages of 1, 2, 1, 0.
    "uneven": "Et|tt|t|mL",
    # MTP layers on a stage of their own, whose output the head's stage turns into a loss.
    "apart": "Ettt|t|m|L",
}

TIED = ("tp2xpp2", "tp2xcp2", "pp2xvp2xtp2")
"""Grids of four ranks where a model with one parameter for embedding and head is compared too."""

AXES = ("tp", "pp", "vp", "ep", "etp", "cp", "dp")


def sizes(grid: str, with_mtp: bool = True) -> dict:
    """Ranks along every axis of AXES, "layout": stages spelled out, or None, and "sequence"."""
    found = dict.fromkeys(AXES, 1) | {"layout": None, "sequence": None}
    for part in grid.split("x") if grid != "one" else []:
        axis, number = re.fullmatch(r"([a-z]+)(\d*)", part).groups()
        if axis in LAYOUTS:
            found["layout"] = LAYOUTS[axis] if with_mtp else LAYOUTS[axis].replace("m", "")
        elif axis == "sequence":
            found["sequence"] = True
        elif axis in AXES:
            found[axis] = int(number)
        else:
            raise ValueError(f"grid {grid}: {part} is neither an axis nor a layout")
    return found


def parallel_settings(grid: str, with_mtp: bool = True) -> dict:
    """The grid as a recipe's `parallel` section."""
    at = sizes(grid, with_mtp)
    return {
        "tensor": at["tp"],
        "pipeline": at["pp"],
        "virtual_pipeline": at["vp"],
        "pipeline_layout": at["layout"],
        "expert": at["ep"],
        "expert_tensor": at["etp"],
        "context": at["cp"],
        "sequence": at["sequence"],
    }


def positions(grids, parallel):
    """Yield every grid with the position of this rank in it, and say when its checks have held.

    parallel: returns the `ParallelConfig` of a grid."""
    from megatron_r1.trainer import distributed

    for grid in grids:
        grid_position = distributed.initialize(parallel(grid), seed=0)
        from megatron.core import parallel_state

        yield grid, grid_position
        if grid_position.rank == 0:
            print(f"{grid} holds", flush=True)
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


def models_on(grid: str, world_size: int, chosen: str = "first") -> dict[str, dict]:
    """The models of a set (`random_models.models_in`) that are compared on `grid`.

    They are all that it allows on one or two ranks, on four one with experts and MTP layers, for
    the time it takes; on tp4 one with fewer key and value heads than ranks."""
    if grid == "tp4":
        return {name: MODELS[name] for name in ["qwen-two-kv-heads"]}
    if world_size > 2:
        names = ["deepseek-yarn-mtp"] + ["qwen-tied"] * (grid in TIED)
        return {name: FIRST[name] for name in names}
    at = sizes(grid)
    models = models_in(chosen)
    return {name: hf_config for name, hf_config in models.items() if allows(hf_config, at)}


def allows(hf_config: dict, at: dict) -> bool:
    """Whether a model can be split over the axes of `sizes`.

    One without experts has no ranks of them, one with experts always splits sequences, and gpt-oss
    has neither context parallelism nor several ranks for an expert."""
    experts = {"n_routed_experts", "num_experts", "num_local_experts"} & hf_config.keys()
    if "sliding_window" in hf_config and at["cp"] * at["etp"] > 1:
        return False
    if experts:
        return not at["sequence"]
    return at["ep"] == at["etp"] == 1
