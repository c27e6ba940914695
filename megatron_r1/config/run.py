"""Section `run`: folder, seed and length of a run, and what it does in trouble."""

from typing import Literal

from pydantic import Field

from megatron_r1.base.files.access import Readers
from megatron_r1.config.section import Resumable, Section


class RunConfig(Section):
    """Folder, seed and length of a run, and what it does when it hangs or loses a rank."""

    folder: Resumable[str] = ""
    """where all files of the run are written; required"""
    readable_by: Resumable[Readers] = "owner"
    """who else than its owner may read the folder's files, from that command on: samples, weights,
    logs. group: of the files; everyone"""
    seed: int = 0
    """seed of the order of prompts, of initialization and of the engines' sampling; that depends on
    the order of requests, too: two RL runs of one seed sample different responses"""
    steps: Resumable[int] = Field(650, gt=0)
    """rollouts (rl; 650 x 16 = the paper's 10,400 optimizer steps), batches (sft)"""
    trackers: Resumable[list[Literal["tensorboard", "wandb", "mlflow"]]] = ["tensorboard"]
    """where the run's figures are shown besides its own files; wandb and mlflow by their own
    libraries and environment variables. See docs/trackers.md"""
    project: Resumable[str] = "megatron-r1"
    """name of the project in W&B, of the experiment in MLflow"""
    log_samples: Resumable[int] = Field(8, ge=0)
    """training samples written per step"""
    hang_seconds: Resumable[float] = Field(1800.0, ge=0)
    """time without any progress after which a report says what everything waits for; 0: never. See
    docs/supervision.md"""
    on_hang: Resumable[Literal["stop", "restart", "report"]] = "stop"
    """what follows that report; restart: kill what hangs and go on, where that is possible"""
    max_trainer_restarts: Resumable[int] = Field(3, ge=0)
    """how often a command starts lost trainer ranks again"""
    health_port: Resumable[int | None] = Field(0, ge=0, le=65_535)
    """port of GET /health and /metrics (Prometheus); 0: any free one; null: none"""
