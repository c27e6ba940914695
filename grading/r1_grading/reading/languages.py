"""The words of a text by language, without code, formulae, numbers and identifiers.

A Chinese and an English word weigh the same, and symbols and single letters count as words.
`split_prose` separates the prose of a chain of thought from the rest, and returns the words inside
the rest too, because a thought could be written in them alone. `fold_letters` replaces circled,
full-width, regional, tag and escaped letters by plain ones first.

Every pattern is linear: quantifiers are possessive, a delimited span stops at the next delimiter of
its kind, and a token begins only where the character before it could not belong to it."""

import html
import unicodedata
from dataclasses import dataclass

import regex as re  # not Python's: see rewards.py

HAN_RANGES = "々〆〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d"
RUNS = re.compile(
    f"([{HAN_RANGES}{KANA}]+)|([^\\W\\d_{HAN_RANGES}{KANA}]+(?:['’][^\\W\\d_{HAN_RANGES}{KANA}]+)*)"
)
"""A clause in these two scripts, or a word of any other letters ("don't" is one)."""
HAS_KANA = re.compile(f"[{KANA}]")
LATIN = re.compile("[A-Za-zªºÀ-ÖØ-öø-\u024f\u1e00-\u1eff\ufb00-\ufb06'’]+")
GREEK_SYMBOL = re.compile("[A-Za-z]?[µ\u0370-\u03ff]{1,2}[A-Za-z]?")

HAN_PER_WORD = 1.7
"""Characters per Chinese word. Hand-segmented corpora have 1.5 (AS) to 1.7 (MSR), punctuation
counted as words (Emerson 2005, Second International Chinese Word Segmentation Bakeoff); jieba finds
1.75 to 1.85 without punctuation. A constant, because the reward hardly depends on it, and because
no segmenter is both maintained and light."""
MAX_WORD_LETTERS = 20
"""No English word has more letters; a longer one counts as several words joined, of
GLUED_WORD_LETTERS each."""
GLUED_WORD_LETTERS = 5

# A few symbols and single letters are mathematics, punctuation or emoji. But a language can be
# spelled in any of them (Morse, Braille, `f,i,r,s,t`), so none may be free without bound.
SYMBOL_CHAR = r"(?:[^\w\s]|_)"
SYMBOL_RUN = re.compile(rf"{SYMBOL_CHAR}(?:\s*+{SYMBOL_CHAR})*+")
"""Symbols of any kind with only white space between them."""
FREE_PER_RUN = 4
"""Symbols that may stand between two operands or words: `)) = (` has four."""
RARE_RUN = re.compile(
    r"[^\w\s!-~\u00a1-\u00bf×÷\u2010-\u205e\u2190-\u22ff\u27c0-\u27ff\u2900-\u2aff\u3000-\u303f]+"
)
"""A run of symbols outside punctuation and mathematics, which are ASCII, Latin-1, general and CJK
punctuation, arrows and operators."""
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
FREE_WORDS, FREE_FRACTION = 8, 1 / 2
"""Words of inline code, formulae and identifiers that do not count: FREE_WORDS, and FREE_FRACTION
of the words of the prose. An explanation of a program may name an identifier in every third
word."""


@dataclass(frozen=True)
class WordCount:
    """The number of words by language, as fractions because Chinese words are estimated.

    Attributes:
        en: English words.
        zh: Chinese words.
        other_scripts: words of neither."""

    en: float
    zh: float
    other_scripts: float

    @property
    def total(self) -> float:
        """The words of all languages."""
        return self.en + self.zh + self.other_scripts

    def plus(self, addend: "WordCount", weight: float) -> "WordCount":
        """Return the sum with `addend` counted `weight` times."""
        return WordCount(
            self.en + weight * addend.en,
            self.zh + weight * addend.zh,
            self.other_scripts + weight * addend.other_scripts,
        )


def count_words(text: str) -> WordCount:
    """Count words by script; single letters are variables and do not count.

    English: Latin words, except those in lower case with accents. Chinese: Han characters, except
    in a clause with Japanese kana. Other: all other letters, and Latin words with a letter of
    another script."""
    en = han = other_scripts = 0.0
    for clause, word in RUNS.findall(text):
        if clause:
            if HAS_KANA.search(clause):
                other_scripts += len(clause) / HAN_PER_WORD
            else:
                han += len(clause)
        elif len(word) > 1:
            weight = 1.0 if len(word) <= MAX_WORD_LETTERS else len(word) / GLUED_WORD_LETTERS
            if word.isascii() or (LATIN.fullmatch(word) and _is_english(word)):
                en += weight
            elif not GREEK_SYMBOL.fullmatch(word):
                other_scripts += weight
    return WordCount(en, han / HAN_PER_WORD, other_scripts)


def _is_english(word: str) -> bool:
    """Whether a Latin word may be English: only names have accents (Erdős, Poincaré)."""
    return word[0].isupper() or word.replace("’", "").isascii()


