r"""More labelled answers, in the same manner as `math_pairs`: what stands beside a value or a box,
and changes it or not; pairs that look like numbers; neighbors of the forms of the other files.
"""

Pair = tuple[str, str, int, str]


def labelled(truth: str, label: int, why: str, *answers: str) -> list[Pair]:
    return [(truth, answer, label, why) for answer in answers]


MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
VECTOR = r"\langle1,2,3\rangle"
HALF_LINES = r"(-\infty,0)\cup(0,\infty)"

BESIDE: dict[str, list[Pair]] = {
    "beside the box": [
        *labelled("13", 0, "an operator", r"-\boxed{13}", r"x = -\boxed{13}", r"\boxed{13}^2"),
        *labelled("13", 0, "an operator", r"\boxed{13} + 1", r"\boxed{13} \pm 1", r"2\boxed{13}-1"),
        *labelled("13", 0, "an operator", r"\sqrt{\boxed{13}}", r"\frac{\boxed{13}}{2}"),
        *labelled("13", 0, "denied", r"It is not \boxed{13}", r"\boxed{13} is wrong"),
        *labelled("13", 0, "denied", r"less than $\boxed{13}$", r"x > \boxed{13}", r"\boxed{13}?"),
        *labelled("13", 0, "not committed", r"about \boxed{13}", r"\boxed{13} or so"),
        *labelled("13", 0, "a bound", r"at most $\boxed{13}$", r"x \le \boxed{13}"),
        *labelled("13", 0, "a sign", r"- \boxed{13}", r"$- \boxed{13}$", r"x = - $\boxed{13}$"),
        *labelled("13", 1, "marks", r"<b>\boxed{13}</b>", r"> \boxed{13}", r"*\boxed{13}* (cm)"),
        *labelled("13", 0, "another", r"\boxed{13} \text{ or } 14", r"\boxed{13} (or perhaps 14)"),
        *labelled("13", 0, "another", r"\boxed{13},\ 14", r"\boxed{1}\boxed{3}"),
        *labelled(
            "13", 1, "a step", r"2 + 11 = \boxed{13}", r"x = \boxed{13}", r"$x-1=\boxed{13}$"
        ),
        *labelled("13", 1, "an explanation", r"less than 20, so \boxed{13}", r"\boxed{13}!"),
        *labelled("13", 1, "a unit", r"\boxed{13}\text{ cm}", r"\boxed{13}\%", r"**\boxed{13}**"),
        *labelled("13", 1, "a group", r"\mathbf{\boxed{13}}", r"{\color{red}\boxed{13}}"),
        ("3.14", r"x \approx \boxed{3.14}", 1, "rounded as the truth is"),
    ],
    "pairs that look like numbers": [
        *labelled("(100,200)", 0, "a pair", "100200", "(100200)", "(200,100)"),
        *labelled("(100,200)", 1, "the same pair", "(100, 200)", r"\left(100,200\right)"),
        *labelled("100200", 0, "a pair", "(100,200)", r"\{100,200\}", "[100,200]"),
        *labelled(r"\{100,200\}", 1, "a set", r"\{200, 100\}"),
        *labelled(r"\{100,200\}", 0, "a set", "100200", "(100,200)"),
        *labelled("[100,200)", 1, "an interval", r"100 \le x < 200"),
        *labelled("1, 200", 0, "a list", "1200"),
        *labelled("1, 200", 1, "a list", "200, 1"),
        *labelled("1,000", 0, "no number", "1,0,0,0", "1.000", "10,00"),
        *labelled("1,000", 1, "one number", "1,000.0", "(1,000)", "1 000"),
    ],
    "percentages of what has a unit": [
        *labelled("5 kg", 0, "a share is no weight", r"5\%", "5 percent"),
        *labelled(r"\$40", 0, "a share is no money", r"40\%"),
        *labelled(r"40\%", 0, "money is no share", r"\$40"),
        *labelled(r"90^\circ", 0, "a share is no angle", r"90\%"),
        *labelled(r"33\frac{1}{3}\%", 1, "a third", r"33.\overline{3}\%", r"\frac{1}{3}"),
        *labelled(r"20\%", 0, "another sign", r"-20\%"),
        *labelled("5", 0, "a thousandth", "5‰"),
    ],
    "words about another number": [
        *labelled(
            "204", 0, "not the answer", "The previous answer is 204", "A naive answer is 204"
        ),
        *labelled("204", 0, "not the answer", "Bob's answer is 204", "the answer plus one is 204"),
        *labelled("204", 0, "not the answer", "the sum of digits of the answer is 204"),
        *labelled(
            "204", 0, "denied", "The answer isn't 204", "204 is wrong", "I doubt it is $204$"
        ),
        *labelled("204", 0, "a bound", "no more than 204", r"204 \text{ at most}", r"\lesssim 204"),
        *labelled("204", 0, "not committed", "~204", "$~204$", r"204 \pm 0.5", "204 ± 1", "200s"),
        *labelled("204", 0, "a residue", r"204 \pmod{1000}", r"x \equiv 204", "m+n mod 1000 = 204"),
        *labelled("204", 0, "hidden or crossed out", r"\cancel{204}", r"205\phantom{204}"),
        *labelled("204", 0, "a mark at another", r"205\tag{204}", r"\overset{204}{205}"),
        *labelled(
            "204", 0, "two rows", r"\begin{cases}204\\205\end{cases}", r"\substack{204\\205}"
        ),
        *labelled("204", 0, "other digits", "0xCC", "CCIV", "20x", "2 0 4", "204:1", "204e1"),
    ],
    "marks around a value": [
        *labelled("204", 1, "a conclusion", r"$\therefore 204$", r"\text{Hence the answer is }204"),
        *labelled("204", 1, "the end of a proof", r"204 \blacksquare", r"$204 \square$", "204 ■"),
        *labelled("204", 1, "emphasis", "__204__", "_204_", "***204***"),
        *labelled("204", 1, "quotes", '"204"', "'204'", "“204”"),
        *labelled("204", 1, "Chinese", r"\text{答案：}204", "所以答案为204。"),
        *labelled("204", 1, "layout", r"\mathbf{m+n}=\mathbf{204}", r"204 \mathrm{~cm}^2"),
        *labelled("204", 1, "a color", r"{\color{#FF0000}204}", r"\color[HTML]{FF0000}{204}"),
        *labelled("yes", 1, "quotes", '"Yes"'),
        *labelled("yes", 0, "quotes", '"no"', "'yes' or 'no'"),
    ],
    "and, or, and systems": [
        *labelled("x<1 or x>2", 0, "both at once", "x<1 and x>2"),
        *labelled("x<1 or x>2", 1, "either", "x>2 or x<1", "x<1, x>2"),
        *labelled("x>1 and x<2", 0, "either", "x>1 or x<2"),
        *labelled("x>1 and x<2", 1, "both", "x<2 and x>1"),
        *labelled("(1,2)", 1, "a system", r"\begin{cases}x=1\\y=2\end{cases}"),
        *labelled("(1,2)", 0, "exchanged", r"\begin{cases}x=2\\y=1\end{cases}"),
    ],
    "conditions on other numbers": [
        *labelled("[1,3]", 0, "whole numbers", r"\{x\in\mathbb{Z} : 1\le x\le3\}"),
        *labelled(r"(2,\infty)", 0, "fractions", r"\{x\in\mathbb{Q} \mid x>2\}"),
        *labelled(HALF_LINES, 0, "others", r"\mathbb{Q}\setminus\{0\}", r"\{x \mid x \neq 1\}"),
        *labelled(HALF_LINES, 1, "all but 0", r"x\ne0", r"\{x\mid x\neq 0\}"),
        *labelled("(0,1)", 0, "a hole", r"(0,1) \setminus \{\frac12\}", r"0<x<1, x\neq 1/2"),
        *labelled("[0,1]", 1, "two halves", r"[0,\frac12]\cup[\frac12,1]"),
    ],
    "matrices, vectors, bases and angles": [
        *labelled(MATRIX, 0, "another matrix", "2" + MATRIX, "-" + MATRIX, MATRIX + "^{-1}"),
        *labelled(MATRIX, 0, "a transpose, a determinant", MATRIX + "^T", r"\det" + MATRIX),
        *labelled(
            MATRIX, 1, "layout", r"\begin{pmatrix}1&2\\[-2pt]3&4\\\end{pmatrix}", "A=" + MATRIX
        ),
        *labelled(VECTOR, 1, "a column", r"\begin{pmatrix}1\\[4pt]2\\[4pt]3\end{pmatrix}"),
        *labelled(VECTOR, 0, "another vector", r"\langle -1,-2,-3\rangle", r"2\langle1,2,3\rangle"),
        *labelled("1010_2", 1, "a base in brackets", "1010_{(2)}", "(1010)_2"),
        *labelled("1010_2", 0, "another base", "1010_{(3)}", "1010_{10}", "1010"),
        *labelled(r"60^\circ", 1, "the same angle", r"\frac{\pi}{3} \text{ radians}", r"\pi/3"),
        *labelled(r"60^\circ", 0, "another angle", r"\frac{\pi}{3}^\circ", "60 rad", "1.0472"),
    ],
}
