"""Asks Transformer Engine which attention each shipped recipe gets: `attention_of_recipes.py`.

Prints a line of JSON for each recipe that trains a model whose config.json is shipped, and for
gpt-oss with the settings of another recipe."""

import json
import tempfile
import time
from pathlib import Path

import yaml

from megatron_r1 import models
from megatron_r1.base.errors import UserError
from megatron_r1.config import Config, infer_verb, load_recipe
from megatron_r1.models import platform
from megatron_r1.models.attention_choice import (
    attention_parameters,
    check_attention,
    choose_attention,
    longest_sample,
)
from tests.harness.released_configs import RELEASED

ROOT = Path(__file__).parents[2]


def training_recipes() -> dict[str, Config]:
    recipes = {}
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        try:
            config = load_recipe(path)
        except UserError:
            continue  # stages, or what another tool reads
        if "optimizer" in yaml.safe_load(path.read_text()):
            head = "score" if infer_verb(config) == "reward-model" else "language"
            name = str(path.relative_to(ROOT / "examples"))
            # FP8 leaves attention out (fp8_dot_product_attention), and asks for variables.
            recipes[name] = config.with_changes(model={"head": head}, fp8={"recipe": "none"})
    return recipes


def ask(name: str, config: Config, hf_config) -> dict[str, object]:
    began = time.perf_counter()
    model, longest = models.transformer_config(hf_config, config), longest_sample(config, hf_config)
    asked = attention_parameters(config, model, longest)
    try:
        answer = str(check_attention(config, model, longest))
    except UserError as error:
        answer = str(error)
    parallel = config.parallel
    return {
        "recipe": name,
        "layout": f"TP {parallel.tensor} CP {parallel.context}",
        "longest": longest,
        "choices": [str(choose_attention(parameters)) for parameters in asked],
        "answer": answer,
        "seconds": round(time.perf_counter() - began, 2),
    }


def main() -> None:
    platform.prepare_process()
    recipes = training_recipes()
    for name, config in recipes.items():
        if (ROOT / config.model.path / "config.json").exists():
            hf_config = models.read_hf_config(str(ROOT / config.model.path), config.model.head)
            print(json.dumps(ask(name, config, hf_config)), flush=True)
        else:
            print(json.dumps({"recipe": name, "dtype": config.model.dtype}), flush=True)
    settings = recipes["one_node/qwen2.5-7b.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(RELEASED["gpt-oss-20b"][0]))
        hf_config = models.read_hf_config(folder, "language")
    for backend in ("auto", "fused", "unfused"):
        config = settings.with_changes(model={"attention_backend": backend})
        print(json.dumps(ask(f"gpt-oss {backend}", config, hf_config)), flush=True)


if __name__ == "__main__":
    main()
