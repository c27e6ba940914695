"""Small models by transformers, and megatron-r1 convert as a function."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_once import made_once
from ranks import run_script
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.convert import from_hf, to_hf, verb, verify

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


class Convert:
    """convert("to-hf", A, B, "--dtype", "fp8") -> (exit status, what it printed)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["tools/convert", *map(str, arguments)])
        with _alone():
            status = verb.main()
        captured = self._capsys.readouterr()
        return status, captured.out + captured.err

    def refuses(self, key: str, cause: Cause, *arguments, shows: tuple = ()) -> None:
        """Assert that the command is refused for that key and cause."""
        with _alone(), refused(key, cause, *shows):
            verb.run([*map(str, arguments)])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    # Kept open for the life of a process, which here is many conversions long.
    for opened in (verify._open_both, from_hf._open_source, to_hf._open_inputs):
        opened.cache_clear()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def convert(monkeypatch, capsys) -> Convert:
    return Convert(monkeypatch, capsys)
