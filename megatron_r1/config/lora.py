"""Settings of low-rank adapters (LoRA, arXiv 2106.09685)."""

from pydantic import Field

from megatron_r1.config.section import Section


class LoraConfig(Section):
    """Low-rank adapters, which are trained instead of the model's own weights: docs/lora.md."""

    rank: int = Field(16, ge=1, description="rows of the factor A, columns of the factor B")
    alpha: float = Field(32.0, gt=0, description="W + alpha / rank x B A replaces a weight W")
    targets: list[str] | None = Field(None, min_length=1)
    """linear layers with an adapter, by the ending of their Hugging Face name without an expert's
    number: q_proj, mlp.down_proj, experts.up_proj; default: all but routers and head"""

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / self.rank
