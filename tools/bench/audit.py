"""Error rates that `megatron-r1 score --audit` estimates for verifiers, next to those by labels.

Each verifier grades labelled answers and programs, so that the fraction of its rejections that are
right and of its acceptances that are wrong is known. The audit does not see the labels: it draws
`--size` verdicts, stratified by file and verdict, and estimates both fractions with 95% intervals.
Repeated with `--seeds` draws, the table says in how many of them the interval has the fraction by
labels. It prints "whole" for a row whose draws all have every verdict.

`math-verify` reads the answer where the second reader finds it; one that it cannot read is
rejected. `itself` is math-verify audited by a second reader that has math-verify in it.

FILE is JSONL with a line {"truth": …, "answer" or "response": …, "reward": 0 or 1} of mathematics,
or {"expected": …, "actual": …, "equal": true or false} of a program's output; or YAML of problems
with programs, as `tests/grading/code/problems.yaml`.
"""

import argparse
import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from r1_grading import RewardPool

from megatron_r1.commands.score.verifier_audit import SAMPLE_SIZE, audit_verifier
from megatron_r1.data.table_files import read_rows
from megatron_r1.evaluation.fraction_intervals import FractionEstimate
from megatron_r1.evaluation.second_verdicts import (
    MATH_VERIFY,
    READER,
    REPEATS,
    classify_runs,
    mathematics_verdicts,
    read_mathematics,
)
from megatron_r1.evaluation.verifier_errors import (
    AnswerContent,
    AuditedResponse,
    SecondReaderVerdict,
)

ROOT = Path(__file__).resolve().parents[2]
FILES = tuple(
    ROOT / "tests" / name
    for name in (
        "grading/math/pairs.jsonl",
        "grading/math/upstream.jsonl",
        "grading/last_lines.jsonl",
        "grading/code/comparisons.jsonl",
        "grading/code/problems.yaml",
        "reports/answers.jsonl",
        "reports/outputs.jsonl",
    )
)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
TIMEOUT_SECONDS = 20.0
BY_ITSELF = "itself"
"""math-verify, audited by a second reader that has math-verify in it: what `--verifier math-verify`
is there to prevent."""
ERRORS = ("wrongly rejected", "wrongly accepted")
ALL = "all"
"""The name of the rows of all files together."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer, or a program, with its label.

    Attributes:
        source: the file.
        kind: "math" or "code".
        response: what is graded.
        truth: what it is graded against.
        is_right: the label.
        reading: where mathematics looks for the answer.
        output: what a program prints; None for mathematics."""

    source: str
    kind: str
    response: str
    truth: Any
    is_right: bool
    reading: str = "strict"
    output: str | None = None


