"""Settings of the run itself, its model, data and checkpoints."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.config.lora import LoraConfig
from megatron_r1.config.section import Resumable, Section
from megatron_r1.errors import UserError

Fusion = Literal["gradient_accumulation", "activation", "permute"]


class RunConfig(Section):
    """Folder, seed and length of a run, and what it does when it hangs or loses a rank."""

    folder: Resumable[str] = ""
    """where all files of the run are written; required"""
    seed: int = Field(0, description="seed of prompt sampling, generation and initialization")
    steps: Resumable[int] = Field(650, gt=0)
    """rollouts (rl; 650 x 16 = the paper's 10,400 optimizer steps), batches (sft)"""
    trackers: Resumable[list[Literal["tensorboard", "wandb", "mlflow"]]] = ["tensorboard"]
    """where the run's figures are shown beside its own files; wandb and mlflow by their own
    libraries and environment variables. See docs/first_day.md"""
    project: Resumable[str] = "megatron-r1"
    """name of the project in W&B, of the experiment in MLflow"""
    log_samples: Resumable[int] = Field(8, ge=0, description="training samples written per step")
    hang_seconds: Resumable[float] = Field(1800.0, ge=0)
    """time without any progress after which a report says what everything waits for; 0: never. See
    docs/supervision.md"""
    on_hang: Resumable[Literal["stop", "restart", "report"]] = "stop"
    """what follows that report; restart: kill what hangs and go on, where that is possible"""
    max_trainer_restarts: Resumable[int] = Field(3, ge=0)
    """how often a command starts lost trainer ranks again"""
    health_port: Resumable[int | None] = Field(0, ge=0, le=65_535)
    """port of GET /health and /metrics (Prometheus); 0: any free one; null: none"""


class ModelConfig(Section):
    """The weights to start from, their head and dtype, and where a run differs from config.json."""

    path: str = Field("", description="Hugging Face folder: config, tokenizer, weights; required")
    checkpoint: str | None = None
    """Megatron checkpoint (of tools/convert or a run) whose weights are taken, not path's"""
    head: Literal["language", "score"] = "language"
    """score: one number per token instead of logits; reward-model sets it"""
    init: Literal["load", "random"] = "load"
    """random: train from nothing; the folder needs no weights"""
    init_std: float = Field(0.02, gt=0, description="standard deviation of random weights")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of trained parameters"""
    attention_backend: Resumable[Literal["auto", "flash", "fused", "unfused"]] = "auto"
    """of Transformer Engine on GPUs: flash-attn, cuDNN, plain products, or whichever fits"""
    fusions: Resumable[list[Fusion] | None] = None
    """operations in one CUDA kernel: a weight's gradient with its sum, SwiGLU, sorting of tokens by
    expert; default: on a GPU gradient_accumulation and permute"""
    mtp: Literal["frozen", "train", "none"] = "frozen"
    """multi-token-prediction layers: carried unchanged; trained, in sft with the model, in rl
    beside it, by losses that change nothing else; or left out"""
    expert_bias_update_rate: float = Field(0.0, ge=0)
    """step of the router's aux-loss-free bias, per optimizer step; 0: frozen"""
    lora: LoraConfig | None = None
    """train low-rank adapters, and leave the model's weights as they are; see docs/lora.md"""

    @model_validator(mode="after")
    def _adapters_alone_are_trained(self) -> Self:
        others = {
            "init: random": self.init == "random",
            "head: score": self.head == "score",
            "mtp: train": self.mtp == "train",
            "expert_bias_update_rate": self.expert_bias_update_rate > 0,
        }
        if self.lora is not None and any(others.values()):
            other = next(name for name, is_set in others.items() if is_set)
            raise ValueError(
                f"model.lora: adapters of a loaded language model are all that is trained with it; "
                f"leave out model.lora or model.{other}"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_loaded_or_random(self) -> Self:
        if self.checkpoint and self.init == "random":
            raise ValueError(
                f"model.checkpoint: {self.checkpoint} would not be read with model.init: random; "
                "set model.init to load, or leave model.checkpoint out"
            )
        return self

    def require_language_head(self) -> None:
        """Raise UserError for a model with a score head."""
        if self.head != "language":
            raise UserError(
                f"model.head: {self.head} is for the verb reward-model; leave it out here"
            )


class DataConfig(Section):
    """The questions: a file or a task, their template, and the share held out."""

    path: str | None = None
    """questions and truths: a .jsonl, .json, .csv or .parquet file, hub:NAME[:CONFIG][:SPLIT] or a
    folder, read by the library datasets"""
    heldout_path: str | None = Field(None, description="a file held out whole, for evaluation")
    task: str | None = Field(None, description="a reasoning-gym task, instead of a file")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the task's own settings")
    kind: str | None = Field(None, description="the reward that grades; default: the row's or math")
    columns: dict[str, str] | None = None
    """{our name: the file's column}; a.b is the entry b of column a"""
    num_train: int | None = Field(None, gt=0, description="questions to train on; a task needs it")
    num_heldout: int | None = Field(None, ge=0, description="questions kept out of training")
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of all questions held out")
    seed: int = Field(0, description="seed that a task's questions are made with")
    template: str = Field("r1_zero", description="r1_zero, plain, chat, or a text with {problem}")


class CheckpointConfig(Section):
    """When checkpoints are written, how many are kept, and how they are verified."""

    every: int = Field(1, ge=1)
    """steps between checkpoints; a kill loses at most these, and those since the checkpoint that
    was still being written"""
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = True
    """train on while one is written, and hold the host memory for its copy"""
    verify: Literal["full", "size", "none"] = "full"
    """what is checked before loading: checksum of every byte, sizes only, or nothing"""
