"""Settings of the rehearsal itself; the settings of the run are in the recipe."""

from pydantic import Field

from megatron_r1.config.section import Section


class RehearsalConfig(Section):
    """Folder and size of a rehearsal."""

    folder: str = ""
    """where everything of the rehearsal is written; default: run.folder with -rehearsal"""
    max_ranks: int = Field(16, ge=1)
    """most trainer ranks; with fewer than the layout needs, the model's replicas are left out
    first. A rank takes about 0.4 GiB, an engine's rank about 0.5"""
    stages: list[str] = []
    """of a pipeline, those to rehearse; default: all that train or sample"""
    timeout_seconds: float = Field(1800.0, gt=0, description="limit for one phase")


class RehearsalSettings(Section):
    """The section that `rehearse` adds to the sections of a recipe."""

    rehearsal: RehearsalConfig = RehearsalConfig()