@dataclass(frozen=True)
class Reading:
    """What the verifiers and the second reader say of an answer.

    Attributes:
        verdicts: verifier → whether it accepts the answer.
        second: the second reader's verdict of an accepted and of a rejected answer.
        second_without: the same without math-verify, for its own verdicts."""

    verdicts: Mapping[str, bool]
    second: Mapping[bool, SecondReaderVerdict]
    second_without: Mapping[bool, SecondReaderVerdict]


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("files", type=Path, nargs="*", metavar="FILE", help="default: the tests'")
    options.add_argument("--size", type=int, default=SAMPLE_SIZE, help="verdicts of a draw")
    options.add_argument("--seeds", type=int, default=200, help="draws")
    options.add_argument("--workers", type=int, default=2)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return, by verifier and file, the rates by labels and in how many draws the interval has
    them."""
    answers = [answer for path in args.files or FILES for answer in read_answers(path)]
    readings = asyncio.run(_read_all(answers, args.workers))
    verifiers = list(dict.fromkeys(name for reading in readings for name in reading.verdicts))
    print(f"{len(answers):,} labelled answers, {args.seeds} draws of {args.size} verdicts")
    print(
        f"{'verifier':12} {'file':12} {'':16} {'of':>5} {'label':>6} {'draw 0':>17} "
        f"{'undecided':>9} {'holds':>8}"
    )
    rows = []
    for name in verifiers:
        rows += _rows_of(name, answers, readings, args)
    shares = [row["holds"] / row["draws"] for row in rows if row["verifier"] != BY_ITSELF]
    contradicted = sum(
        reading.second[answer.is_right].outcome == "wrong"
        for answer, reading in zip(answers, readings, strict=True)
    )
    print(
        f"without the rows of {BY_ITSELF!r}, {min(shares):.0%} of a row's intervals or more have "
        f"the rate by labels; the second reader calls {contradicted} of {len(answers):,} labels "
        "wrong"
    )
    return {
        "answers": len(answers),
        "size": args.size,
        "draws": args.seeds,
        "least_share": min(shares),
        "contradicted_labels": contradicted,
        "rows": rows,
    }


def read_answers(path: Path) -> Iterator[LabelledAnswer]:
    """Yield the labelled answers of a file; a line with `readings` is one of each."""
    if path.suffix == ".yaml":
        yield from _labelled_programs(path)
        return
    for _, row in read_rows(path):
        if "equal" in row:
            if row.get("kind", "output") == "output":
                yield _printing_program(path.stem, row)
            continue
        response = row.get("response") or row.get("line") or f"<answer>{row['answer']}</answer>"
        readings = ("auto",) if "line" in row else ("strict",)
        if "id" in row:
            readings = tuple(row.get("readings", ("strict", "auto", "last")))
        for reading in readings:
            yield LabelledAnswer(
                path.stem, "math", response, row["truth"], bool(row["reward"]), reading
            )


def _labelled_programs(path: Path) -> Iterator[LabelledAnswer]:
    for problem in yaml.safe_load(path.read_text(encoding="utf-8")).values():
        for label in ("right", "wrong"):
            if "python" in problem.get(label, {}):
                response = f"```python\n{problem[label]['python']}\n```"
                yield LabelledAnswer(
                    path.stem, "code", response, problem["truth"], label == "right"
                )


def _printing_program(source: str, row: Mapping[str, Any]) -> LabelledAnswer:
    truth = {"tests": [{"stdin": "", "stdout": row["expected"]}]}
    if "tolerance" in row:
        truth["tolerance"] = row["tolerance"]
    response = f"```python\nimport sys\nsys.stdout.write({row['actual']!r})\n```"
    return LabelledAnswer(source, "code", response, truth, row["equal"], output=row["actual"])


async def _read_all(answers: Sequence[LabelledAnswer], workers: int) -> list[Reading]:
    async with RewardPool(workers, TIMEOUT_SECONDS) as pool:
        reads = {"math": _read_mathematics, "code": _read_program}
        return await asyncio.gather(*(reads[answer.kind](pool, answer) for answer in answers))


async def _read_mathematics(pool: RewardPool, answer: LabelledAnswer) -> Reading:
    options = {"reading": answer.reading}
    ours = await pool.grade("math", answer.response, answer.truth, **options)
    second = await pool.grade(READER, answer.response, answer.truth, **options)
    accepted_by_math_verify = mathematics_verdicts(second).math_verify == "right"
    text = re.sub(r"</?answer>", "", answer.response)
    numbers, truths = NUMBER.findall(text), NUMBER.findall(str(answer.truth))
    return Reading(
        {
            "ours": ours.reward == 1.0,
            MATH_VERIFY: accepted_by_math_verify,
            BY_ITSELF: accepted_by_math_verify,
            "same text": text.strip() == str(answer.truth).strip(),
            "last number": bool(numbers and truths and numbers[-1] == truths[-1]),
        },
        *(
            {
                is_accepted: read_mathematics(
                    is_accepted, second, without_math_verify=without_math_verify
                )
                for is_accepted in (False, True)
            }
            for without_math_verify in (False, True)
        ),
    )


async def _read_program(pool: RewardPool, answer: LabelledAnswer) -> Reading:
    """Each verifier of programs runs them; the second reader does so `REPEATS` times more."""
    ours = await pool.grade("code", answer.response, answer.truth)
    runs = [await pool.grade("code", answer.response, answer.truth) for _ in range(REPEATS)]
    passes = [grade.reward == 1.0 for grade in runs]
    first_test = {**answer.truth, "tests": answer.truth["tests"][:1]}
    first = await pool.grade("code", answer.response, first_test)
    verdicts = {"ours": ours.reward == 1.0, "first test": first.reward == 1.0}
    if answer.output is not None:
        expected = answer.truth["tests"][0]["stdout"]
        verdicts["same text"] = answer.output.strip() == str(expected).strip()
    second = {
        is_accepted: SecondReaderVerdict(classify_runs(is_accepted, passes), runs[0].reason)
        for is_accepted in (False, True)
    }
    return Reading(verdicts, second, second)


def _rows_of(
    verifier: str,
    answers: Sequence[LabelledAnswer],
    readings: Sequence[Reading],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Print and return the rows of a verifier: each file's and those of all files."""
    responses: list[AuditedResponse] = []
    second: dict[str, SecondReaderVerdict] = {}
    wrong: set[str] = set()
    for index, (answer, reading) in enumerate(zip(answers, readings, strict=True)):
        if verifier not in reading.verdicts:
            continue
        is_accepted, key = reading.verdicts[verifier], str(index)
        reward = float(is_accepted)
        load = partial(AnswerContent, answer.response, answer.truth, {})
        responses.append(
            AuditedResponse(key, answer.source, answer.kind, None, reward, reward, load)
        )
        verdicts = reading.second_without if verifier == MATH_VERIFY else reading.second
        second[key] = verdicts[is_accepted]
        if is_accepted != answer.is_right:
            wrong.add(key)

    async def read(response: AuditedResponse) -> SecondReaderVerdict:
        return second[response.id]

    audits = [
        asyncio.run(audit_verifier(responses, read, size=args.size, seed=seed, num_groups=0))
        for seed in range(args.seeds)
    ]
    rows = []
    for source in (*audits[0].sources, ALL):
        rates = [result.overall if source == ALL else result.sources[source] for result in audits]
        for error in ERRORS:
            population = [
                response.id
                for response in responses
                if response.is_accepted is (error == ERRORS[1]) and source in (ALL, response.source)
            ]
            if population:
                label = sum(key in wrong for key in population) / len(population)
                estimates = [getattr(each, error.replace(" ", "_")) for each in rates]
                rows.append(
                    {"verifier": verifier, "source": source, "error": error}
                    | _fraction_figures(len(population), label, estimates)
                )
                _print_row(rows[-1])
    return rows


def _fraction_figures(
    population: int, label: float, estimates: Sequence[FractionEstimate]
) -> dict[str, Any]:
    """Return the figures of a fraction of so many verdicts, which is `label` by their labels."""
    undecided = sum(estimate.num_undecided for estimate in estimates)
    return {
        "of": population,
        "rate_by_labels": label,
        "low": estimates[0].low,
        "high": estimates[0].high,
        "undecided": undecided / sum(estimate.num_sampled for estimate in estimates),
        "is_whole": all(estimate.num_sampled == population for estimate in estimates),
        "holds": sum(estimate.low <= label <= estimate.high for estimate in estimates),
        "draws": len(estimates),
    }


def _print_row(row: dict[str, Any]) -> None:
    holds = "whole" if row["is_whole"] else f"{row['holds']}/{row['draws']}"
    print(
        f"{row['verifier']:12} {row['source']:12} {row['error']:16} {row['of']:5} "
        f"{row['rate_by_labels']:6.1%} {row['low']:7.1%} to {row['high']:6.1%} "
        f"{row['undecided']:9.0%} {holds:>8}"
    )
