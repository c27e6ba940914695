"""Real vLLM engines serve the adapters that are pushed to them.

Oracle: transformers with the weights that the product of the factors is merged into, in fp32.
"""

import asyncio
import json
from importlib.util import find_spec
from math import prod

import pytest
from engine_checksums import checksums
from file_trainer import FilePusher
from sampled import (
    TOLERANCE,
    largest_by_version,
    largest_difference,
    sample,
    sample_amid_a_push,
    successions,
)
from tiny_models import DEEPSEEK, GPT_OSS, QWEN, write_model

from megatron_r1.config.model import LoraConfig
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.models.hf_config_names import resolve_aliases
from megatron_r1.models.weights.adapter_table import (
    PEFT_PREFIX,
    adapter_config,
    adapter_shapes,
    adapter_table,
)

ENGINE = {"max_model_len": 256, "max_num_seqs": 64, "num_threads": 1}
LORA = LoraConfig(rank=3, alpha=4.5)
SERVED = ["q_b_proj", "o_proj", "mlp.down_proj", "mlp.gate_proj", "shared_experts.up_proj"]


def write_adapter(folder, base, shapes, settings, seed):
    """Write random factors as PEFT stores them, and in `folder`/merged the model with them."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(seed)
    # A product has about the spread of the weights, as larger ones would have larger roundings.
    factors = {name: 0.15 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    (folder / "merged").mkdir(parents=True)
    stored = {PEFT_PREFIX + name: factor for name, factor in factors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(base / "model.safetensors")
    for name, factor in factors.items():
        module, is_a, _ = name.partition(".lora_A.weight")
        if is_a:
            product = factors[f"{module}.lora_B.weight"] @ factor
            weights[f"{module}.weight"] += settings["lora_alpha"] / settings["r"] * product
    save_file(weights, folder / "merged" / "model.safetensors", {"format": "pt"})
    (folder / "merged" / "config.json").write_text((base / "config.json").read_text())


@pytest.fixture
def adapted(oracle, tmp_path):
    """A function that writes a model and two adapters of it, and returns the engine's settings."""

    def write(config, lora):
        table = adapter_table(resolve_aliases(config), lora)
        settings = adapter_config(table, lora, str(tmp_path / "base"))
        oracle(write_model, tmp_path / "base", config, 0)
        shapes = adapter_shapes(table)
        for seed, name in enumerate("ab"):
            oracle(write_adapter, tmp_path / name, tmp_path / "base", shapes, settings, seed)
        names = sorted({name.split(".")[-3] for name in shapes})
        return {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": names}

    return write


IN_MORE = ("deepseek-tensor", "deepseek-data")
"""Cases that `make test-more` runs."""


@pytest.mark.parametrize(
    ("config", "targets", "layout"),
    [
        pytest.param(QWEN, None, {}, id="qwen"),
        *(
            pytest.param(
                *(config, targets, layout),
                id=name,
                marks=pytest.mark.more if name in IN_MORE else pytest.mark.slow,
            )
            for name, config, targets, layout in [
                (
                    "qwen-some-tensor",
                    QWEN,
                    ["q_proj", "v_proj", "down_proj"],
                    {"tensor_parallel": 2},
                ),
                ("qwen-pipeline", QWEN, None, {"pipeline_parallel": 2}),
                ("gpt-oss", GPT_OSS, None, {}),
                ("deepseek", DEEPSEEK, SERVED, {}),
                (
                    "deepseek-tensor",
                    DEEPSEEK,
                    SERVED,
                    {"tensor_parallel": 2, "expert_parallel": True},
                ),
                # A rank without tokens removes all adapters meanwhile.
                ("deepseek-data", DEEPSEEK, SERVED, {"data_parallel": 2, "expert_parallel": True}),
            ]
        ),
    ],
)
def test_an_engine_computes_with_the_adapter_of_the_last_push(
    config, targets, layout, adapted, oracle, tmp_path
):
    lora = LORA.model_copy(update={"targets": targets})
    settings = {**ENGINE, **layout, "lora": adapted(config, lora)}

    async def run():
        async with EngineFleet(1, tmp_path / "logs", **settings) as fleet:
            await fleet.start(tmp_path / "base")
            pusher = FilePusher(resolve_aliases(config), fleet, layout=layout, lora=lora)
            base = await checksums(fleet)
            for name in "aba":
                metrics = await pusher.push(tmp_path / name)
                shapes = pusher.trainer.shapes.values()
                copies = layout.get("tensor_parallel", 1) * layout.get(
                    "data_parallel", 1
                )  # one over all stages
                assert metrics["push/bytes"] == 4 * sum(map(prod, shapes)) * copies
                if "data_parallel" in layout:
                    await fleet.generate([5, 9], n=1, max_tokens=8)
                groups = await sample(fleet, n=2)
                assert largest_difference(oracle, tmp_path / name / "merged", groups) < TOLERANCE
                assert largest_difference(oracle, tmp_path / "base", groups) > 1000 * TOLERANCE
                if find_spec("peft") and config is QWEN:  # transformers loads it by PEFT
                    assert largest_difference(oracle, tmp_path / name, groups) < TOLERANCE
            used = await checksums(fleet)
            assert {n: used[n] for n in base if "lora" not in n} == {
                n: base[n] for n in base if "lora" not in n
            }

    asyncio.run(run())


@pytest.mark.more
def test_a_swap_amid_responses_and_a_damaged_push(adapted, oracle, tmp_path):
    settings = {**ENGINE, "lora": adapted(QWEN, LORA)}

    async def run():
        async with EngineFleet(1, tmp_path / "logs", **settings) as fleet:
            await fleet.start(tmp_path / "base")
            pusher = FilePusher(QWEN, fleet, lora=LORA)
            before, after = tmp_path / "a", tmp_path / "b"
            groups, made_by = await sample_amid_a_push(fleet, pusher.push, before, after)
            assert successions(groups) == {tuple(made_by)}
            merged = {version: folder / "merged" for version, folder in made_by.items()}
            assert largest_by_version(oracle, merged, groups) < TOLERANCE
            call = {"method": "list_loras"}
            client = fleet.engines[0].client
            answer = json.loads(await client.request("POST", "/collective_rpc", call))
            assert answer == {"results": [[1]]}  # the ids of all adapters, of one rank
            pusher.trainer.load(before)
            await pusher.check_damage("model.layers.1.self_attn.k_proj.lora_B.weight")
            groups = await sample(fleet, n=2)
            assert largest_difference(oracle, after / "merged", groups) < TOLERANCE

    asyncio.run(run())
