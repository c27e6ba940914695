"""The functions of vLLM that the plugin's docstrings cite are those its patches were written for.

`vllm_sources.json` has a hash of each one's source.

After a new vLLM: read the functions that differ, correct or remove the patch, and write the hash
that the failing test shows."""

import json
import re
from pathlib import Path

import pytest
import upstream

PLUGIN = Path(__file__).parents[4] / "megatron_r1/engines/plugin"
SOURCES = json.loads(Path(__file__).with_name("vllm_sources.json").read_text())
SYMBOL = r"`[\w.]+`"


def cited() -> set[str]:
    """Every "file.py: `A.b` and `C.d`" in the plugin as "file.py: A.b" and "file.py: C.d"."""
    found = set()
    for file in PLUGIN.glob("*.py"):
        places = rf"([\w/]+/\w+\.py):\s+({SYMBOL}(?:(?:,|\s+and)\s+{SYMBOL})*)"
        for path, symbols in re.findall(places, file.read_text()):
            found |= {f"{path}: {symbol}" for symbol in re.findall(r"`([\w.]+)`", symbols)}
    return found


def test_every_cited_function_has_a_hash():
    assert cited() == SOURCES.keys()


@pytest.mark.parametrize("place", SOURCES)
def test_the_cited_function_is_the_one_that_was_read(place):
    assert upstream.fingerprint("vllm", *place.split(": ")) == SOURCES[place]
