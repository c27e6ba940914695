"""Weights & Biases as a tracker: online, or offline (`WANDB_MODE=offline`) for a later
`wandb sync`."""

import secrets
from collections.abc import Mapping
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.reporting.trackers.tracker import EVALUATION, STEP_METRIC, TrackedRun

WANDB = "wandb"
WANDB_START_SECONDS = 30
WANDB_FINISH_SECONDS = 30


def check_wandb() -> None:
    """Raise UserError where W&B would need a key and has none. Touches no network."""
    import wandb

    if wandb.setup().settings.mode in (None, "online", "shared") and not wandb.login(
        prompt=False, verify=False
    ):
        raise UserError(
            "run.trackers: wandb has no API key: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline, which writes to the run's folder for `wandb sync`",
            key="WANDB_API_KEY",
            cause=Cause.MISSING,
        )


class WandbTracker:
    """Sends each line with its own step: a resumed run adds to the one that it was.

    Offline, W&B begins a new folder at each start, which then gets all lines again: the newest has
    the whole run."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the tracked run, offline where the server cannot be reached.

        Raises:
            Exception: what wandb raises.
        """
        import wandb
        from wandb.errors import CommError

        identity = run.load_id(WANDB)
        if identity is None:
            identity = secrets.token_hex(4)
            run.save_id(WANDB, identity)
        options: dict[str, Any] = {
            "project": run.project,
            "name": run.folder.name,
            "id": identity,
            "resume": "allow",
            "dir": str(run.folder),
            "config": dict(run.settings),
        }
        # The live view redraws the terminal, and W&B would record every frame.
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "init_timeout": WANDB_START_SECONDS,
        }
        settings["finish_timeout"] = WANDB_FINISH_SECONDS
        self.notes: list[str] = []
        try:
            self._run = wandb.init(**options, settings=wandb.Settings(**settings))
        except (CommError, TimeoutError) as error:
            wandb.teardown()  # else its service counts the id as in use
            offline = wandb.Settings(**settings, mode="offline")
            self._run = wandb.init(**options, settings=offline)
            reason = str(error).splitlines()[0]
            self.notes.append(
                f"wandb: the server cannot be reached ({reason}); recorded offline: wandb sync "
                f"{run.folder}/wandb/latest-run"
            )
        self._run.define_metric("*", step_metric=STEP_METRIC)
        self._run.define_metric("eval/*", step_metric=EVALUATION)
        summary: dict[str, Any] = dict(self._run.summary)
        self.tracked_steps = {
            key: float(summary[key]) for key in (STEP_METRIC, EVALUATION) if key in summary
        }

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log a step's numbers."""
        self._run.log(dict(numbers))

    def finish(self, is_finished: bool) -> None:
        """End the run, with exit code 0 only if it finished."""
        self._run.finish(exit_code=0 if is_finished else 1)
