"""Says whether a scorer can evaluate an answer safely and in bounded time.

`scorer_refusal_reason` parses the answer as text and bounds what it computes."""

import ast
import math
import re
import unicodedata

FORMULA_CHARS = re.compile(r"[0-9A-Za-z+\-*/^().,\s]*")
FORMULA_NAMES = frozenset(
    ("Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp")
    + ("ln", "log", "pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh")
)
GROWING_FUNCTIONS = frozenset(("exp", "sinh", "cosh"))
MAX_FORMULA_CHARS = 2_000
MAX_BITS = 4_096
"""The size of any intermediate number: 1,200 digits."""
MAX_DEGREE = 64
"""Total degree in all symbols, which a scorer may expand."""


class TooLarge(ValueError):
    """Evaluating the formula could take too long."""


def is_formula(answer: str) -> bool:
    """Whether `answer` holds only numbers, operators, one-letter symbols and common functions."""
    formula = unicodedata.normalize("NFKC", answer)
    if not FORMULA_CHARS.fullmatch(formula) or re.search(r"\.\s*[A-Za-z]", formula):
        return False
    names = re.findall(r"[A-Za-z][A-Za-z0-9]*", formula)
    return all(len(name) == 1 or name in FORMULA_NAMES for name in names)


def scorer_refusal_reason(answer: str) -> str:
    """Return why a scorer must not evaluate `answer`, or "". Evaluates nothing itself."""
    if len(answer) > MAX_FORMULA_CHARS:
        return f"{len(answer)} characters, at most {MAX_FORMULA_CHARS} are evaluated"
    if not is_formula(answer):
        return "no plain formula"
    source = " ".join(unicodedata.normalize("NFKC", answer).replace("^", "**").split())
    try:
        _bound_size(ast.parse(source, mode="eval").body)
    except TooLarge as error:
        return str(error)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "no formula that can be parsed"
    return ""


def _bound_size(node: ast.expr) -> tuple[float, int]:
    """Return upper bounds of the bits of a value (or of its inverse) and of its degree."""
    match node:
        case ast.Constant(value=int() | float() as value):
            size = abs(math.log2(abs(value))) if value else 0.0, 0
        case ast.Name(id=name):
            size = (3.0, 0) if name in FORMULA_NAMES else (1.0, 1)
        case ast.UnaryOp(operand=operand):
            size = _bound_size(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            size = _bound_power(left, right)
        case ast.BinOp(left=left, op=operator, right=right):
            (bits, degree), (more_bits, more_degree) = _bound_size(left), _bound_size(right)
            if isinstance(operator, ast.Add | ast.Sub):
                # The denominators of fractions multiply.
                size = bits + more_bits + 1, max(degree, more_degree)
            else:
                size = bits + more_bits, degree + more_degree
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            bits, degree = _bound_size(argument)
            growth = 2.0 ** min(bits + 1, 64) if name in GROWING_FUNCTIONS else 64.0
            size = growth, degree
        case _:
            raise SyntaxError(type(node).__name__)
    if size[0] > MAX_BITS or size[1] > MAX_DEGREE:
        raise TooLarge("it would take numbers or powers too large to evaluate")
    return size


def _bound_power(base: ast.expr, exponent: ast.expr) -> tuple[float, int]:
    """Return the bounds of a power, from the largest value of the exponent."""
    (bits, degree), (exponent_bits, exponent_degree) = _bound_size(base), _bound_size(exponent)
    if exponent_degree:
        return bits + exponent_bits, degree + exponent_degree
    times = 2.0 ** min(exponent_bits, 64)
    return max(bits, 1.0) * times, math.ceil(degree * times - 1e-9)
