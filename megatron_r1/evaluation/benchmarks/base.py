"""The definition of a benchmark: where its rows come from, and how a row becomes a question."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.prompt import Prompt, make_prompt
from megatron_r1.data.prompt_templates import PLACEHOLDER
from megatron_r1.data.table_files import LocatedRow

__all__ = ["Benchmark", "Options", "Question", "Rows", "code_limits", "pick_columns", "to_prompts"]

Rows = Iterable[LocatedRow]
Options = Mapping[str, Any]


def pick_columns(
    location: str, row: Mapping[str, Any], layouts: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Return the row under the project's names, by the first layout whose columns it has.

    Args:
        location: "file:line", for errors.
        row: column → value; columns that the layout does not have are dropped.
        layouts: for each, the project's name → the column's.

    Raises:
        UserError: no layout fits; it names the missing and the present columns."""
    for layout in layouts:
        if all(column in row for column in layout.values()):
            return {name: row[column] for name, column in layout.items()}
    nearest = max(layouts, key=lambda layout: sum(column in row for column in layout.values()))
    missing = [column for column in nearest.values() if column not in row]
    raise UserError(
        f"{location}: no column {', '.join(map(repr, missing))}; it has "
        f"{', '.join(map(str, row))}: "
        "is this the right file?",
        key=missing[0],
        cause=Cause.MISSING,
    )


MAX_TOTAL_SECONDS = 600
"""Wall time for all tests of one program."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: the question's id in the data set, or "".
        text: the question without the instruction.
        kind: the name of the reward that grades the answer, or "module:function".
        truth: what that reward compares with.
        fields: further arguments of the reward, as in `data.prompt.Prompt`."""

    id: str
    text: str
    kind: str
    truth: Any
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        questions: turns rows into questions, lazily; raises ValueError with the row's place.
        instruction: the prompt, with {question} where the question goes.
        hubs: repositories on the Hugging Face hub that hold the benchmark, the usual one first,
            each with a function of the options that returns the files (glob patterns). A benchmark
            without repositories makes its own questions and reads no rows.
        options: every option with its default.
        is_pairwise: whether the truths are another model's responses, with which a judge compares;
            the results are then win rates, and the questions are of the kind judge."""

    questions: Callable[[Rows, Options], Iterator[Question]]
    instruction: str = "{question}"
    hubs: Mapping[str, Callable[[Options], Sequence[str]]] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    is_pairwise: bool = False

    def with_defaults(self, name: str, options: Options) -> dict[str, Any]:
        """Return the value of each option of the benchmark: that of `options`, else its default.

        Raises:
            UserError: an unknown option.
        """
        for option in options.keys() - self.options.keys():
            option_text = (
                f"it takes {', '.join(sorted(self.options))}" if self.options else "it has none"
            )
            hint = did_you_mean(option, self.options) or f"; {option_text}"
            raise UserError(
                f"benchmark {name}: unknown option {option!r}{hint}",
                key=f"options.{option}",
                cause=Cause.UNKNOWN,
            )
        return {**self.options, **options}


def to_prompts(questions: Iterable[Question], instruction: str) -> Iterator[Prompt]:
    """Yield prompts with unique ids.

    An id is the data set's, or a hash of the text; a repeated one gets "-2", "-3", …

    Args:
        questions: the benchmark's questions.
        instruction: the prompt, with {question} where the question goes.

    Raises:
        UserError: an instruction without {question}."""
    if PLACEHOLDER not in instruction:
        raise UserError(
            f"instruction {instruction!r} has no {PLACEHOLDER}; write it where the question goes",
            key="instruction",
            cause=Cause.MALFORMED,
        )
    name_counts: dict[str, int] = {}
    for question in questions:
        text = instruction.replace(PLACEHOLDER, question.text)
        prompt = make_prompt(text, question.kind, question.truth, question.fields)
        name = question.id or prompt.id
        name_counts[name] = name_counts.get(name, 0) + 1
        name = name if name_counts[name] == 1 else f"{name}-{name_counts[name]}"
        yield Prompt(name, text, question.kind, question.truth, question.fields)


def code_limits(cpu_seconds: float, memory_mib: float, num_tests: int) -> dict[str, float]:
    """Return `limits` of the code reward for a judge's limits per test (`sandbox.limits`).

    Wall time is twice the CPU time, because the machine does other work too. All tests together get
    the time they may take one by one, up to `MAX_TOTAL_SECONDS`.

    Args:
        cpu_seconds: CPU time of one test.
        memory_mib: memory of one test, MiB.
        num_tests: the number of tests of the program."""
    cpu_seconds = min(max(cpu_seconds, 1.0), 120.0)
    return {
        "cpu_seconds": cpu_seconds,
        "wall_seconds": 2 * cpu_seconds,
        "total_seconds": min(max(60.0, cpu_seconds * num_tests), MAX_TOTAL_SECONDS),
        "memory_mib": min(memory_mib, 16_384),
    }
