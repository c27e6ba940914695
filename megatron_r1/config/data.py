"""Section `data`: the prompts, their template, and the share held out."""

from typing import Any, Literal

from pydantic import Field
from r1_grading.truths import NO_TRUTH

from megatron_r1.config.section import Section


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
    """the reward that grades; default: the row's, else (not in `score`) what its truth shows, most
    often math"""
    columns: dict[str, str] | None = None
    """{our name: the file's column}; a.b is the entry b of column a, a+b a mapping of both;
    default: found by usual names"""
    where: dict[str, Any] = Field(default_factory=dict)
    """{column: condition}: only rows that meet all; a value, a list of values, or {min, max, not,
    or}. See docs/data.md"""
    no_truth: list[str] = list(NO_TRUTH)
    """texts that stand for no truth, whose rows are left out; []: only null and blank"""
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
    """r1_zero, plain, chat, or a text with {question}, and {system} for a system's message"""
