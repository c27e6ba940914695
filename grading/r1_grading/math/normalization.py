"""One spelling for mathematics: Unicode, LaTeX layout and plain text all become simple LaTeX.

Only characters with one meaning are translated. Any other character outside ASCII (a Cyrillic С, a
circled ①, a zero-width space) is refused by the comparison, so look-alikes never match.
`strip_styling` removes what changes only the look of an answer: fonts, sizes, colors and spaces."""

import re
import unicodedata
from collections.abc import Callable

from r1_grading.reading.tags_and_boxes import closing_brace, delimiters_enclose

Replacement = str | Callable[[re.Match[str]], str]


def _vulgar_fraction(character: str) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf" \frac{{{top}}}{{{bottom}}}"


def _format_matrix(match: re.Match[str]) -> str:
    kind = "pmatrix" if match[1] == "(" else "bmatrix"
    return rf"\begin{{{kind}}}{match[2]}\end{{{kind}}}"


def _format_modulus(match: re.Match[str]) -> str:
    return rf"\pmod{{{(match[1] or match[2] or '').strip()}}}"


COMMANDS = {
    "∕": "/", "⁄": "/", "÷": "/", "−": "-", "‐": "-", "–": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "±": r"\pm ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "⩽": r"\leq ",
    "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "…": r"\ldots ", "′": "'", "’": "'",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
    "θ": r"\theta ", "λ": r"\lambda ", "µ": r"\mu ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ",
    "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "、": ",", "￥": "¥",
    "⟨": r"\langle ", "⟩": r"\rangle ", "℃": "°C", "℉": "°F",
    **dict.fromkeys("\t\n\r\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
    # Full-width forms of ! to ~ are the ASCII characters 0xFEE0 below them.
    **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},
    **{c: _vulgar_fraction(c) for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
}  # fmt: skip
TRANSLATION = str.maketrans(COMMANDS)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]"}

BASE_WORDS = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16},
}
# `1A_{\\text{sixteen}}`, `(101)_2` and `101 (base 2)` are one spelling of a number to a base.
BASES: list[tuple[str, Replacement]] = [
    (
        r"(?<=[\dA-F)])\s*(?:\\text\s*\{)?\s*\(?\s*base[\s-]*(\w+)\s*\)?\s*\}?\s*$",
        r"_{\1}",
    ),
    (r"(?<=\d)_(\d\d)(?!\d)", r"_{\1}"),
    (r"_\s*\{\s*\((\d+)\)\s*\}", r"_{\1}"),
    (
        rf"_\s*\{{\s*(?:\\text\s*\{{)?\s*({'|'.join(BASE_WORDS)})\s*\}}?\s*\}}",
        lambda match: f"_{{{BASE_WORDS[match[1]]}}}",
    ),
    (r"(?:\((?=[\dA-F]+\))|\\text\s*\{(?=[\dA-F]+\}))([\dA-F]+)[)}](?=_)", r"\1"),
]

# Applied in this order. `\\` ends a row of a matrix: it is matched first and kept.
LATEX_SPELLINGS: tuple[tuple[str, Replacement], ...] = (
    (
        r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]|\\\\\*|\\(?:cr|tabularnewline|newline)(?![A-Za-z])",
        r"\\\\",
    ),
    (r"(\\\\)|\\(?:[,;: ]|q?quad(?![A-Za-z]))|~", lambda match: match[1] or " "),
    (r"(\\\\)|\\!\s*", lambda match: match[1] or ""),
    (r"(\\\\)|\\\|", lambda match: match[1] or "|"),
    (r"\\hline(?![A-Za-z])", ""),
    (
        r"\\begin\{cases\}([^&]*?)\\end\{cases\}",
        lambda match: match[1].replace(r"\\", ", "),
    ),
    (r"([(\[])\s*\\begin\{smallmatrix\}(.*?)\\end\{smallmatrix\}\s*[)\]]", _format_matrix),
    (r"\\(begin|end)\s*\{([pb]?)smallmatrix\}", r"\\\1{\2matrix}"),
    (r"\\(p?matrix)\s*\{([^{}]*)\}", r"\\begin{\1}\2\\end{\1}"),
    (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
    (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
    (r"\\lbrack(?![A-Za-z])", "["),
    (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:mathrm|mathit|mathbf|mathsf|text(?:bf|it|rm|sf|normal)|mbox)\s*(?=\{)", r"\\text"),
    # Constants and the differential may be set upright.
    (r"\\text\s*\{\s*([eid])\s*\}", r" \1 "),
    (r"\\text\s*\{[\s,]*(and|or)\s*\}", r" \1 "),
    # `where k \in \mathbb{Z}`, and the same in brackets, state a domain after a comma.
    (
        r"[\s,]{0,9}(?:\\text\s*\{\s*)?\b(?:where|with|for(?: (?:all|any|some|every))?)\b[\s}]{0,9}"
        r"(?=[A-Za-z]\s*\\in(?![A-Za-z]))",
        ", ",
    ),
    (r"\(\s*([A-Za-z]\s*\\in\s*\\mathbb\s*\{[A-Z]\})\s*\)$", r", \1"),
    # `5 (mod 7)`, `5 \bmod 7` and `5\pmod 7`.
    (r"\(\s*(?:\\text\s*\{\s*mod\s*\}|\\?mod(?![A-Za-z]))\s*(\w+)\s*\)", r"\\pmod{\1}"),
    (r"\(\s*\\bmod(?![A-Za-z])\s*(\w+)\s*\)", r"\\pmod{\1}"),
    (r"\\[pb]?mod(?![A-Za-z])\s*(?:\{([^{}]*)\}|(\w+))", _format_modulus),
    (r"\\text\s*\{\s*\}", ""),
    (r"\\text\s*\{\s*([+-]?[\d.,]+)\s*\}", r"\1"),
    (r"\\(?:vee|lor)(?![A-Za-z])", " or "),
    (r"\\(?:wedge|land)(?![A-Za-z])", " and "),
    # `1{,}000`: in braces LaTeX puts no space after the comma.
    (r"(?<=\d)\{\s*,\s*\}(?=\d{3}(?!\d))", ""),
    (r"\{\s*,\s*\}", ","),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\le(?:qslant|qq?)?(?![A-Za-z])|<=", r"\\leq "),
    (r"\\ge(?:qslant|qq?)?(?![A-Za-z])|>=", r"\\geq "),
    (r"\\neq?(?![A-Za-z])|\\not\s*=|!=", r"\\neq "),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r":=|≔", "="),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
    (
        r"(?:°|\\text\s*\{\s*degrees?|\bdegrees?)\s*(?:\\text\s*\{)?\s*([CFK])(?:elsius|ahrenheit)?\s*(?:\}|$)",
        r"°\1",
    ),
    (r"\\celsius(?![A-Za-z])", "°C"),
    *BASES,
    (r"_\s*(\w)", r"_{\1}"),
    # To base ten a number is itself; to another one it is compared as text (`same_expression`).
    (r"(?<![\w}.])([-+]?[\d.,]*\d)\s*_\s*\{\s*10\s*\}", r"\1"),
    (r"\^\s*(\d+)", r"^{\1}"),
    (r"\^\s*-\s*(\d+)", r"^{-\1}"),
    (r"\\frac\s*\\pi(?![A-Za-z])\s*", r"\\frac{\\pi}"),
    (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\])(sqrt|pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1"),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    (r"\s+", " "),
)
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in LATEX_SPELLINGS]
PLAIN_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
OPENING_ROUND = re.compile(r"(\\sqrt|\^)\s*\(")


