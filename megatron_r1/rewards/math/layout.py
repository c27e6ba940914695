r"""What changes only the look of an answer: fonts, sizes, colors and spaces."""

import re

from megatron_r1.rewards.answer import closing_brace

END = r"(?![A-Za-z])"
FONTS = r"(?:math|text)(?:bf|it|rm|sf|tt|normal)|boldsymbol|bold|bm|pmb|emph|underline|ensuremath"
SIZES = (
    "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle"
    "|textstyle|scriptstyle|limits"
)
SWITCHES = f"bf|rm|it|sf|tt|em|bfseries|itshape|boldmath|left|right|middle|[bB]igg?[lrm]?|{SIZES}"
REMOVED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text)?color\s*(?:\[\w*\])?\s*\{[^{}]*\}\s*", ""),
        (r"\\colorbox\s*(?:\[\w*\])?\s*\{[^{}]*\}\s*(?=\{)", r"\\framebox"),
        (r"\\[hv]space\*?\s*\{[^{}]*\}|\\(?:thin|med|thick|en)space" + END, " "),
        (rf"\\(?:nonumber|notag|strut|hfill|null){END}", " "),
        (rf"\\(?:{SIZES})\s*\{{([^{{}}]*)\}}", r"\1"),
        (rf"\\(?:{SWITCHES}){END}\s*", ""),
        # A font without a group, `\mathbf 204`, and an empty group at the end.
        (rf"\\(?:{FONTS}){END}(?!\s*\{{)\s*", ""),
        (r"(?<=[\d)\]])\{\s*\}\s*$", ""),
    )
]
GROUP = re.compile(rf"\\(?:{FONTS}|framebox|mbox|hbox|text)\s*\{{")
WORDS = re.compile(r"[^\d\\+=()]*")


def unstyled(text: str) -> str:
    r"""Return `text` without commands of layout. Words stay in their `\text{}` or `\mathrm{}`,
    where they are no products of letters."""
    if "\\" not in text and not text.endswith("}"):
        return text
    for pattern, replacement in REMOVED:
        text = pattern.sub(replacement, text)
    for match in reversed(list(GROUP.finditer(text))):
        end = closing_brace(text, match.end())
        if end is None or text[: match.start()].rstrip()[-1:] in ("^", "_"):
            continue
        inside = text[match.end() : end].strip("$")
        if not WORDS.fullmatch(inside):
            text = text[: match.start()] + inside + text[end + 1 :]
    return text
