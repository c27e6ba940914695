"""Suites of reasoning-gym tasks, which need no download.

`gym/logic` is a suite of this file, `gym/knights_knaves` a single task. The questions are generated
from a seed, the same on every machine with the same version of reasoning-gym.

`syllogism` is in no suite: reasoning-gym 0.1.25 accepts invalid conclusions (its validity check
does not require that a premise distributes the middle term)."""

from collections.abc import Iterator
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.gym_tasks import generate_items, level_parameters
from megatron_r1.data.prompt import is_heldout, normalize_question
from megatron_r1.evaluation.benchmarks.base import Benchmark, Options, Question, Rows

_TASK_NAMES = {
    "arithmetic": (
        "basic_arithmetic chain_sum products gcd lcm fraction_simplification "
        "decimal_arithmetic prime_factorization number_format time_intervals"
    ),
    "algebra": (
        "simple_equations polynomial_equations polynomial_multiplication complex_arithmetic "
        "simple_integration intermediate_integration"
    ),
    "algorithmic": (
        "base_conversion count_primes letter_counting number_sorting word_sorting "
        "spell_backward binary_matrix rotate_matrix spiral_matrix string_insertion"
    ),
    "logic": "knights_knaves propositional_logic zebra_puzzles self_reference circuit_logic aiw",
    "graphs": "course_schedule family_relationships largest_island quantum_lock shortest_path",
    "games": "puzzle24 mini_sudoku n_queens tower_of_hanoi maze",
    "geometry": "simple_geometry advanced_geometry",
    "mixed": (
        "chain_sum gcd simple_equations polynomial_equations base_conversion number_sorting "
        "knights_knaves largest_island puzzle24 simple_geometry"
    ),
}
SUITES = {suite: tuple(tasks.split()) for suite, tasks in _TASK_NAMES.items()}
DIFFICULTIES = {"easy": 0, "medium": 1, "hard": 2}
"""Levels of reasoning-gym's curricula; "default" is each task's own default settings."""
ATTEMPTS_PER_QUESTION = 50


def questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the questions of a suite or of one task.

    Raises:
        UserError: an unknown suite or task.
    """
    from reasoning_gym.factory import DATASETS

    suite = options["suite"]
    tasks = SUITES.get(suite, (suite,))
    if suite not in SUITES and suite not in DATASETS:
        hint = did_you_mean(suite, [*SUITES, *DATASETS], "'gym/{}'")
        raise UserError(
            f"gym has no suite or task {suite!r}{hint} (suites: {', '.join(SUITES)}; tasks: "
            "those of reasoning-gym)",
            key="eval.benchmarks",
            cause=Cause.UNKNOWN,
        )
    if suite in SUITES and options["parameters"]:
        raise UserError(
            f"gym/{suite}: parameters belong to one task; name it: gym/{tasks[0]}",
            key="options.parameters",
            cause=Cause.CONFLICT,
        )
    for task in tasks:
        yield from _task_questions(task, options, needs_all=len(tasks) == 1)


def _task_questions(task: str, options: Options, needs_all: bool) -> Iterator[Question]:
    """Yield distinct questions of one task, `questions` of them."""
    parameters, difficulty = dict(options["parameters"]), options["difficulty"]
    if difficulty != "default":
        if difficulty not in DIFFICULTIES:
            names = ", ".join(["default", *DIFFICULTIES])
            raise UserError(
                f"gym: difficulty {difficulty!r} is not one of {names}",
                key="options.difficulty",
                cause=Cause.UNKNOWN,
            )
        parameters = level_parameters(task, DIFFICULTIES[difficulty]) | parameters
    fields: dict[str, Any] = {"task": task, "parameters": parameters}
    num_questions, texts = options["questions"], set()
    for item in generate_items(
        task, parameters, options["seed"], num_questions * ATTEMPTS_PER_QUESTION
    ):
        text = normalize_question(item["question"])
        if text in texts or not is_heldout(item["question"], options["heldout_fraction"]):
            continue
        texts.add(text)
        entry = {**fields, "entry": item}
        yield Question("", item["question"], "logic", item["answer"], entry)
        if len(texts) == num_questions:
            return
    if texts and not needs_all:
        return
    raise UserError(
        f"gym/{task}: only {len(texts)} distinct questions of {num_questions}; set fewer "
        "`questions`, or make them more varied by its parameters",
        key="options.questions",
        cause=Cause.TOO_LARGE,
    )


BENCHMARK = Benchmark(
    questions,
    instruction="{question}\n\nThink first, then give the final answer within <answer> </answer>.",
    options={
        "suite": "mixed",
        "questions": 10,  # per task
        "difficulty": "default",
        "parameters": {},  # of a single task
        "seed": 1_000_000,  # far from the seeds of training: neighboring seeds share questions
        "heldout_fraction": 1.0,  # below 1: only what training with this fraction held out
    },
)
