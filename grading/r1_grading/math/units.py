"""Units of answers, English and Chinese.

A unit is text after (or, for money, before) a value that does not change it. One that only one side
has is ignored; two different units are two different answers, without conversion. Words that scale
a value (`million`, `dozen`) or join values (`or`) are no units."""

import re

from r1_grading.reading.context import DENYING

# Spellings of one unit, the canonical one first.
_UNIT_SPELLINGS = """
    m meter metre | cm centimeter centimetre | mm millimeter millimetre | km kilometer kilometre |
    in inch inche | ft foot feet | yd yard | mi mile | g gram gramme | kg kilogram | mg milligram |
    lb pound | l L liter litre | ml mL milliliter millilitre | s sec second | min minute |
    h hr hour | ° deg degree | rad radian | mph | km/h | kmh | m/s | rpm | Hz | kHz | MHz | J | kJ |
    N | W | kW | V | A | K | Pa | kPa | mol | eV | $ dollar USD US$ | € euro EUR | £ GBP | ¢ cent |
    ¥ yuan | yen | ₹ | rupee
"""
CANONICAL_UNITS = {
    word: words[0] for words in map(str.split, _UNIT_SPELLINGS.split("|")) for word in words
}
# Words that change the value, or name another one: `13 million`, `13 or less`, `13 squared`.
_NO_UNITS = """
    hundred thousand million billion trillion lakh crore dozen score half halves third quarter
    fourth fifth sixth tenth hundredth millionth billionth trillionth doubled tripled halved
    quadruple gross doz kilo mega giga milli micro nano ppm ppb bps basis mille permille reciprocal
    inverse debt loss off never th thousandth double triple twice time pair couple percent pct or
    and not maybe perhaps possibly about approximately around approx roughly nearly almost ish
    versus vs unless least most than over under above below up plus minus squared cubed factorial
    mod modulo base binary to but either any all none no is are if else zero one two three four five
    six seven eight nine ten eleven twelve pi e i inf infinity sqrt sin cos tan ln log exp divided
    multiplied power root mil bil tril mio mrd
"""
NO_UNITS = frozenset((*_NO_UNITS.split(), "square root"))
# No units either where they end the text: words that deny the value, bounds, `grand`.
# Before a noun they describe what is counted: `13 invalid votes`, `13 different ways`.
_NOT_COUNTED = """
    invalid excluded denied rejected refuted out dismissed discarded disproved unlikely doubtful
    possible dubious impossible inaccurate imprecise unsure uncertain unverified nope nah max
    maximum minimum tops grand
"""
NOT_COUNTED = NO_UNITS.union(_NOT_COUNTED.split(), DENYING.split())

HAN_UNITS = {
    **{"米": "m", "厘米": "cm", "毫米": "mm", "千米": "km", "公里": "km", "分米": "dm"},
    **{"克": "g", "千克": "kg", "公斤": "kg", "毫克": "mg", "吨": "ton"},
    **{"升": "l", "毫升": "ml", "秒": "s", "秒钟": "s", "分钟": "min", "小时": "h"},
    **{"度": "degree", "元": "yuan", "块": "yuan", "块钱": "yuan", "人民币": "yuan"},
    **{"美元": "dollar", "欧元": "euro", "英镑": "GBP", "日元": "yen"},
    **{"天": "day", "周": "week", "年": "year"},
}
HAN_POWERS = {"平方": "2", "立方": "3"}
# Measure words only count, as in 13 个, which is 13.
MEASURE_WORDS = frozenset("个只条张本件位名人次颗粒棵头辆台支枝块片根份种间座架艘匹")
# Characters that change the value (`13万`, `13多`) or name another one (`13或`).
CHANGES_VALUE = re.compile(
    "[〇零一二两三四五六七八九十百千万亿兆半倍成折多余来几或和与及且以上下左右不非无点之负正约"
    "大小除乘加减方对双打组错否若如是到至等另]|分之|可能"
)
HAN_CHAR = r"[\u4e00-\u9fff]"
HAN_UNIT = re.compile(
    rf"(?P<value>\$?\s*(?:[-+]?\s*[¥￥]?\s*\d[\d.,/ ]*|[-+]?\\d?frac\{{\d+\}}\{{\d+\}})\s*\$?)\s*"
    rf"(?:\\text\s*\{{\s*)?(?P<unit>{HAN_CHAR}{{1,6}})\s*\}}?"
)
POWER = r"(?:\s*\^\s*\{\s*[23]\s*\})?"
UNIT_WORDS = r"[A-Za-z]+(?:\.)?(?:[ /-]+[A-Za-z]+){0,3}"
TEXT_UNIT = re.compile(
    rf"(?P<value>.*?)\s*\\text\s*\{{\s*(?P<unit>{UNIT_WORDS}|[€£¥₹¢])\s*(?:\^\s*\{{?([23])\}}?)?\s*\}}(?P<power>{POWER})"
)
PLAIN_UNIT = re.compile(
    rf"(?P<value>.*?[\d)}}])(?P<space>\s*)(?P<unit>{UNIT_WORDS})(?P<power>{POWER})"
)
SYMBOL_UNIT = re.compile(r"(?P<value>.*?)\s*(?P<unit>°\s*[CFK]?|\\?\$|[€£¥₹¢])")
MONEY_FIRST = re.compile(
    r"(?P<sign>-?)\s*(?P<unit>(?:US)?\\?\$|[€£¥₹]|USD|EUR|GBP)\s*(?P<value>[\d.].*)"
)
SCALED_NUMBER = re.compile(
    r"(?P<number>[\d.,]*\d)\s*(?:\\text\s*\{\s*)?(?P<scale>[kKmMbBtT][mMnN]?)\s*\}?"
)
r"""An amount in thousands, millions or billions, the `13 K` of `\$13 K`."""
ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))(?![A-Za-z])\s*[({]?\s*(\d{1,4})\s*°\s*[)}]?")
PLAIN_VALUE = re.compile(r"[-+]?\s*[\d.,/ ]*\d\.?|[-+]?\s*(?:\d+\s*)?\\frac\{\d+\}\{\d+\}")


