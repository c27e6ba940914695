"""The tokenizer of a folder is AutoTokenizer's, also where it is loaded without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_r1.data.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[3] / "examples/laptop/model"
TEXT = "User: 12 + 7 - 3 = 阿德\n<think>so</think><answer>16</answer><eos>"


def write(folder: Path, model_type: str, named: str) -> None:
    """The laptop's tokenizer, as one of a model of that type that names that class."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": named, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("deepseek_v3", "TokenizersBackend"),
        ("deepseek_v3", "LlamaTokenizerFast"),  # DeepSeek's own
        ("llama", "PreTrainedTokenizerFast"),  # Llama 3's own
        ("llama", "LlamaTokenizerFast"),
        ("qwen2", "Qwen2Tokenizer"),  # Qwen2.5's own
        ("qwen2", "LlamaTokenizerFast"),  # DeepSeek's distilled students'
        ("qwen2", "TokenizersBackend"),
    ],
)
def test_it_is_auto_tokenizer_s(tmp_path, model_type, named):
    write(tmp_path, model_type, named)
    ours = load_tokenizer(str(tmp_path), "model.path")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    for special in (True, False):
        assert ours.encode(TEXT, add_special_tokens=special) == theirs.encode(
            TEXT, add_special_tokens=special
        )
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_chat_template() == theirs.get_chat_template()
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_it_comes_without_torch(tmp_path):
    folders = [tmp_path / name for name in ("deepseek_v3", "llama", "qwen2")]
    for folder in folders:
        folder.mkdir()
        write(folder, folder.name, "TokenizersBackend")
    program = (
        "import sys; from megatron_r1.data.tokenizer import load_tokenizer\n"
        f"for folder in {list(map(str, folders))}: load_tokenizer(folder, 'model.path')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
