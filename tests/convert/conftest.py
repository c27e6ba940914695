"""Small models by transformers, and tools/convert as a function."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_once import made_once
from ranks import run_script

from tools.convert import command, from_hf, to_hf, verify

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "parallel"))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory) -> Path:
    """Small models written by transformers (tests/parallel/oracle.py)."""
    return made_once(
        tmp_path_factory,
        "oracle",
        lambda folder: run_script(TESTS / "parallel", ["oracle.py", str(folder)]),
    )


@pytest.fixture
def convert(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """convert("to-hf", A, B, "--dtype", "fp8") -> (exit status, what it printed)."""

    def run(*arguments) -> tuple[int, str]:
        # Kept open for the life of a process, which here is many conversions long.
        for opened in (verify._opened, from_hf._source, to_hf._inputs):
            opened.cache_clear()
        monkeypatch.setattr(sys, "argv", ["tools/convert", *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            status = command.main()
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run
