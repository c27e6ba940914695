"""Code of a model folder (auto_map) is never run: by transformers, its tokenizers, or vLLM."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.server.model_config import config_arguments
from megatron_r1.engines.server.settings import EngineSettings
from megatron_r1.models.hf_config_file import load_raw_hf_config, read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers

MODEL = Path(__file__).parents[2] / "examples/laptop/model"
CODE = """
from pathlib import Path
Path({trap!r}).write_text("it ran")
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
class Config(Qwen2Config): pass
class Model(Qwen2ForCausalLM): pass
class Tokenizer(Qwen2Tokenizer): pass
"""
SIZES = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64},
}


@pytest.fixture(params=["qwen2", "unheard_of"])
def folder(request, tmp_path):
    """A small Qwen2 whose configuration, model and tokenizer are code that writes a file `trap`."""
    folder = tmp_path / "model"
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    (folder / "code.py").write_text(CODE.format(trap=str(tmp_path / "trap")))
    codes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    codes |= {"AutoTokenizer": ["code.Tokenizer", None]}
    for name, more in (
        ("config.json", {"model_type": request.param}),
        ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **more, "auto_map": codes}))
    return folder


def has_run(folder):
    return (folder.parent / "trap").exists()


def test_the_trap_closes_where_code_is_trusted(folder):
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert has_run(folder)


def test_tokenizers_are_loaded_without_it(folder):
    try:
        load_tokenizer(str(folder), "model.path")
    except UserError as error:  # transformers does not know the model, and asks for its code
        assert error.key == "model.path"
    assert not has_run(folder)
    (folder / "tokenizer.json").unlink()
    with refused("model.path", Cause.UNSUPPORTED, "auto_map"):
        load_tokenizer(str(folder), "model.path")
    assert not has_run(folder)


def test_models_are_loaded_without_it(folder):
    hf_config = read_hf_config(folder)
    assert load_with_transformers(folder, hf_config, torch.float32).num_parameters()
    assert not has_run(folder)


@pytest.mark.more
def test_vllm_reads_the_model_without_it(folder):
    arguments = EngineSettings(dtype="float32", max_model_len=64).arguments(folder)
    arguments += config_arguments(load_raw_hf_config(folder), None)
    program = (
        "import sys\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "options = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "made = AsyncEngineArgs.from_cli_args(options)\n"
        "assert made.trust_remote_code is False\n"
        "made.create_model_config()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not has_run(folder)
    if load_raw_hf_config(folder)["model_type"] == "qwen2":
        assert done.returncode == 0, done.stderr
    else:
        assert "trust" in done.stderr, done.stderr
