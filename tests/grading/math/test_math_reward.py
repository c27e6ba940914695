"""The math reward's parts against independent ones: fractions, math-verify, sympy's own evalf."""

import random
import re
from fractions import Fraction

import mpmath
import pytest
import sympy
from math_verify import parse, verify
from r1_grading import math as math_reward
from r1_grading.math import accuracy
from r1_grading.math.answer_structure import read_structure
from r1_grading.math.normalization import normalize_latex
from r1_grading.math.number import read_number, same_number
from r1_grading.math.relation import read_set
from r1_grading.math.symbolic import NotNumeric, OutOfRange, evaluate_expression
from r1_grading.math.units import split_unit
from r1_grading.math.worded_answers import read_choice, stated_answer

X = sympy.Symbol("x", real=True)


@pytest.mark.parametrize(
    ("response", "truth", "expected", "values"),
    [
        (r"<answer>\boxed{12}, no: \boxed{13}</answer>", 13, 0, ("12", "13")),
        (r"\boxed{12}, no: \boxed{13}", 13, 1, ("13",)),
        ("**13** apples", 13, 1, ("13 apples",)),
        (r"\boxed{\sqrt{144}}", 12, 0, ("root",)),
        (r"\boxed{24/2}", 12, 0, ("division",)),
        ("<answer>12</answer>", "6 + 7 = <<6+7=13>>13\n#### 13", 0, ("12", "13")),
        ("<answer>12</answer>", 13, 0, ("12", "13")),
        ("<answer>13</answer>", 13, 1, ("13",)),
        ("I give up", 13, 0, ("I give up", "13")),
        (f"<answer>{'1' * 5_000}</answer>", 13, 0, ("too long",)),
        (f"<answer>{'1+' * 300}1</answer>", 13, 0, ("too long",)),
        ("<answer>13</answer>" * 2, 13, 0, ("2 <answer>",)),
    ],
)
def test_the_reason_shows_what_was_read_and_expected(response, truth, expected, values):
    grade = math_reward.grade(response, truth)
    assert grade.reward == expected and all(value in grade.reason for value in values), grade


def test_a_long_truth_allows_a_long_answer():
    terms = " + ".join(f"{n}x^{{{n}}}" for n in range(1, 90))
    assert len(terms) > accuracy.MAX_EXTRA_CHARS
    assert math_reward.grade(rf"\boxed{{{terms}}}", terms).reward == 1.0


UNCOMPARABLE = (
    None,
    [],
    {},
    [None, []],
    float("nan"),
    "NaN",
    "-nan",
    "nan%",
    "inf",
    "",
    "  ",
    "$ $",
)


@pytest.mark.parametrize("truth", [*UNCOMPARABLE, "6 + 7 = 13\n####", "#### A dog.\nA cat."])
def test_a_truth_that_cannot_be_compared_is_an_error(truth):
    shown = "####" if "####" in str(truth) else repr(truth)
    with pytest.raises(ValueError, match=re.escape(shown)):
        math_reward.grade("<answer>13</answer>", truth)


@pytest.mark.parametrize("truth", [13, 13.0, 0.5, 1e-7, 10**30, -3])
def test_a_truth_may_be_a_number(truth):
    assert math_reward.grade(f"<answer>{truth}</answer>", truth).reward == 1.0
    assert math_reward.grade(f"<answer>{truth + 1}</answer>", truth).reward == float(
        truth + 1 == truth
    )


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("The answer is 13.", "13."),
        ("**Answer:** 13", "13"),
        ("Final Answer: The final answer is $13$. I hope it is correct.", "$13$"),
        ("Thus the sum is $13$.", "$13$"),
        (r"We find \(x = 13\)", r"\(x = 13\)"),
        ("13 is the answer", "13"),
        ("**13** apples", "13 apples"),
        ("2**3**2", "2**3**2"),
        (r"Hence \[ x = 13. \]", r"\[ x = 13. \]"),
        ("= 13", "13"),
        ("From $12$ we get $13$", "From $12$ we get $13$"),
        ("It is 12 or $13$", "It is 12 or $13$"),
        ("The answer is not 13", "not 13"),
        ("", ""),
    ],
)
def test_a_sentence_states_an_answer_where_it_ends_with_one(sentence, answer):
    assert stated_answer(sentence) == answer


def test_written_numbers_are_the_fractions_they_spell():
    rng = random.Random(1)
    for _ in range(300):
        top, bottom = rng.randint(-999, 999), rng.randint(1, 99)
        assert read_number(rf"\frac{{{top}}}{{{bottom}}}").value == Fraction(top, bottom)
        assert read_number(f"{top}/{bottom}").value == Fraction(top, bottom)
        assert read_number(f"{top * 1000:,}").value == top * 1000
        whole, part = rng.randint(1, 99), rng.randint(1, bottom)
        mixed = rf"-{whole}\frac{{{part}}}{{{bottom}}}"
        assert read_number(mixed).value == -(whole + Fraction(part, bottom))
        digits, power = f"{rng.randint(0, 99)}.{rng.randint(0, 999)}", rng.randint(-30, 30)
        written = rf"{digits} \times 10^{{{power}}}"
        assert read_number(written).value == Fraction(f"{digits}e{power}")
    assert read_number(r"0.1\overline{6}").value == Fraction(1, 6)
    assert read_number(r"12.5\%").is_percent
    for text in ("1/0", "1٣", "1,00", "1.2.3", "", "-", "x", "1 2", "1e9999", "+-1"):
        assert read_number(text) is None, text