def normalize_latex(text: str) -> str:
    """Return `text` in the spelling that the comparison reads; no text is an error.

    Linear, except for nested roots with round brackets."""
    if PLAIN_NUMBER.fullmatch(text):
        return text  # as most answers are
    if not text.isascii():
        text = re.sub("[√∛](\\d*)", _format_root, text)
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
        text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
        text = text.translate(TRANSLATION)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # twice escaped
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return _strip_braces(_round_to_curly(text).strip())


def _strip_braces(text: str) -> str:
    """Return `text` without braces around all of it that only group, as in `{204}`.

    The braces of the set `{1, 4}` stay."""
    while delimiters_enclose("{", "}", text) and not re.search("[,;]", text):
        text = text[1:-1].strip()
    return text


def _format_root(match: re.Match[str]) -> str:
    return ROOTS[match[0][0]] + (f"{{{match[1]}}}" if match[1] else "")


def _round_to_curly(text: str) -> str:
    r"""Write `\sqrt(2)` and `x^(n+1)` with the braces of LaTeX."""
    while (match := OPENING_ROUND.search(text)) is not None:
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        content = text[match.end() : end - 1]
        text = f"{text[: match.start()]}{match[1]}{{{content}}}{text[end:]}"
    return text


COMMAND_END = r"(?![A-Za-z])"
FONTS = r"(?:math|text)(?:bf|it|rm|sf|tt|normal)|boldsymbol|bold|bm|pmb|emph|underline|ensuremath"
SIZE_COMMANDS = (
    "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle"
    "|textstyle|scriptstyle|limits"
)
SWITCHES = (
    f"bf|rm|it|sf|tt|em|bfseries|itshape|boldmath|left|right|middle|[bB]igg?[lrm]?|{SIZE_COMMANDS}"
)
REMOVED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text)?color\s*(?:\[\w*\])?\s*\{[^{}]*\}\s*", ""),
        (r"\\colorbox\s*(?:\[\w*\])?\s*\{[^{}]*\}\s*(?=\{)", r"\\framebox"),
        (r"\\[hv]space\*?\s*\{[^{}]*\}|\\(?:thin|med|thick|en)space" + COMMAND_END, " "),
        (rf"\\(?:nonumber|notag|strut|hfill|null){COMMAND_END}", " "),
        (rf"\\(?:{SIZE_COMMANDS})\s*\{{([^{{}}]*)\}}", r"\1"),
        (rf"\\(?:{SWITCHES}){COMMAND_END}\s*", ""),
        # A font without a group, `\mathbf 204`, and an empty group at the end.
        (rf"\\(?:{FONTS}){COMMAND_END}(?!\s*\{{)\s*", ""),
        (r"(?<=[\d)\]])\{\s*\}\s*$", ""),
    )
]
GROUP = re.compile(rf"\\(?:{FONTS}|framebox|mbox|hbox|text)\s*\{{")
LEADING_WORDS = re.compile(r"[^\d\\+=()]*")


def strip_styling(text: str) -> str:
    r"""Return `text` without commands of layout.

    Words stay in their `\text{}` or `\mathrm{}`, where they are no products of letters."""
    if "\\" not in text and not text.endswith("}"):
        return text
    for pattern, replacement in REMOVED:
        text = pattern.sub(replacement, text)
    for match in reversed(list(GROUP.finditer(text))):
        end = closing_brace(text, match.end())
        if end is None or text[: match.start()].rstrip()[-1:] in ("^", "_"):
            continue
        content = text[match.end() : end].strip("$")
        if not LEADING_WORDS.fullmatch(content):
            text = text[: match.start()] + content + text[end + 1 :]
    return text
