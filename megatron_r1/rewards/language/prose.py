r"""What of a chain of thought is prose: everything but code, formulae, numbers and identifiers.

Words that stand in those are kept apart, because a thought could be written in them alone.

Every pattern is linear: quantifiers are possessive, a delimited span stops at the next delimiter of
its kind, and a token begins only where the character before it could not belong to it.
"""

import re
from dataclasses import dataclass

# Zero-width, soft-hyphen and direction marks; combining accents; variation selectors: a word that
# is sprinkled with them is still that word.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u0300-\u036f\u061c\u180e\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\ufeff\U000e0000-\U000e01ef]+"
)
FULL_WIDTH = re.compile("[！-～]")
TO_HALF_WIDTH = {code: code - 0xFEE0 for code in range(ord("！"), ord("～") + 1)}

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
# Letters set apart, which as single letters would pass for variables.
SPACED_LETTERS = re.compile(r"(?<![^\W_])[A-Za-z](?:[ ][A-Za-z](?![^\W_])){4,}+")

SYMBOL = re.compile(r"""[^\w\s,.;:!?'"’“”‘，。；：！？、（）「」《》…—-]|[_\d]""")
WORD_LIKE = re.compile(r"[^\W\d_]{2,}")
MIN_PROSE_WORDS = 8
MAX_PROSE_SYMBOLS = 0.04
COMMAND = re.compile(r"\\[A-Za-z]++")
# In formulae, two letters are a product (`ab`, `dx`) and capitals are points (`ABC`).
FORMULA_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])|[^\x00-\x7f]+")
NO_WORDS = re.compile(rf"[0-9]|(?:{FUNCTIONS})(?![A-Za-z])")
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|[\W\d_]+")


@dataclass(frozen=True)
class Prose:
    """text: what is in a language. Neutral, but not without bound: `inline`, the words of inline
    code, of formulae and of identifiers; `fenced`, those of code blocks."""

    text: str
    inline: str
    fenced: str


def prose(text: str) -> Prose:
    """`text` without what belongs to no language, and with its letters in their plain forms.

    Left out: code in backticks, formulae between LaTeX's delimiters, LaTeX commands, URLs, numbers
    with their units, identifiers (`x1`, `max_len`, `np.array`, `leftSum`), functions (`sin`),
    lone acronyms. Kept: a code block or formula that is prose in disguise, see `_is_prose`.
    """
    text = INVISIBLE.sub("", text)
    if FULL_WIDTH.search(text):
        text = text.translate(TO_HALF_WIDTH)
    inline: list[str] = []
    fenced: list[str] = []

    def span(match: re.Match) -> str:
        if _is_prose(match[0]):
            return match[0]
        if match["fence"]:
            fenced.append(match[0])
        elif match["code"]:
            inline.append(CAMEL.sub(" ", match[0]))
        else:
            inline.extend(FORMULA_WORD.findall(COMMAND.sub(" ", match[0])))
        return " "

    def token(match: re.Match) -> str:
        if not NO_WORDS.match(match[0]):
            inline.append(CAMEL.sub(" ", match[0]))
        return " "

    text = TOKENS.sub(token, SPANS.sub(span, text))
    text = SPACED_LETTERS.sub(lambda letters: letters[0].replace(" ", ""), text)
    return Prose(text, " ".join(inline), " ".join(fenced))


def _is_prose(span: str) -> bool:
    """Whether a span has eight words and more, and next to none of the symbols that a program or a
    formula has (under 4 % of its characters; code has 10 % and more, prose below 1 %)."""
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
