"""Supervised examples: a prompt text and the response to learn."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.data.records import read_records, require_text
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.errors import Cause, UserError

COLUMNS = "in sft.data, beside path, columns"


@dataclass(frozen=True)
class SftExample:
    """One example of supervised training. prompt: the text the model is given, template included,
    without loss. response: with loss."""

    prompt: str
    response: str


def load_examples(path: str | Path, columns: Mapping[str, str] | None = None) -> list[SftExample]:
    """Return the rows {"prompt", "response"} of a JSONL or Parquet file; columns: our name → the
    file's. Raises UserError with file and line for a bad row, and for a file without rows."""
    examples = [
        SftExample(*(require_text(location, row, name, COLUMNS) for name in ("prompt", "response")))
        for location, row in read_records(path, columns, ("prompt", "response"), "sft.data")
    ]
    if not examples:
        raise UserError(
            f"{path}: it holds no examples; give rows of {{prompt, response}}",
            key="sft.data",
            cause=Cause.EMPTY,
        )
    return examples


class ExampleSampler(EpochSampler[SftExample]):
    """Draws examples; a state is refused after an example has changed."""

    def key(self, item: SftExample) -> str:
        return f"{item.prompt}\0{item.response}"
