r"""Separate the prose of a chain of thought from code, formulae, numbers and identifiers.

Words inside those are returned too, because a thought could be written in them alone.

Every pattern is linear: quantifiers are possessive, a delimited span stops at the next delimiter of
its kind, and a token begins only where the character before it could not belong to it."""

from dataclasses import dataclass

import regex as re  # not Python's: see rewards/__init__.py

from megatron_r1.rewards.language.folding import fold
from megatron_r1.rewards.language.words import GLUED_WORD_LETTERS, count_marks, count_symbols

SPANS = re.compile(
    r"""
    (?P<fence>```(?:[^`]|`(?!``))*+```)                             # fenced code
    | (?P<code>(?<!`)`[^`\n]++`(?!`))                               # inline code
    | \$\$[^$]++\$\$
    | (?<![\\$])\$(?=[^\s$])(?:[^$\\\n]|\\.)++(?<=\S)\$(?![\d$])    # never "$5 and $10"
    | \\\((?:[^\\]|\\[^()])*+\\\)
    | \\\[(?:[^\\]|\\[^\[\]])*+\\\]
    | \\begin\{(?P<name>[a-z]{1,20}\*?)\}(?:[^\\]|\\(?!begin\{|end\{))*+\\end\{(?P=name)\}
    | \\(?:begin|end)\{[A-Za-z]{1,20}\*?\}                          # of a nested environment
    | \\[A-Za-z]++\*?                                               # a command outside a formula
    """,
    re.VERBOSE,
)
FUNCTIONS = (
    "arccos|arcsin|arctan|arg|cosh|cos|cot|csc|deg|det|dim|exp|gcd|inf|ker|lcm|lg|lim|ln|log|max|"
    "min|mod|sec|sinh|sin|sup|tanh|tan"
)
UNITS = (
    "GB|GHz|Hz|KB|MB|MHz|MeV|Nm|Pa|TB|cm|dm|eV|ft|hrs?|kB|kHz|kJ|kPa|kV|kW|kWh|keV|kg|km|lbs?|mA|"
    "mL|mV|mg|min|ml|mm|mol|mph|ms|nm|ns|ohm|rad|rpm|secs?|us"
)
TOKENS = re.compile(
    rf"""
    (?<![A-Za-z0-9_])(?:
        https?://[!-~]++
        | www\.[!-~]++
        | (?:{FUNCTIONS})(?=[\u0370-\u03ff(0-9²³])[\u0370-\u03ff]?      # sinθ, log(x), cos²
        | (?:{FUNCTIONS})(?![A-Za-z_])
        | [A-Za-z]{{0,3}}[0-9][0-9.,]*+(?:[ ]?(?:{UNITS})|[A-Za-z]{{1,3}})?(?![A-Za-z])
        | [A-Za-z][a-z]*+(?:[A-Z][a-z]++){{1,3}}(?![A-Za-z])            # camelCase, at most 4 parts
        | [A-Za-z]++(?:[_.][A-Za-z0-9]++){{1,3}}(?![A-Za-z0-9_])        # snake_case, np.array, e.g.
        | [A-Za-z]++\(\)                                                # a call
        | (?<![A-Z]\W)(?<![A-Z]\W\W)[A-Z]{{2,5}}(?![A-Za-z])(?!\W{{1,2}}[A-Z]{{2}})   # DNA, BFS
    )
    """,
    re.VERBOSE,
)
SPACED_LETTERS = re.compile(r"(?<![^\W_])[A-Za-z](?:[ ][A-Za-z](?![^\W_])){4,}+")
"""Spaced letters, which as single letters would count as variables."""

SYMBOL = re.compile(r"""[^\w\s,.;:!?'"’“”‘，。；：！？、（）「」《》…—-]|[_\d]""")
WORD_LIKE = re.compile(r"[^\W\d_]{2,}")
FENCED_WEIGHT = 1 / 8
"""The weight of a word in a code block: a program is longer than the text about it."""
MIN_PROSE_WORDS = 8
MAX_PROSE_SYMBOLS = 0.04
NO_WORDS = re.compile(rf"[0-9]|(?:{FUNCTIONS})(?![A-Za-z])")
AFTER_NUMBER = re.compile(rf"(?<=[0-9.,])(?!(?:{UNITS}|st|nd|rd|th)$)[A-Za-z]{{2,3}}$")
"""`1the`: the letters are no unit, no ordinal ending and no variable."""
OPERAND = " 0 "
"""Replaces a removed span, so that the symbols on its two sides stay apart."""
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|[\W\d_]+")

COMMAND = re.compile(r"\\([A-Za-z]++)")
FORMULA_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])|[^\x00-\x7f]+")
"""In formulae, two letters are a product (`ab`, `dx`) and capitals are points (`ABC`)."""
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


@dataclass(frozen=True)
class Prose:
    """The parts of a text, of which all but `text` are free up to a share.

    text: in a language. inline: words of inline code, formulae and identifiers. fenced: words of
    code blocks. marks: number of words that symbols and single letters may encode (`count_marks`).
    """

    text: str
    inline: str
    fenced: str
    marks: float


def prose(text: str) -> Prose:
    """Split `text`, with its letters in plain forms, into prose and parts in no language.

    Not prose: code in backticks, formulae between LaTeX's delimiters, LaTeX commands, URLs, numbers
    with their units, identifiers (`x1`, `max_len`, `np.array`, `leftSum`), functions (`sin`),
    lone acronyms. Prose: also a code block or formula that contains prose, see `_is_prose`."""
    text, num_invisible = fold(text)
    marks = num_invisible / GLUED_WORD_LETTERS
    inline: list[str] = []
    fenced: list[str] = []

    def span(match: re.Match[str]) -> str:
        nonlocal marks
        if _is_prose(match[0]):
            return match[0]
        marks += count_symbols(match[0].strip("`$")) * (FENCED_WEIGHT if match["fence"] else 1)
        if match["fence"]:
            fenced.append(match[0])
        elif match["code"]:
            inline.extend((CAMEL.sub(" ", match[0]), *letter_rows(match[0])))
        else:
            inline.extend(formula_words(match[0]))
        return OPERAND

    def token(match: re.Match[str]) -> str:
        nonlocal marks
        if not NO_WORDS.match(match[0]):
            parts = CAMEL.sub(" ", match[0])
            marks += count_marks(parts)
            inline.append(parts)
        else:
            inline.extend(AFTER_NUMBER.findall(match[0]))
        return OPERAND

    text = TOKENS.sub(token, SPANS.sub(span, text))
    text = SPACED_LETTERS.sub(lambda letters: letters[0].replace(" ", ""), text)
    marks += count_marks(text)
    return Prose(text, " ".join(inline), " ".join(fenced), marks)


def _is_prose(span: str) -> bool:
    """Whether a span has at least eight words and few of the symbols of programs and formulae.

    Few: under 4 % of its characters; code has 10 % and more, prose below 1 %."""
    inside = span.strip("`$")
    num_words = num_letters = 0
    for word in WORD_LIKE.finditer(inside):
        letters = word.end() - word.start()
        num_letters += letters
        # A run of Chinese characters is many words.
        num_words += 1 if word[0].isascii() else max(1, letters // 2)
    if num_words < MIN_PROSE_WORDS:
        return False
    num_symbols = sum(1 for _ in SYMBOL.finditer(inside))
    return num_symbols < MAX_PROSE_SYMBOLS * (num_letters + num_symbols)


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
