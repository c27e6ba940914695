"""Section `eval`: benchmarks, samples per prompt, and a served model to evaluate."""

from typing import Any, Literal

from pydantic import Field, model_validator
from r1_grading.remote import ServiceSettings

from megatron_r1.config.section import Section


class BenchmarkConfig(Section):
    """One entry of `eval.benchmarks`; a plain name stands for {name: …}."""

    name: str
    """aime_2024, gym/logic, …; questions: those of `path`, or that section data holds out; or
    package.module:NAME of your own"""
    label: str = ""
    """what results call it; default: the name"""
    path: str | None = None
    """file, folder or hub name of the data; default: its own name on the hub"""
    files: list[str] = []
    """patterns of the files to take from a folder or the hub"""
    samples: int | None = Field(None, ge=1)
    """responses per prompt; default: eval.samples"""
    limit: int | None = Field(None, ge=1)
    """prompts used, the first ones; default: eval.limit"""
    instruction: str | None = None
    """the prompt around {question}; default: the benchmark's"""
    options: dict[str, Any] = Field(default_factory=dict)
    """options of the benchmark itself"""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def title(self) -> str:
        """The name in results: `label`, or the benchmark's name."""
        return self.label or self.name


class ServerConfig(ServiceSettings):
    """A served model that answers instead of `model.path`."""

    api: Literal["chat", "completions"] = "chat"
    """chat: the question as a user's message, in the server's template; completions: the text that
    data.template makes"""
    wait_seconds: float = Field(10.0, ge=0)
    """how long the start waits for the server to be reachable"""
    timeout_seconds: float = Field(3600.0, gt=0)
    """limit for one response"""
    concurrency: int = Field(64, ge=1)
    """responses requested at once"""


class EvalConfig(Section):
    """The held-out evaluations of a training run, and those of the verb `eval`."""

    every: int = Field(0, ge=0)
    """steps between evaluations on the held-out prompts; 0: first and last only"""
    samples: int = Field(16, ge=1)
    """responses per prompt: pass@1 is their mean, cons@N their majority"""
    temperature: float = Field(0.6, gt=0)
    """of sampling (the paper: 0.6)"""
    top_p: float = Field(0.95, gt=0, le=1)
    """sample from this share of the probability (the paper: 0.95)"""
    benchmarks: list[BenchmarkConfig] = []
    """names, or {name, path, samples, limit, options, …}"""
    limit: int | None = Field(None, ge=1)
    """prompts per benchmark, the first ones"""
    server: ServerConfig | None = None
    """{url, model, api_key_env, api, …}: a served model, evaluated instead of model.path"""