def equal_numbers(expected, answer):
    """Whether two texts write the same number; None where one of them is no written number."""
    left, right = read_number(expected), read_number(answer)
    return None if left is None or right is None else same_number(left, right)


def test_the_comparison_of_numbers_agrees_with_math_verify():
    rng = random.Random(0)
    spellings = (
        lambda n: str(n),
        lambda n: f"{n}.0",
        lambda n: f"{n / 4}",
        lambda n: f"{2 * n}/4",
        lambda n: f"{n}/{rng.randint(1, 12)}",
        lambda n: f"+{abs(n)}",
        lambda n: f"{'-' if n < 0 else ''}00{abs(n)}",
        lambda n: str(n * 10**25),
        lambda n: f"{n}.12345678901234567890",
        lambda n: f"{n / 3:.6f}",
    )
    for _ in range(400):
        number = rng.randint(-12, 12)
        other = rng.choice((number, number, number + 1, -number))
        pair = rng.choice(spellings)(number), rng.choice(spellings)(other)
        ours = equal_numbers(*pair)
        theirs = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in pair]
        assert ours == verify(*theirs, timeout_seconds=None), pair


def test_numbers_are_compared_exactly_where_none_is_a_decimal():
    assert equal_numbers("0.1", "1/10") is True
    assert equal_numbers(str(10**40), str(10**40 + 1)) is False
    assert equal_numbers("1/3", "333333/1000000") is False
    assert equal_numbers("1/3", "0.333333") is True
    assert equal_numbers("0.0000001", "0.0000002") is False


@pytest.mark.parametrize(
    "expression",
    [
        sympy.sin(X) ** 2 + sympy.cos(X) ** 2,
        (X + 1) ** 5 / (X**2 + 3),
        sympy.exp(sympy.I * X) + sympy.log(X**2 + 1),
        sympy.log(8, 2) + sympy.sqrt(2) * sympy.pi + sympy.E,
        sympy.factorial(5) + sympy.binomial(7, 3) + sympy.gamma(sympy.Rational(1, 2)),
        sympy.atan(X) + sympy.sinh(X) - sympy.Abs(X) + sympy.floor(X),
    ],
)
@pytest.mark.parametrize("point", [1.7, -2.3])
def test_values_are_those_of_sympy(expression, point):
    ours = evaluate_expression(expression, {"x": mpmath.mpf(point)})
    theirs = complex(expression.subs(X, sympy.Float(point, 30)).evalf(20))
    assert complex(ours) == pytest.approx(theirs, rel=1e-12)


def test_values_that_are_undefined_or_too_large_are_refused_at_once():
    nine = sympy.Integer(9)
    tower = sympy.Pow(nine, sympy.Pow(nine, nine**9, evaluate=False), evaluate=False)
    for expression in (tower, 1 / X, sympy.cos(tower), sympy.factorial(X + 10**9), sympy.log(X)):
        with pytest.raises(OutOfRange):
            evaluate_expression(expression, {"x": mpmath.mpf(0)})
    with pytest.raises(NotNumeric):
        evaluate_expression(sympy.Integral(X, X), {"x": mpmath.mpf(1)})


def test_a_continued_fraction_is_one_walk():
    # sympy's evalf takes exponential time on it: a thousand levels would never end.
    expression = X
    for _ in range(100):
        expression = 1 / (1 + expression)
    golden = (mpmath.sqrt(5) - 1) / 2
    assert abs(evaluate_expression(expression, {"x": mpmath.mpf(1)}) - golden) < 1e-15


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("3½", r"3 \frac{1}{2}"),
        ("x²⁰", "x^{20}"),
        ("−５", "-5"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\sqrt(x+(1))", r"\sqrt{x+(1)}"),
        (r"\mathrm{cm}", r"\text{cm}"),
        ("2**10", "2^{10}"),
        (r"1\,000", "1 000"),
        (r"90^{\circ}", "90°"),
    ],
)
def test_spelling(text, spelled):
    assert normalize_latex(text) == spelled


def test_structure_units_and_choices_are_read_off_the_text():
    assert read_structure("1, 2 or 3").members == ("1", "2", "3")
    assert read_structure("[1, (2, 3))").brackets == "[)"
    assert read_structure("[1, (2, 3))").members == ("1", "(2, 3)")
    assert read_structure("(1) + (2)") is None
    assert split_unit(r"5 \text{ cm}^{2}") == ("5", "cm2")
    assert split_unit("5 million") == ("5 million", None)
    assert read_choice(r"\textbf{(C) } 12") == ("C", "12")
    assert read_choice("C) 12 D) 13") is None
    assert read_choice("Cat") is None


@pytest.mark.parametrize(
    ("text", "solutions"),
    [
        ("x > 2", sympy.Interval.open(2, sympy.oo)),
        (r"3 \geq x > -1", sympy.Interval.Lopen(-1, 3)),
        (
            r"x < 0 or x \geq 1",
            sympy.Union(sympy.Interval.open(-sympy.oo, 0), sympy.Interval(1, sympy.oo)),
        ),
        (r"x \in [0, 1]", sympy.Interval(0, 1)),
        ("2x > 4", None),
    ],
)
def test_solved_inequalities_are_sets(text, solutions):
    assert read_set(text) == solutions


def test_answers_of_a_group_are_compared_once():
    accuracy._compare.cache_clear()
    for _ in range(16):
        math_reward.grade(r"<answer>\frac{22}{7}</answer>", "22/7")
    assert accuracy._compare.cache_info().hits == 15
    assert accuracy._compare.cache_info().maxsize is not None
