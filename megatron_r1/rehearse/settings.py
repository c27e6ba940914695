"""Settings of the rehearsal itself; the settings of the run are in the recipe."""

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section

Place = Literal["cpu", "gpu", "null-gpu"]


class RehearsalConfig(Section):
    """Folder and size of a rehearsal."""

    folder: str = ""
    """where everything of the rehearsal is written; default: run.folder with -rehearsal"""
    max_ranks: int = Field(16, ge=1)
    """most trainer ranks; with fewer than the layout needs, the model's replicas are left out
    first. A rank takes about 0.4 GiB, an engine's rank about 0.5"""
    on: Place = "cpu"
    """also written --on: gpu, GPUs of this machine, one for a trainer rank; null-gpu, GPUs that are
    imitated, with the CUDA builds of all packages (docs/rehearse.md). Both keep the recipe's own
    transport, share of the GPU and Transformer Engine, and leave axes out for `max_ranks`"""
    stages: list[str] = []
    """of a pipeline, those to rehearse; default: all that train or sample"""
    timeout_seconds: float = Field(1800.0, gt=0, description="limit for one phase")


class RehearsalSettings(Section):
    """The section that `rehearse` adds to the sections of a recipe."""

    rehearsal: RehearsalConfig = RehearsalConfig()
