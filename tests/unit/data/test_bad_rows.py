"""Rows that cannot be used are refused by file, line and field."""

import json
from pathlib import Path

import pytest
import yaml
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.data.preferences import read_preferences
from megatron_r1.data.prompts import load_prompts

CASES = yaml.safe_load(Path(__file__).with_name("bad_rows.yaml").read_text(encoding="utf-8"))
GOOD = {
    **{"question": "1 + 2?", "truth": 3},
    **{"chosen": "a", "rejected": "b", "response": "c", "label": 1},
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in CASES for case in CASES[kind]])
def test_a_bad_row_is_named_by_its_line(tmp_path, kind, case):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{case.get('text') or json.dumps(case['row'])}")
    with refused(case["key"], Cause(case["cause"]), f"{path}:2", *case.get("shows", ())):
        if kind == "questions":
            load_prompts(path=path)
        else:
            list(read_preferences(path, kind))