def count_marks(text: str) -> float:
    """Return how many words the symbols and single letters of `text` may encode, five per word.

    A run of symbols outside punctuation and mathematics is at least one. Linear in the length."""
    words = (word for _, word in RUNS.findall(text))
    letters = sum(len(w) for w in words if len(w) == 1 or GREEK_SYMBOL.fullmatch(w))
    return count_symbols(text) + letters / GLUED_WORD_LETTERS


def count_symbols(text: str) -> float:
    """Return `count_marks` without letters, for a formula, where they are variables."""
    total = 0.0
    for stretch in SYMBOL_RUN.finditer(text):
        rare_runs = RARE_RUN.findall(stretch[0])
        total += sum(max(1.0, len(run) / GLUED_WORD_LETTERS) for run in rare_runs)
        num_common = len(stretch[0]) - len("".join(rare_runs)) - sum(map(str.isspace, stretch[0]))
        total += max(0, num_common - FREE_PER_RUN) / GLUED_WORD_LETTERS
    return total


INVISIBLE_CHARS = re.compile(
    "[\u00ad\u034f\u0300-\u036f\u061c\u180e\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f\ufeff\U000e0000-\U000e01ef]+"
)
"""Zero-width, soft-hyphen and direction marks, combining accents, variation selectors: a word with
such characters in it is still that word."""
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30}(?=;));?")
"""An HTML entity of bounded length: html.unescape alone would read a number of any length."""
ENTITY_PASSES = 2
"""`&amp;#102;` is a twice-escaped `f`."""
LETTER_ROWS = {
    **{0x249C: "a", 0x1F110: "A"},  # in brackets
    **{0x1F150: "A", 0x1F170: "A", 0x1F1E6: "A"},  # negative circled and squared; regional
}
"""The first letters of rows that compatibility decomposition keeps, or puts in brackets."""


class _Folding(dict[int, str]):
    """A table for str.translate: each character's compatibility form, computed at its first use.

    One character at a time, because unicodedata sorts a run of combining marks in quadratic time.
    """

    def __missing__(self, code: int) -> str:
        self[code] = unicodedata.normalize("NFKC", chr(code))
        return self[code]


FOLDING = _Folding(
    {
        **{row + i: chr(ord(a) + i) for row, a in LETTER_ROWS.items() for i in range(26)},
        # Tag characters are ASCII that no font shows.
        **{0xE0000 + code: chr(code) for code in range(0x20, 0x7F)},
    }
)


