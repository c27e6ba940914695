"""The tool's modules on the path, and small models as Hugging Face folders."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_script
from safetensors.torch import save_file

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "parallel"), str(TESTS.parent / "tools" / "convert")]


def write_folder(folder: Path, hf: dict, dtype: torch.dtype) -> Path:
    """A Hugging Face folder of `hf` with random weights, -0 and infinity among them."""
    from megatron_r1 import weights

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(hf["architectures"][0]))
    tensors = {}
    for name, (shape, own) in weights.hf_tensors(
        {**hf, "dtype": "any", "torch_dtype": None}
    ).items():
        values = torch.randn(shape, generator=generator) * 0.1
        tensors[name] = values.to(dtype if own == "any" else getattr(torch, own))
    layer = f"model.layers.{hf['num_hidden_layers']}"
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        if f"{layer}.{copy}.weight" in tensors:
            tensors[f"{layer}.{copy}.weight"] = tensors[f"{original}.weight"].clone()
    tensors["model.norm.weight"][:2] = torch.tensor([-0.0, torch.inf])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in hf.items() if key != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """Small models written by transformers (tests/parallel/oracle.py)."""
    folder = tmp_path_factory.mktemp("oracle")
    run_script(TESTS / "parallel", ["oracle.py", str(folder)])
    return folder


@pytest.fixture
def convert(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """convert("to-hf", A, B, "--dtype", "fp8") -> (exit status, what it printed)."""
    import importlib.util

    path = TESTS.parent / "tools" / "convert" / "__main__.py"
    spec = importlib.util.spec_from_file_location("convert_main", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    import comparison
    import from_hf
    import to_hf

    def run(*arguments) -> tuple[int, str]:
        # Kept open for the life of a process, which here is many conversions long.
        for opened in (comparison._opened, from_hf._source, to_hf._inputs):
            opened.cache_clear()
        monkeypatch.setattr(sys, "argv", ["tools/convert", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            status = tool.main()
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run
