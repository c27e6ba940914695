r"""Numbers with a Chinese unit or measure word: `13元`, `13 个`, `$13$ 厘米`.

Short runs of Han characters after a number are units, as English words are (`units`), but for those
that change the value (`13万`, `13多`) or name another (`13或`).
"""

import re

UNITS = {
    **{"米": "m", "厘米": "cm", "毫米": "mm", "千米": "km", "公里": "km", "分米": "dm"},
    **{"克": "g", "千克": "kg", "公斤": "kg", "毫克": "mg", "吨": "ton"},
    **{"升": "l", "毫升": "ml", "秒": "s", "秒钟": "s", "分钟": "min", "小时": "h"},
    **{"度": "degree", "元": "yuan", "块": "yuan", "块钱": "yuan", "人民币": "yuan"},
    **{"美元": "dollar", "欧元": "euro", "英镑": "GBP", "日元": "yen"},
    **{"天": "day", "周": "week", "年": "year"},
}
SQUARES = {"平方": "2", "立方": "3"}
# Words that only count what is asked for: 13 个 is 13.
MEASURES = frozenset("个只条张本件位名人次颗粒棵头辆台支枝块片根份种间座架艘匹")
CHANGING = re.compile(
    "[〇零一二两三四五六七八九十百千万亿兆半倍成折多余来几或和与及且以上下左右不非无点之负正约"
    "大小除乘加减方对双打组错否若如是到至等另]|分之|可能"
)
HAN = r"[\u4e00-\u9fff]"
WITH_UNIT = re.compile(
    rf"(?P<value>\$?\s*(?:[-+]?\s*[¥￥]?\s*\d[\d.,/ ]*|[-+]?\\d?frac\{{\d+\}}\{{\d+\}})\s*\$?)\s*"
    rf"(?:\\text\s*\{{\s*)?(?P<unit>{HAN}{{1,6}})\s*\}}?"
)


def split_han_unit(text: str) -> tuple[str, str | None]:
    r"""`text` with its Chinese unit in LaTeX, `5 厘米` as `5 \text{ cm}`; or without it, and with
    the Han word that it was, where that has no other name (a measure word has none either).

    A text that is no number with such a unit comes back as it is, with None.
    """
    match = WITH_UNIT.fullmatch(text) if len(text) <= 200 else None
    if match is None:
        return text, None
    value, unit = match["value"].replace("$", "").strip(), match["unit"]
    if unit in MEASURES and unit not in UNITS:
        return value, None
    power = SQUARES.get(unit[:2], "") if unit[2:] in UNITS else ""
    if (known := UNITS.get(unit[2:] if power else unit)) is not None:
        return rf"{value} \text{{ {known}}}" + (f"^{power}" if power else ""), None
    if CHANGING.search(unit) or len(unit) > 4:
        return text, None
    return value, unit
