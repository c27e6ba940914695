"""Honest responses like those of a run, each with the reward it must get."""

import random
from dataclasses import dataclass, field
from typing import Any

GROUP = 16
# As long as a short real thought; the grader has to find the answer behind it.
THOUGHT = "<think>" + "First I add the two numbers, then I check the sum again. " * 20 + "</think>"


@dataclass(frozen=True)
class LabelledResponse:
    """A response whose correct reward is known. reward: the correct one. name: for the report of a
    wrong one."""

    kind: str
    response: str
    truth: Any
    reward: float
    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def math_groups(num_groups: int, seed: int = 0) -> list[LabelledResponse]:
    """Return groups of 16 answers to one question: some right in several spellings, some wrong.

    45% integers, 20% fractions and decimals, 25% LaTeX (surds, polynomials, tuples, intervals,
    sets), 10% words and choices. As in a run, answers repeat within a group."""
    rng = random.Random(seed)
    makers = (
        [_integer] * 9
        + [_fraction] * 4
        + [_surd, _polynomial, _point, _interval, _set]
        + [_text] * 2
    )
    samples = []
    for number in range(num_groups):
        truth, right, wrong = makers[number % len(makers)](rng)
        share = rng.uniform(0.1, 0.9)
        for _ in range(GROUP):
            is_right = rng.random() < share
            answer = rng.choice(right if is_right else wrong)
            samples.append(
                LabelledResponse("math", answered(answer), truth, float(is_right), answer)
            )
    rng.shuffle(samples)
    return samples


def answered(answer: str) -> str:
    return f"{THOUGHT}<answer>{answer}</answer>"


def format_samples(num: int) -> list[LabelledResponse]:
    """Return `num` samples, half of them well-formed."""
    good, bad = answered("13"), THOUGHT + "13"
    return [
        LabelledResponse("format", (bad, good)[i % 2], None, float(i % 2), "format")
        for i in range(num)
    ]


def language_samples(num: int) -> list[LabelledResponse]:
    """Return `num` English thoughts, which consist of English words only."""
    fields = {"target": "en"}
    return [LabelledResponse("language", answered("13"), None, 1.0, "english", fields)] * num


def code_samples(num: int) -> list[LabelledResponse]:
    """Return Python programs with one test each (one sandboxed run), every fourth one wrong."""
    samples = []
    for i in range(num):
        is_right = i % 4 != 3
        program = f"a, b = map(int, input().split())\nprint(a + b + {int(not is_right)})"
        response = f"{THOUGHT}<answer>\n```python\n{program}\n```\n</answer>"
        truth = {"tests": [{"stdin": f"{i} 2\n", "stdout": f"{i + 2}\n"}]}
        fields = {"language": "python"}
        samples.append(LabelledResponse("code", response, truth, float(is_right), "sum", fields))
    return samples


Question = tuple[str, list[str], list[str]]


def _integer(rng: random.Random) -> Question:
    n = rng.randint(-999, 9_999)
    right = [f"{n}", f"{n}.0", rf"\boxed{{{n}}}", f"x = {n}", f"${n}$", f"{n:,}"]
    wrong = [f"{n + 1}", f"{n - 7}", f"{n + 10}", f"x = {2 * n + 1}", f"{n} or {n + 1}"]
    return str(n), right, wrong


def _fraction(rng: random.Random) -> Question:
    top, bottom = rng.choice([(1, 2), (3, 4), (7, 5), (9, 8), (11, 16), (13, 20), (21, 25)])
    right = [
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        f"{top / bottom}",
        rf"\dfrac{{{2 * top}}}{{{2 * bottom}}}",
    ]
    wrong = [f"{bottom}/{top}", f"{top + 1}/{bottom}", f"{top / bottom + 0.1}"]
    return right[0], right, wrong


def _surd(rng: random.Random) -> Question:
    a, b, c = rng.randint(2, 30), rng.choice([2, 3, 5, 7, 11]), rng.randint(1, 40)
    right = [rf"{c} + {a}\sqrt{{{b}}}", rf"{a}\sqrt{{{b}}} + {c}", rf"{c} + \sqrt{{{a * a * b}}}"]
    return right[0], right, [rf"{c} - {a}\sqrt{{{b}}}", rf"{c} + {a + 1}\sqrt{{{b}}}", f"{c}"]


def _polynomial(rng: random.Random) -> Question:
    p, q = rng.randint(1, 30), rng.randint(1, 30)
    right = [f"x^2 + {p + q}x + {p * q}", f"(x+{p})(x+{q})", f"{p * q} + {p + q}x + x^{{2}}"]
    return right[0], right, [f"(x+{p})(x-{q})", f"x^2 + {p + q}x - {p * q}", f"x + {p}"]


def _point(rng: random.Random) -> Question:
    a, b = rng.randint(-50, 50), rng.randint(51, 99)
    right = [f"({a}, {b})", rf"\left({a}, {b}\right)", f"(x, y) = ({a}, {b}.0)"]
    return right[0], right, [f"({b}, {a})", f"({a}, {b + 1})", f"{a}"]


def _interval(rng: random.Random) -> Question:
    a = rng.randint(-50, 50)
    b = a + rng.randint(1, 9)
    right = [f"[{a}, {b})", rf"\left[{a}, {b}\right)", rf"x \in [{a}, {b})"]
    return right[0], right, [f"[{a}, {b}]", f"({a}, {b})", rf"[{a}, \infty)"]


def _set(rng: random.Random) -> Question:
    a, b = rng.randint(-50, 50), rng.randint(51, 99)
    right = [f"x={a} or x={b}", f"{b}, {a}", rf"\{{{a}, {b}\}}", f"x = {b}, x = {a}"]
    return right[0], right, [f"{a}", f"{a}, {b}, {b + 1}", f"{a}, {b + 1}"]


def _text(rng: random.Random) -> Question:
    letter, other = rng.sample("ABCDE", 2)
    if rng.random() < 0.5:
        return (
            letter,
            [letter, f"({letter})", rf"\textbf{{({letter})}}", f"{letter}) 12"],
            [other, f"{letter} or {other}"],
        )
    word, wrong = rng.sample(["north", "south", "east", "right angle", "Evelyn", "even"], 2)
    return word, [word, rf"\text{{{word}}}", word.title()], [wrong, f"{word} or {wrong}"]