def split_han_unit(text: str) -> tuple[str, str | None]:
    r"""Split a number from its Chinese unit or measure word: `13元`, `13 个`, `$13$ 厘米`.

    A known unit stays in the text as LaTeX, `5 厘米` as `5 \text{ cm}`, and is returned as None.
    Other short Han words are returned as the unit; measure words are dropped. Any other text is
    returned unchanged, with None."""
    match = HAN_UNIT.fullmatch(text) if len(text) <= 200 else None
    if match is None:
        return text, None
    value, unit = match["value"].replace("$", "").strip(), match["unit"]
    if unit in MEASURE_WORDS and unit not in HAN_UNITS:
        return value, None
    power = HAN_POWERS.get(unit[:2], "") if unit[2:] in HAN_UNITS else ""
    if (latin_unit := HAN_UNITS.get(unit[2:] if power else unit)) is not None:
        return rf"{value} \text{{ {latin_unit}}}" + (f"^{power}" if power else ""), None
    if CHANGES_VALUE.search(unit) or len(unit) > 4:
        return text, None
    return value, unit


def split_unit(text: str) -> tuple[str, str | None]:
    """Split a spelled answer into its value and its canonical unit (None if it has none)."""
    if (match := MONEY_FIRST.fullmatch(text)) is not None:
        value = match["value"]
        if (scaled_match := SCALED_NUMBER.fullmatch(value)) is not None:  # 13 K, and not 13 kelvin
            value = rf"{scaled_match['number']} \cdot {scaled_match['scale']}"
        return match["sign"] + value, _canonical_unit(match["unit"].replace("\\", ""))
    match = SYMBOL_UNIT.fullmatch(text)
    if match is not None and match["value"] and not ANGLE_FUNCTION.search(match["value"]):
        return match["value"], _canonical_unit(re.sub(r"[\\\s]", "", match["unit"]))
    if (match := TEXT_UNIT.fullmatch(text)) is not None and match["value"]:
        unit = _read_unit(match["unit"], (match["power"] or "") + (match[3] or ""))
        if unit is not None:
            return match["value"], unit
    match = PLAIN_UNIT.fullmatch(text)
    if match is not None and PLAIN_VALUE.fullmatch(match["value"]):
        unit = _read_unit(match["unit"], match["power"])
        # `5m` is five times m; `5 m` and `5cm` are lengths.
        if unit is not None and (len(match["unit"]) > 1 or match["space"]):
            return match["value"], unit
    return text, None


def degrees_to_radians(text: str) -> str:
    r"""Return `\tan 30°` as `\tan(\frac{30\pi}{180})`, which a parser reads."""
    return DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", text)


def same_unit(left: str | None, right: str | None) -> bool:
    """Whether two units agree; a missing unit agrees with any."""
    return left is None or right is None or left == right


def is_unit(word: str) -> bool:
    """Return whether a word is a known unit, in the singular or plural."""
    return any(form in CANONICAL_UNITS for form in _word_forms(word))


def _read_unit(words: str, power: str) -> str | None:
    is_one = any(form in CANONICAL_UNITS for form in _word_forms(words)[:2])
    parts = [words] if is_one else [part for part in re.split(r"[ /.-]+", words) if part]
    if any(not NO_UNITS.isdisjoint(_word_forms(part)[1:]) for part in parts):
        return None
    if not NOT_COUNTED.isdisjoint(_word_forms(parts[-1])[1:]):
        return None
    exponent = "".join(digit for digit in power if digit.isdigit())
    for prefix, number in (("sq", "2"), ("square", "2"), ("cu", "3"), ("cubic", "3")):
        if parts[0].lower() == prefix and len(parts) > 1:
            parts, exponent = parts[1:], number
    names = [_canonical_unit(part) for part in parts]
    is_known = all(
        part.lower() == "per" or any(f in CANONICAL_UNITS for f in _word_forms(part))
        for part in parts
    )
    if not is_known and any(len(part) < 3 for part in parts if part.lower() not in ("of", "per")):
        return None  # `5 ab` may be five times a times b
    return "/".join(name for name in names if name != "per") + exponent


def _canonical_unit(word: str) -> str:
    default = word.lower().removesuffix("s") if len(word) > 3 else word
    return next(
        (CANONICAL_UNITS[form] for form in _word_forms(word) if form in CANONICAL_UNITS), default
    )


def _word_forms(word: str) -> tuple[str, str, str]:
    if len(word) == 1:  # `13 M` is 13 million, or molar, but not 13 m
        return word, word, word
    return word, word.lower(), word.lower().removesuffix("s")
