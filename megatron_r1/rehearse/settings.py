"""Settings of the rehearsal and of the preflight themselves; the settings of the run are in the
recipe."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_r1.config.section import Section
from megatron_r1.plan.hardware import HARDWARE

RehearsalDevice = Literal["cpu", "gpu", "null-gpu"]


class RehearsalConfig(Section):
    """Folder and size of a rehearsal."""

    folder: str = ""
    """where everything of the rehearsal is written; default: run.folder with -rehearsal"""
    max_ranks: int = Field(16, ge=1)
    """most trainer ranks; with fewer than the layout needs, the model's replicas are left out
    first. A rank takes about 0.4 GiB, an engine's rank about 0.5"""
    on: RehearsalDevice = "cpu"
    """also written --on: gpu, GPUs of this machine, one for a trainer rank; null-gpu, GPUs that are
    imitated, with the CUDA builds of all packages (docs/rehearse.md). Both keep the recipe's own
    transport, share of the GPU and Transformer Engine, and leave axes out for `max_ranks`"""
    stages: list[str] = []
    """of a pipeline, those to rehearse; default: all that train or sample"""
    timeout_seconds: float = Field(1800.0, gt=0, description="limit for one phase")


class RehearsalRecipe(Section):
    """The section that `rehearse` adds to the sections of a recipe."""

    rehearsal: RehearsalConfig = RehearsalConfig()


class PreflightConfig(Section):
    """Limits of a preflight, and the files that it writes."""

    slowest: float = Field(0.8, gt=0, le=1)
    """share of the median below which a rank's products, or the links of a group or node, block"""
    bandwidth: float = Field(0.5, gt=0)
    """share of the planner's rate below which the links of a parallel axis block; on GPUs only"""
    hardware: str = ""
    """name of the planner's hardware; default: by the GPU's name, H800 without a GPU"""
    timeout_seconds: float = Field(30.0, gt=0)
    """limit for one check on one rank; the start of Python and NCCL's groups is given four times as
    long"""
    output: str = ""
    """JSON file of all results; also --json FILE"""
    calibration: str = ""
    """file of the measured rates, for `megatron-r1 plan --calibrate`"""

    @field_validator("hardware")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name and name not in HARDWARE:
            raise ValueError(f"preflight.hardware: {name} is not one of {', '.join(HARDWARE)}")
        return name


class PreflightRecipe(Section):
    """The section that `preflight` adds to the sections of a recipe."""

    preflight: PreflightConfig = PreflightConfig()
