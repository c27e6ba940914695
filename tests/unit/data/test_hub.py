"""Data sets of a hub, read by the ordinary client from a stand-in on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.data_hub import serve_hub

SHAPES = Path(__file__).parents[2] / "shapes"
READ = """
import json, sys
from megatron_r1.data.prompts import load_prompts
from megatron_r1.base.errors import UserError

def read(path):
    try:
        prompts = load_prompts(path=path, heldout_fraction=0.0).train
        return [[prompt.question, prompt.location] for prompt in prompts]
    except UserError as error:
        return [error.key, error.cause.value]

print(json.dumps({path: read(path) for path in sys.argv[1:]}))
"""


def read(tmp_path, address, *paths):
    """Return path → its questions with their locations, or key and cause of its error."""
    home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env=os.environ | home,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_name_of_the_hub_is_read_by_configuration_and_split(tmp_path):
    main = tmp_path / "hub/open/words"
    for name, question in {
        "main/train-00000-of-00001": "a?",
        "main/test-00000-of-00001": "b?",
    }.items():
        file = main / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"question": question, "answer": "1"}))
    (main / "data.bin").write_bytes(b"not asked for")
    listed = tmp_path / "hub/open/listed"
    listed.mkdir()
    (listed / "README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files:\n  - split: cot\n"
        "    path: part-*.jsonl\n---\n"
    )
    (listed / "part-1.jsonl").write_bytes((SHAPES / "gsm8k.jsonl").read_bytes())
    with serve_hub(tmp_path / "hub") as (address, requests):
        names = ("words", "words:main:test", "words:test", "words:main:dev", "listed:cot", "none")
        found = read(tmp_path, address, *(f"hub:open/{name}" for name in names))
    train, test = "main/train-00000-of-00001", "main/test-00000-of-00001"
    assert found["hub:open/words"] == [["a?", f"hub:open/words/{train}.jsonl:1"]]
    for name in ("words:main:test", "words:test"):
        assert found[f"hub:open/{name}"] == [["b?", f"hub:open/words/{test}.jsonl:1"]]
    assert found["hub:open/words:main:dev"] == ["data.path", "unknown"]
    assert found["hub:open/none"] == ["data.path", "not_found"]
    assert len(found["hub:open/listed:cot"]) == 4
    assert not [path for path in requests if path.endswith("data.bin")]


@pytest.mark.more  # the client tries again for half a minute
def test_a_hub_out_of_reach_is_an_error_with_a_remedy(tmp_path):
    with serve_hub(tmp_path) as (address, _):
        pass  # nothing listens there any more
    assert read(tmp_path, address, "hub:open/words") == {
        "hub:open/words": ["data.path", "unreadable"]
    }
