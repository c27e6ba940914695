"""What is shown of a phase that failed."""

from types import SimpleNamespace

import pytest

from megatron_r1.base.errors import RunError
from megatron_r1.rehearse.started_phase import StartedPhase

ENGINE = """\
megatron-r1: engine-0: the engine did not start: exit code 1; from engine-0.log:
  ValueError: Free memory on device cuda:0 is less than desired
    raise RuntimeError(
"""


@pytest.mark.parametrize("rank", ["", "[default0]:"])
def test_an_error_is_shown_with_its_cause_and_without_what_is_around_it(tmp_path, rank):
    log = tmp_path / "log.txt"
    lines = ["starting", *ENGINE.splitlines(), "Traceback of torchrun", "  ValueError: its own"]
    log.write_text("".join(f"{rank}{line}\n" for line in lines))
    process = SimpleNamespace(poll=lambda: 1, returncode=1)
    phase = StartedPhase("start", process, log, tmp_path / "none", timeout_seconds=1, started_at=0)
    with pytest.raises(RunError) as failed:
        phase.wait_for_end()
    assert str(failed.value).partition("\n")[2] + "\n" == ENGINE
