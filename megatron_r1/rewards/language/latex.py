r"""Find words written in a formula: three or more letters, rows of letters, unknown commands."""

import re

COMMAND = re.compile(r"\\([A-Za-z]++)")
# In formulae, two letters are a product (`ab`, `dx`) and capitals are points (`ABC`).
FORMULA_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])|[^\x00-\x7f]+")
LETTER_ROW = re.compile(r"(?<![A-Za-z])[A-Za-z](?:[\s,;.~]++[A-Za-z](?![A-Za-z])){3,}+")
# The commands that occur in mathematics of chains of thought. Any other one counts as a word.
_KNOWN = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi
    pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma
    Upsilon Phi Psi Omega frac dfrac tfrac cfrac sqrt sum prod int iint iiint oint lim limsup
    liminf max min sup inf log ln lg exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh
    tanh gcd lcm det dim ker deg arg Pr mod bmod pmod cdot times div pm mp ast star circ bullet
    oplus otimes odot leq geq le ge lt gt neq ne approx equiv sim simeq cong propto ll gg in ni
    notin subset subseteq supset supseteq cup cap bigcup bigcap setminus emptyset varnothing
    infty partial nabla forall exists nexists neg lnot land lor wedge vee top bot to gets mapsto
    rightarrow leftarrow leftrightarrow Rightarrow Leftarrow Leftrightarrow implies impliedby
    iff longrightarrow Longrightarrow uparrow downarrow left right middle big Big bigg Bigg bigl
    bigr Bigl Bigr biggl biggr lfloor rfloor lceil rceil langle rangle lvert rvert lVert rVert
    vert Vert mid nmid parallel perp angle triangle square degree prime hat bar tilde vec dot
    ddot overline underline widehat widetilde overbrace underbrace overrightarrow stackrel
    overset underset binom dbinom tbinom choose boxed fbox text textbf textit textrm mathrm
    mathbf mathit mathsf mathbb mathcal mathfrak mathscr operatorname boldsymbol mbox begin end
    hline quad qquad ldots cdots vdots ddots dots displaystyle textstyle limits nolimits
    substack tag label because therefore ell hbar Re Im aleph checkmark
"""
KNOWN = frozenset(_KNOWN.split())


def formula_words(formula: str) -> list[str]:
    r"""Return the words that a formula may hold; `$f, i, r, s, t$` and `\first` are words too."""
    words: list[str] = []

    def command(match: re.Match[str]) -> str:
        if match[1] not in KNOWN and len(match[1]) > 1:
            words.append(match[1])
        return " "

    rest = COMMAND.sub(command, formula)
    words += FORMULA_WORD.findall(rest)
    return words + letter_rows(rest)


def letter_rows(text: str) -> list[str]:
    """Return the words spelled by four or more single letters in a row."""
    return [re.sub(r"[\s,;.~]", "", row[0]) for row in LETTER_ROW.finditer(text)]
