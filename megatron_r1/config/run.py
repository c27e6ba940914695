"""Settings of the run itself, its data and checkpoints."""

from typing import Any, Literal

from pydantic import Field
from r1_grading.truths import NO_TRUTH

from megatron_r1.base.files import Readers
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


class DataConfig(Section):
    """The prompts: a file or a task, their template, and the share held out."""

    path: str | None = None
    """questions and truths: a .jsonl, .json, .csv or .parquet file, several as rows/*.jsonl, a
    folder or hub:NAME[:CONFIG][:SPLIT]. See docs/data.md"""
    heldout_path: str | None = None
    """a file held out whole, for evaluation"""
    task: str | None = None
    """a reasoning-gym task, instead of a file"""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """the task's own settings"""
    kind: str | None = None
    """the reward that grades; default: the row's, or what its truth shows, most often math"""
    columns: dict[str, str] | None = None
    """{our name: the file's column}; a.b is the entry b of column a, a+b a mapping of both;
    default: found by usual names"""
    where: dict[str, Any] = Field(default_factory=dict)
    """{column: condition}: only rows that meet all; a value, a list of values, or {min, max, not,
    or}. See docs/data.md"""
    no_truth: list[str] = list(NO_TRUTH)
    """truths that are none, whose rows are left out; []: only null and blank"""
    bad_rows: Literal["refuse", "leave_out"] = "refuse"
    """what becomes of rows whose question or truth cannot be used; leave_out: they are counted"""
    num_train: int | None = Field(None, gt=0)
    """prompts to train on; a task needs it"""
    num_heldout: int | None = Field(None, ge=0)
    """prompts kept out of training"""
    heldout_fraction: float = Field(0.1, ge=0, lt=1)
    """share of all prompts held out"""
    seed: int = 0
    """seed that a task's prompts are made with"""
    template: str = "r1_zero"
    """r1_zero, plain, chat, or a text with {problem}, and {system} for a system's message"""


class CheckpointConfig(Section):
    """When checkpoints are written, how many are kept, and how they are verified."""

    every: int = Field(1, ge=1)
    """steps between checkpoints; a kill loses at most these, and those since the checkpoint that
    was still being written"""
    keep: int = Field(2, ge=1)
    """newest checkpoints kept"""
    keep_every: int | None = Field(None, ge=1)
    """keep also those of steps that this divides; null: none"""
    asynchronous: bool = True
    """train on while one is written, and hold the host memory for its copy"""
    verify: Literal["full", "size", "none"] = "full"
    """what is checked before loading: checksum of every byte, sizes only, or nothing"""