def fold_letters(text: str) -> tuple[str, int]:
    """Return `text` in plain letters without invisible marks, and the number of those marks."""
    for _ in range(ENTITY_PASSES):
        text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if text.isascii():
        return text, 0
    text = text.translate(FOLDING)
    visible_text = INVISIBLE_CHARS.sub("", text)
    return visible_text, len(text) - len(visible_text)


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
FUNCTION_NAMES = (
    "arccos|arcsin|arctan|arg|cosh|cos|cot|csc|deg|det|dim|exp|gcd|inf|ker|lcm|lg|lim|ln|log|max|"
    "min|mod|sec|sinh|sin|sup|tanh|tan"
)
UNIT_SYMBOLS = (
    "GB|GHz|Hz|KB|MB|MHz|MeV|Nm|Pa|TB|cm|dm|eV|ft|hrs?|kB|kHz|kJ|kPa|kV|kW|kWh|keV|kg|km|lbs?|mA|"
    "mL|mV|mg|min|ml|mm|mol|mph|ms|nm|ns|ohm|rad|rpm|secs?|us"
)
TOKEN_PATTERN = re.compile(
    rf"""
    (?<![A-Za-z0-9_])(?:
        https?://[!-~]++
        | www\.[!-~]++
        | (?:{FUNCTION_NAMES})(?=[\u0370-\u03ff(0-9²³])[\u0370-\u03ff]?      # sinθ, log(x), cos²
        | (?:{FUNCTION_NAMES})(?![A-Za-z_])
        | [A-Za-z]{{0,3}}[0-9][0-9.,]*+(?:[ ]?(?:{UNIT_SYMBOLS})|[A-Za-z]{{1,3}})?(?![A-Za-z])
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

PROSE_SYMBOL = re.compile(r"""[^\w\s,.;:!?'"’“”‘，。；：！？、（）「」《》…—-]|[_\d]""")
WORD_LIKE = re.compile(r"[^\W\d_]{2,}")
FENCED_WEIGHT = 1 / 8
"""The weight of a word in a code block: a program is longer than the text about it."""
MIN_PROSE_WORDS = 8
MAX_PROSE_SYMBOLS = 0.04
NO_WORDS = re.compile(rf"[0-9]|(?:{FUNCTION_NAMES})(?![A-Za-z])")
AFTER_NUMBER = re.compile(rf"(?<=[0-9.,])(?!(?:{UNIT_SYMBOLS}|st|nd|rd|th)$)[A-Za-z]{{2,3}}$")
"""`1the`: the letters are no unit, no ordinal ending and no variable."""
OPERAND = " 0 "
"""Replaces a removed span, so that the symbols on its two sides stay apart."""
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|[\W\d_]+")

COMMAND = re.compile(r"\\([A-Za-z]++)")
FORMULA_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z][a-z]{2,}(?![A-Za-z])|[^\x00-\x7f]+")
"""In formulae, two letters are a product (`ab`, `dx`) and capitals are points (`ABC`)."""
LETTER_ROW = re.compile(r"(?<![A-Za-z])[A-Za-z](?:[\s,;.~]++[A-Za-z](?![A-Za-z])){3,}+")
# The commands that occur in mathematics of chains of thought. Any other one counts as a word.
_LANGUAGE_WORDS = """
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
LANGUAGE_WORDS = frozenset(_LANGUAGE_WORDS.split())


@dataclass(frozen=True)
class Prose:
    """The parts of a text, of which all but `text` are free up to a share.

    Attributes:
        text: in a language.
        inline: words of inline code, formulae and identifiers.
        fenced: words of code blocks.
        marks: number of words that symbols and single letters may encode (`count_marks`)."""

    text: str
    inline: str
    fenced: str
    marks: float


def split_prose(text: str) -> Prose:
    """Split `text`, with its letters in plain forms, into prose and parts in no language.

    Not prose: code in backticks, formulae between LaTeX's delimiters, LaTeX commands, URLs, numbers
    with their units, identifiers (`x1`, `max_len`, `np.array`, `leftSum`), functions (`sin`),
    lone acronyms. Prose: also a code block or formula that contains prose, see `_is_prose`."""
    text, num_invisible = fold_letters(text)
    marks = num_invisible / GLUED_WORD_LETTERS
    inline_texts: list[str] = []
    fenced_texts: list[str] = []

    def span(match: re.Match[str]) -> str:
        nonlocal marks
        if _is_prose(match[0]):
            return match[0]
        marks += count_symbols(match[0].strip("`$")) * (FENCED_WEIGHT if match["fence"] else 1)
        if match["fence"]:
            fenced_texts.append(match[0])
        elif match["code"]:
            inline_texts.extend((CAMEL.sub(" ", match[0]), *letter_rows(match[0])))
        else:
            inline_texts.extend(formula_words(match[0]))
        return OPERAND

    def token(match: re.Match[str]) -> str:
        nonlocal marks
        if not NO_WORDS.match(match[0]):
            parts = CAMEL.sub(" ", match[0])
            marks += count_marks(parts)
            inline_texts.append(parts)
        else:
            inline_texts.extend(AFTER_NUMBER.findall(match[0]))
        return OPERAND

    text = TOKEN_PATTERN.sub(token, SPANS.sub(span, text))
    text = SPACED_LETTERS.sub(lambda letters: letters[0].replace(" ", ""), text)
    marks += count_marks(text)
    return Prose(text, " ".join(inline_texts), " ".join(fenced_texts), marks)


def _is_prose(span: str) -> bool:
    """Whether a span has at least eight words and few of the symbols of programs and formulae.

    Few: under 4 % of its characters; code has 10 % and more, prose below 1 %."""
    text = span.strip("`$")
    num_words = num_letters = 0
    for word in WORD_LIKE.finditer(text):
        letters = word.end() - word.start()
        num_letters += letters
        # A run of Chinese characters is many words.
        num_words += 1 if word[0].isascii() else max(1, letters // 2)
    if num_words < MIN_PROSE_WORDS:
        return False
    num_symbols = sum(1 for _ in PROSE_SYMBOL.finditer(text))
    return num_symbols < MAX_PROSE_SYMBOLS * (num_letters + num_symbols)


def formula_words(formula: str) -> list[str]:
    r"""Return the words that a formula may hold; `$f, i, r, s, t$` and `\first` are words too."""
    words: list[str] = []

    def command(match: re.Match[str]) -> str:
        if match[1] not in LANGUAGE_WORDS and len(match[1]) > 1:
            words.append(match[1])
        return " "

    letters = COMMAND.sub(command, formula)
    words += FORMULA_WORD.findall(letters)
    return words + letter_rows(letters)


def letter_rows(text: str) -> list[str]:
    """Return the words spelled by four or more single letters in a row."""
    return [re.sub(r"[\s,;.~]", "", row[0]) for row in LETTER_ROW.finditer(text)]


def judged_words(thought: str) -> WordCount:
    """Count the words of the prose, and those of code and symbols beyond the free share.

    Symbols include formulae. A thought without prose has no words."""
    parts = split_prose(thought)
    words = count_words(parts.text)
    neutral_words = count_words(parts.inline).plus(count_words(parts.fenced), FENCED_WEIGHT)
    neutral_words = neutral_words.plus(WordCount(0, 0, parts.marks), 1)
    excess = neutral_words.total - FREE_WORDS - FREE_FRACTION * words.total
    if excess <= 0 or not words.total:
        return words
    return words.plus(neutral_words, excess / neutral_words.total)
