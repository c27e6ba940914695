import json
import shutil
from pathlib import Path

import pytest
from ranks import run_script

NEEDED_BYTES = 31 * 10**9
LIMIT_MIB = 2048


@pytest.mark.slow
def test_ten_gigabytes_convert_in_less_than_two(tmp_path):
    if shutil.disk_usage(tmp_path).free < NEEDED_BYTES:
        pytest.skip(f"{tmp_path} has less than {NEEDED_BYTES / 1e9:.0f} GB free")
    result = tmp_path / "result.json"
    arguments = ["measure_memory.py", str(tmp_path / "big"), str(result)]
    run_script(Path(__file__).parent, arguments)
    measured = json.loads(result.read_text())
    assert min(measured["fp8_bytes"], measured["bf16_bytes"]) >= 8 * 10**9
    assert all(measured["identical"].values()), measured["identical"]
    for step in measured["steps"]:
        assert 100 < step["peak_mib"] < LIMIT_MIB, step
