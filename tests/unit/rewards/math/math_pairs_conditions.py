r"""More labelled answers, in the same manner as `math_pairs`: parameters and their domains,
congruences, conditions, repeated members, times, and what is no unit.
"""

from math_pairs_beside import Pair, labelled

ANGLES = r"x=\frac{\pi}{2}+k\pi, k\in\mathbb{Z}"
LINES = r"f(x)=cx, c\in\mathbb{R}"
RESIDUE = r"x \equiv 5 \pmod{7}"
SOLUTION = r"so the answer is \boxed{13}, the answer for n = 4."
NOTE = r"\boxed{\text{even}} (Note: this is the answer to problem 5.)"

CONDITIONS: dict[str, list[Pair]] = {
    "a parameter and its domain": [
        *labelled(ANGLES, 0, "another value", r"x=17, k\in\mathbb{Z}", r"x=k, k\in\mathbb{Z}"),
        *labelled(ANGLES, 0, "no value", r"x\in\mathbb{Z}", r"\mathbb{Z}", r"k\in\mathbb{Z}"),
        *labelled(ANGLES, 0, "half of them", r"x=\frac{\pi}{2}+2k\pi, k\in\mathbb{Z}"),
        *labelled(ANGLES, 0, "another domain", r"x=\frac{\pi}{2}+k\pi, k\in\mathbb{R}"),
        *labelled(ANGLES, 0, "n is free", r"x=\frac{\pi}{2}+n\pi, k\in\mathbb{Z}"),
        *labelled(ANGLES, 0, "exchanged", r"k=\frac{\pi}{2}+x\pi, x\in\mathbb{Z}"),
        *labelled(ANGLES, 1, "in another order", r"k\in\mathbb{Z}, x=k\pi+\frac{\pi}{2}"),
        *labelled(ANGLES, 1, "in one fraction", r"x=\frac{(2k+1)\pi}{2},\ k\in\mathbb Z"),
        *labelled(ANGLES, 1, "renamed", r"x=\frac{\pi}{2}+n\pi, n\in\mathbb{Z}"),
        *labelled(ANGLES, 1, "layout", r"x=\frac{\pi}{2}+k\pi \text{ where } k\in\mathbb{Z}"),
        *labelled(ANGLES, 1, "layout", r"x=\frac{\pi}{2}+k\pi\ (k\in\mathbb{Z})"),
        *labelled(LINES, 0, "another function", r"f(x)=0, c\in\mathbb{R}"),
        *labelled(LINES, 0, "another function", r"f(x)=x^2, c\in\mathbb{R}"),
        *labelled(LINES, 1, "renamed", r"f(x)=ax \text{ for any } a\in\mathbb{R}"),
        (r"y=Ce^x, C\in\mathbb{R}", r"y=C, C\in\mathbb{R}", 0, "another function"),
        (r"(0,1)\cup(2,3)", r"y = 7, x \in (0,1)\cup(2,3)", 0, "a value beside the set"),
        *labelled(r"\mathbb{R}", 0, "a value", r"x = 5, k \in \mathbb{R}", r"x = 5 \in \mathbb{R}"),
        (r"\mathbb{R}", r"x \in \mathbb{R}", 1, "membership"),
        (r"x\in\mathbb{R}, x\neq 2", r"x\ne 2, x\in\mathbb R", 1, "in another order"),
    ],
    "congruences": [
        *labelled(RESIDUE, 1, "spaces", r"x \equiv 5\pmod{7}", r"x\equiv 5\pmod 7"),
        *labelled(RESIDUE, 1, "another sign", r"x \equiv 5 \bmod 7", r"x\equiv5 (mod 7)"),
        *labelled(RESIDUE, 1, "layout", r"x\equiv 5\ (\mathrm{mod}\ 7)", r"5 \pmod 7"),
        *labelled(RESIDUE, 0, "another residue", r"x\equiv 4\pmod 7", r"x\equiv 12\pmod 7"),
        *labelled(RESIDUE, 0, "another modulus", r"x\equiv 5\pmod 8", r"x\equiv 5", "5"),
        *labelled(RESIDUE, 0, "another unknown", r"y\equiv 5\pmod 7"),
        (r"x\equiv 1, 3\pmod 8", r"x\equiv 3, 1\pmod{8}", 1, "two residues"),
        (r"x\equiv 1, 3\pmod 8", r"x\equiv 1\pmod{8}", 0, "one is missing"),
        ("5", r"12 \bmod 7", 0, "not worked out"),
    ],
    "several conditions and one set": [
        *labelled("2<x<3", 1, "both", r"x>2 \text{ and } x<3"),
        *labelled("2<x<3", 0, "either", "x>2 or x<3", "y>2 and y<3", "x>2 and y<3"),
        *labelled("[2,5)", 1, "both", r"x \ge 2 \text{ and } x < 5"),
        *labelled("x>1 and x<2", 1, "one interval", "(1,2)", r"x \in (1,2)"),
        *labelled(r"(0,1)\cup(2,\infty)", 1, "either", r"x\in(0,1) \text{ or } x\in(2,\infty)"),
        *labelled(r"(0,1)\cup(2,\infty)", 0, "both", r"x\in(0,1) \text{ and } x\in(2,\infty)"),
        *labelled(r"A \cup B", 1, "in another order", r"B \cup A"),
        *labelled(r"A \cup B", 0, "another set", r"A \cap B", r"A \cup C", r"A \cup A"),
        (r"\pm 4", r"\mp 4", 1, "both signs"),
        (r"x=\pm 4, y=\mp 3", r"x=\pm 4, y=\pm 3", 0, "other signs together"),
    ],
    "members more than once": [
        *labelled("3,3,5", 0, "not as often", "3,5,5", "3,3,5,5"),
        *labelled("3,3,5", 1, "in another order", "3,5,3"),
        *labelled("3,3,5", 1, "without multiplicities", "3,5", r"\{3,5\}"),
        *labelled(r"\{3,5\}", 1, "a set has each once", "3,5", r"\{3,3,5\}"),
        ("3,5", "3,3,5", 1, "with multiplicities"),
        *labelled("1,-2", 1, "with multiplicities", "1,1,-2", r"x=1, x=1, x=-2"),
        *labelled("(3,3)", 0, "a pair", "3", "(3)", r"\{3\}"),
        *labelled("(3,3,5)", 0, "a triple", "(3,5)", "3,5", "(3,5,5)"),
        *labelled("x=3, y=3", 0, "two unknowns", "x=3", "3"),
        ("(1,2), (3,4)", "(3,4), (1,2), (1,2)", 1, "a solution twice"),
    ],
    "what is no unit": [
        *labelled("13", 0, "denied", "13 incorrect", "13 invalid", "13 rejected", "13 unlikely"),
        *labelled("13", 0, "a bound", "13 max", "13 minimum"),
        *labelled("13", 0, "thousands and more", "13 grand", "13 mil", "13 bil"),
        *labelled(
            "13", 0, "thousands and more", "$13 K", "$13 M", r"\$13 \text{K}", "$13k", "13 M"
        ),
        *labelled("$13 M", 1, "one amount", "$13M", r"\$13 M"),
        *labelled("13", 1, "a unit", "13 min", "13 N", "13 CM", r"13 \text{ K}"),
        *labelled("13", 1, "what is counted", "13 different ways", "13 smaller cubes"),
        *labelled("13", 1, "what is counted", "13 invalid votes", "13 rejected items"),
        *labelled("13", 1, "what is counted", "13 uncertain outcomes", "13 lower floors"),
        *labelled("13", 1, "what is counted", "13 close friends", "13 possible outcomes"),
        *labelled("13", 1, "what is counted", "13 more apples", "13 wrong answers"),
        *labelled("13", 0, "denied", "13 ruled out", "13 possible", "13 more", "13 wrong"),
        *labelled("13", 0, "thousands and more", "13 mil dollars", "13 million dollars"),
    ],
    "times and dates in digits": [
        *labelled("12:30", 0, "no ratio", "2/5", "0.4", "4:10", "12/30"),
        *labelled("9:05", 1, "one time", "09:05", "The answer is 9:05."),
        *labelled("2024-01-01", 0, "no difference", "2022", "2024-01-02"),
        ("2024-04-05", "April 5, 2024", 1, "one date"),
        *labelled("2:3", 1, "a ratio", "4:6", "2/3"),
        *labelled("5:12", 1, "a ratio", "5/12", "5 : 12", "10:24"),
    ],
    "invisible characters": [
        *labelled("\ufeff13", 1, "a mark before it", "13"),
        *labelled("13\u200b", 1, "a space of no width", "13", "\u200b13 \ufeff"),
        *labelled("13\u200b", 0, "within the number", "1\u200b3"),
    ],
    "truths that are solutions": [
        *labelled(SOLUTION, 1, "the box", "13"),
        *labelled(SOLUTION, 0, "beside the box", "4"),
        *labelled(NOTE, 1, "the box", "even"),
        *labelled(NOTE, 0, "beside the box", "5"),
        ("The answer for n = 4 is below.\n#### 13", "13", 1, "after the mark"),
    ],
}
