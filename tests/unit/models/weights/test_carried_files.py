"""Files that an export has from the folder that training started from."""

import json
import shutil
from pathlib import Path

import pytest
from refusals import refused
from transformers import AutoTokenizer

from megatron_r1.base.errors import Cause
from megatron_r1.models.weights.formats.hf_writer import copy_model_files

KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "qwen.tiktoken", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "bpe.vocab"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("additional_chat_templates/tool_use.jinja", "tokenization_own.py", "LICENSE", "NOTICE.txt"),
)
LEFT = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "adapter_config.json"),
    *("hf_quant_config.json", "quantize_config.json", "quantization_config.json", "README.md"),
    *("model.gguf", "optimizer.pt", "figures/benchmark.jinja"),
)


def test_an_export_has_all_files_but_those_that_describe_other_weights(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in (*KEPT, *LEFT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(json.dumps({"name": name}))
    out.mkdir()
    copy_model_files(source, out)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == set(KEPT)
    assert all(json.loads((out / name).read_text()) == {"name": name} for name in KEPT)


def test_a_tokenizer_with_several_templates_is_the_same_in_an_export(tmp_path):
    model = Path(__file__).parents[4] / "examples/laptop/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    tokenizer.add_tokens(["<added>"])
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    tokenizer.save_pretrained(source)
    out.mkdir()
    copy_model_files(source, out)
    shutil.copy(source / "config.json", out)
    exported = AutoTokenizer.from_pretrained(out)
    assert exported.chat_template == tokenizer.chat_template
    assert exported.get_vocab() == tokenizer.get_vocab()
    assert exported.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("name", ["merges.txt", "additional_chat_templates/a.jinja"])
def test_a_link_to_a_file_elsewhere_is_not_copied(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    source = tmp_path / "source"
    (source / name).parent.mkdir(parents=True)
    (source / name).symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with refused("model.path", Cause.CONFLICT, tmp_path / "secret"):
        copy_model_files(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
