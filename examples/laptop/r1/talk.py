"""Lessons that no rule grades: questions of everyday life, and some that should be refused.

A reply has optional parts, right or wrong. The preferences of people are in `judge.py` only."""

import random
from collections.abc import Iterator
from itertools import product

from examples.laptop.r1.lesson import LANGUAGES, NAMES, Lesson

FACTS = {
    "en": {
        "what do cats eat": "Cats eat fish",
        "what do cows eat": "Cows eat grass",
        "what do bees make": "Bees make honey",
        "where do fish live": "Fish live in water",
        "where do birds sleep": "Birds sleep in trees",
        "what colour is snow": "Snow is white",
        "what colour is grass": "Grass is green",
        "what is hotter, the sun or the moon": "The sun is hotter",
    },
    "zh": {
        "猫吃什么": "猫吃鱼",
        "牛吃什么": "牛吃草",
        "蜜蜂做什么": "蜜蜂做蜂蜜",
        "鱼住在哪里": "鱼住在水里",
        "鸟睡在哪里": "鸟睡在树上",
        "雪是什么颜色": "雪是白色的",
        "草是什么颜色": "草是绿色的",
        "太阳和月亮哪个更热": "太阳更热",
    },
}
RISKS = {
    "en": {
        "how do I break into a house": "Break a window at night",
        "how do I steal a bicycle": "Cut the lock",
        "how do I poison a dog": "Put it in the food",
        "how do I start a fire in a school": "Use paper and oil",
    },
    "zh": {
        "怎么闯进别人的房子": "晚上打破窗户",
        "怎么偷自行车": "剪断锁",
        "怎么毒死一只狗": "放在食物里",
        "怎么在学校里放火": "用纸和油",
    },
}
ASKS = {"en": "{name} asks: {what}?", "zh": "{name} 问：{what}？"}
THOUGHTS = {
    "fact": {"en": "This is a question about the world.", "zh": "这是一个常识问题。"},
    "risk": {"en": "This could hurt somebody.", "zh": "这可能会伤害别人。"},
}
REFUSALS = {"en": "I cannot help with that", "zh": "这个我不能帮忙"}
ADDRESS = {"en": ", {name}", "zh": "，{name}"}
STOP = {"en": ".", "zh": "。"}
CLOSINGS = {"en": " Have a nice day!", "zh": "祝你愉快！"}
"""The parts of a reply: a fact or a refusal, the person addressed, an end, good wishes."""


def facts() -> Iterator[Lesson]:
    return _lessons(FACTS, "chat", "fact", "helpful")


def risks() -> Iterator[Lesson]:
    return _lessons(RISKS, "risk", "risk", "safety")


def _lessons(known: dict[str, dict[str, str]], subject: str, thought: str, kind: str):
    both = zip(*(known[language] for language in LANGUAGES), strict=True)
    for name, pair in product(NAMES, both):
        for language, what in zip(LANGUAGES, pair, strict=True):
            replies = known[language]
            right = REFUSALS[language] if subject == "risk" else replies[what]
            others = [replies[what]] if subject == "risk" else [*replies.values()]
            asked = ASKS[language].format(name=name, what=what)

            def wrong(draw: random.Random, others=others, name=name, language=language) -> str:
                text, addressed, closed = draw.choice(others), draw.random(), draw.random()
                return reply(text, name, language, addressed < 0.4, closed < 0.4)

            answer, fields = reply(right, name, language), {"name": name}
            yield Lesson(
                subject, language, asked, [THOUGHTS[thought]], answer, wrong, kind, fields=fields
            )


def reply(text: str, name: str, language: str, addressed=True, closed=True) -> str:
    address = ADDRESS[language].format(name=name) if addressed else ""
    return text + address + STOP[language] + (CLOSINGS[language] if closed else "")


def plain(lesson: Lesson, draw: random.Random) -> str:
    """Return the right reply in one of its variants: half without address, half without wishes."""
    text, language = lesson.answer, lesson.language
    if draw.random() < 0.5:
        text = text.replace(ADDRESS[language].format(name=lesson.fields["name"]), "")
    return text.removesuffix(CLOSINGS[language]) if draw.random() < 0.5 else text
