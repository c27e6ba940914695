"""Error rates of our verdicts, and of planted faults, on the reports' answers and programs.

The labels are those of `answers.jsonl` and of `outputs.jsonl`."""

import asyncio
from pathlib import Path

import pytest
from r1_grading import RewardPool

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.commands.score.verifier_audit import audit_verifier
from megatron_r1.evaluation.second_verdicts import PooledSecondReader
from megatron_r1.evaluation.verifier_errors import AnswerContent, AuditedResponse
from tests.grading.code_answers import fenced, needs_sandbox
from tests.reports.test_answers import OUTPUTS

EVERY = 10
"""Of the reports' answers `make test` reads one in so many."""


def graded(place, source, kind, response, truth, fields, reward):
    content = AnswerContent(response, truth, fields)
    return AuditedResponse(place, source, kind, None, reward, reward, lambda: content)


def labelled_answers(every):
    """(id, response, truth, reading, label) of the reports' answers."""
    rows = [
        (row["id"], row["response"], row["truth"], reading, row["reward"])
        for row in read_lines(Path(__file__).with_name("answers.jsonl"))
        for reading in row.get("readings", ("strict", "auto", "last"))
    ]
    # And plain ones with fractions, as a data set has them.
    for number in range(24):
        above, below = 3 + number, 7 + 2 * number + (3 + number) % 2
        truth = f"{above}/{below}" if number % 2 else str(above)
        right = rf"\frac{{{above}}}{{{below}}}" if number % 2 else str(above)
        rows += [("plain", rf"So \boxed{{{right}}}", truth, "strict", 1)]
        rows += [("plain", rf"So \boxed{{{above + 1}}}", truth, "strict", 0)]
        rows += [("plain", "", truth, "strict", 0)]
    return [*(row for row in rows[::every] if row[0] != "plain"), *rows[-72:]]


class Remembering:
    """A pool that reads each answer once: the readings are the same for every planted fault."""

    def __init__(self, pool, known):
        self.pool, self.known = pool, known

    async def grade(self, kind, response, truth, **fields):
        key = kind, response, str(truth), str(fields)
        if key not in self.known:
            self.known[key] = await self.pool.grade(kind, response, truth, **fields)
        return self.known[key]


def audited(responses, known=None, **options):
    async def run():
        async with RewardPool(2, timeout_seconds=20.0) as pool:
            graders = pool if known is None else Remembering(pool, known)
            second_reader = PooledSecondReader(graders, {}, repeats=2)
            return await audit_verifier(responses, second_reader.read, num_groups=0, **options)

    return asyncio.run(run())


FAULTS = {
    "none": lambda response, label: label,
    "fractions are rejected": lambda response, label: label and r"\frac" not in response,
    "the empty answer is accepted": lambda response, label: label or not response,
    "the mark #### is missed": lambda response, label: label and "####" not in response,
}


@pytest.mark.parametrize(
    "every", [EVERY, pytest.param(1, marks=pytest.mark.more)], ids=["some", "all"]
)
def test_intervals_of_our_verdicts_and_of_planted_faults_have_the_labelled_truth(every):
    rows, known = labelled_answers(every), {}
    for name, verdict in FAULTS.items():
        responses, wrong = [], []
        for number, (report, response, truth, reading, label) in enumerate(rows):
            reward = float(verdict(response, label))
            fields = {"reading": reading}
            responses.append(graded(str(number), report, "math", response, truth, fields, reward))
            if reward != label:
                wrong.append(str(number))
        result = audited(responses, known, size=len(rows))
        found = {each.id for each, finding in result.judged if finding.outcome == "wrong"}
        assert found <= set(wrong), (name, [rows[int(place)] for place in found - set(wrong)])
        for source, rates in (*result.sources.items(), (None, result.overall)):
            for is_accepted, fraction in (
                (False, rates.wrongly_rejected),
                (True, rates.wrongly_accepted),
            ):
                of = [
                    a
                    for a in responses
                    if a.is_accepted is is_accepted and source in (None, a.source)
                ]
                if of:
                    truth = sum(each.id in wrong for each in of) / len(of)
                    assert fraction.low - 1e-12 <= truth <= fraction.high + 1e-12, (name, source)
        plain = result.sources["plain"]
        if name == "fractions are rejected":
            assert plain.wrongly_rejected.value == pytest.approx(12 / 60)
        if name == "the empty answer is accepted":
            assert plain.wrongly_accepted.value == pytest.approx(24 / 48)


@needs_sandbox
def test_intervals_of_programs_have_the_labelled_truth_and_a_missed_last_test_is_found():
    """A grader that skips the last test accepts a program that fails only there."""
    responses, wrong = [], set()
    for number, row in enumerate(OUTPUTS):
        response = fenced(f"input()\nprint({row['actual']!r})")
        truth = {"tests": [{"stdin": "1", "stdout": row["expected"]}]}
        responses.append(
            graded(f"report {number}", "B57", "code", response, truth, {}, float(row["equal"]))
        )
    tests = [{"stdin": str(n), "stdout": str(n * n)} for n in (1, 2, 9)]
    for number, program in enumerate(("n * n", "n * n if n < 9 else 0", "n + n - 1", "0")):
        response = fenced(f"n = int(input())\nprint({program})")
        accepts = program.startswith("n * n")  # tests 1 and 2 pass
        responses.append(
            graded(
                f"plain {number}", "plain", "code", response, {"tests": tests}, {}, float(accepts)
            )
        )
    wrong.add("plain 1")
    result = audited(responses, size=len(responses))
    assert {each.id for each, _ in result.concerned} == wrong
    ours, plain = result.sources["B57"], result.sources["plain"]
    assert (ours.wrongly_rejected.high, ours.wrongly_accepted.high) == (0.0, 0.0)
    assert (plain.wrongly_accepted.value, plain.wrongly_rejected.value) == (0.5, 0.0)


@needs_sandbox
def test_a_program_that_passes_by_chance_is_listed_as_flaky():
    response = fenced("import os\nprint(os.urandom(1)[0] % 2)")
    truth = {"tests": [{"stdin": "", "stdout": "1"}]}
    flaky = graded("1", "-", "code", response, truth, {}, 1.0)

    async def judged():
        async with RewardPool(1, timeout_seconds=20.0) as pool:
            return await PooledSecondReader(pool, {}, repeats=60).read(flaky)

    finding = asyncio.run(judged())
    assert finding.outcome == "undecided"
    assert finding.reason.startswith("flaky")
