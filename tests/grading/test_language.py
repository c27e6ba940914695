"""Language consistency against words that were segmented by hand, and against ways to hide some."""

import asyncio
import random
import re

import pytest
from r1_grading import RewardPool
from r1_grading.reading import chain_of_thought
from r1_grading.reading.languages import count_words, split_prose
from r1_grading.response_rewards import grade_language as grade

# Segmented by hand; punctuation left out.
CHINESE = (
    "嗯 我们 先 看 一下 这个 问题",
    "题目 要求 我们 求出 满足 条件 的 所有 整数",
    "首先 设 这个 数 为 三 位 数 那么 它 的 各 位 数字 之 和 是 十二",
    "我们 可以 把 问题 分成 两 种 情况 来 讨论",
    "等 一下 我 好像 漏掉 了 一 种 情况 再 重新 检查 一 遍",
    "如果 个位 是 零 那么 交换 之后 就 不 是 三 位 数 了",
    "因此 一共 有 七 个 满足 条件 的 数",
    "通过 归纳法 可以 证明 这个 不等式 对 所有 自然数 都 成立",
)
ENGLISH = (
    "Okay so we first look at the problem",
    "The task asks us to find all integers that satisfy the condition",
    "Wait it seems that we have missed one case and should check again",
    "By induction the inequality holds for all natural numbers",
)


def think(text):
    return f"<think>{text}</think><answer>13</answer>"


def test_a_mix_counts_as_if_the_words_were_segmented_by_hand():
    rng = random.Random(0)
    differences = []
    for _ in range(200):
        chinese = rng.choices(CHINESE, k=rng.randint(1, 8))
        english = rng.choices(ENGLISH, k=rng.randint(1, 8))
        clauses = [line.replace(" ", "") for line in chinese] + english
        rng.shuffle(clauses)
        num_chinese = sum(len(line.split()) for line in chinese)
        num_english = sum(len(line.split()) for line in english)
        share = grade(think("，".join(clauses)), target="zh").reward
        differences.append(share - num_chinese / (num_chinese + num_english))
    assert max(map(abs, differences)) < 0.08
    assert abs(sum(differences) / len(differences)) < 0.05


def test_the_shares_of_both_languages_add_up_to_1():
    text = think("先算 the first number，然后 add the second。")
    shares = [grade(text, target=target).reward for target in ("en", "zh")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.2


@pytest.mark.parametrize(
    "neutral",
    [
        "$x^2 + \\text{where } y$",
        "$$\na = b\n$$",
        "\\(a\\)",
        "\\[\n\\int f\n\\]",
        "\\begin{align*}a &= b\\end{align*}",
        "\\begin{equation}a = \\begin{cases}1\\end{cases}\\end{equation}",
        "\\frac{1}{2}",
        "`sorted`",
        "```python\nimport sys\nprint(sys.argv)  # all arguments\n```",
        "https://example.org/path?q=word",
        "x_1 max_len np.array leftSum run() e.g.",
        "sin(x) log2 sinθ αβ Δx µm",
        "5 km/h 10cm 3rd 1,000.5 2x 1e5",
        "x y, z",
        "DNA",
        "😀 → ≤ —",
    ],
)
@pytest.mark.parametrize(("target", "text"), [("en", "then we add"), ("zh", "然后我们加起来")])
def test_code_formulae_and_numbers_are_neutral(target, text, neutral):
    assert grade(think(f"{text} {neutral} {text}"), target=target).reward == 1.0, split_prose(
        neutral
    )


@pytest.mark.parametrize(
    "hidden", ["he\u200bll\u00ado", "h\u0337e\u0337llo", "ｈｅｌｌｏ", "heⅼⅼo"]
)
def test_marks_and_other_forms_of_letters_hide_no_word(hidden):
    assert grade(think(f"好的好的，{hidden}"), target="zh").reward < 1


@pytest.mark.parametrize(
    "disguise",
    [
        "```\nthe answer is then seven because we add three and four\n```",
        "$the answer is then seven because we add three and four$",
        "theansweristhensevenbecauseweaddthreeandfour",
        "the_answer_is_then_seven_because_we_add_three",
        "theAnswerIsThenSevenBecauseWeAddThreeAndFour",
        "t h e a n s w e r i s t h e n s e v e n b e c a u s e",
        "THE ANSWER IS THEN SEVEN",
    ],
)
def test_prose_in_disguise_counts(disguise):
    assert grade(think(f"好。{disguise}"), target="zh").reward < 0.35


SPOKEN = ENGLISH[1].split() + ENGLISH[3].lower().split()


@pytest.mark.parametrize(
    "wrapped",
    [
        [f"`{word}`" for word in SPOKEN],
        [f"`{' '.join(SPOKEN[i : i + 7])}`" for i in range(0, len(SPOKEN), 7)],
        [f"$\\text{{{' '.join(SPOKEN[i : i + 7])}}}$" for i in range(0, len(SPOKEN), 7)],
        [f"$x = \\text{{{' '.join(SPOKEN[i : i + 7])}}}$" for i in range(0, len(SPOKEN), 7)],
        [f"${word}$" for word in SPOKEN],
        ["_".join(SPOKEN[i : i + 3]) for i in range(0, len(SPOKEN), 3)],
        [".".join(SPOKEN[i : i + 3]) for i in range(0, len(SPOKEN), 3)],
        ["".join(word.title() for word in SPOKEN[i : i + 3]) for i in range(0, len(SPOKEN), 3)],
        [f"{word}()" for word in SPOKEN],
        ["https://" + "/".join(SPOKEN)],
        ["```\n" + "".join(f"{word}({word}) = {word} # {word}\n" for word in SPOKEN) + "```"],
    ],
    ids=lambda wrapped: wrapped[0][:24],
)
def test_a_thought_in_another_language_cannot_be_wrapped_until_it_is_neutral(wrapped):
    chinese = "好的，我们先看一下这个问题，再逐步检查每一种情况。"
    assert grade(think(f"{chinese} {wrapped[0]}"), target="zh").reward > 0.5
    assert grade(think(f"{chinese} {' '.join(wrapped * 12)}"), target="zh").reward < 0.35


def test_what_an_explanation_names_stays_neutral():
    sentence = (
        "我们用 `max_len` 记录目前为止最长的长度，再遍历 np.array 的元素，最后调用 run() 输出。"
    )
    program = "```python\n" + "for item in items:\n    total += item.value\n" * 12 + "```"
    assert grade(think(sentence * 30), target="zh").reward == 1.0
    assert grade(think(sentence * 6 + program), target="zh").reward == 1.0


def test_words_that_only_stand_in_code_earn_nothing():
    assert grade(think("`first` `we` `add` " * 50), target="en").reward == 0.0


def test_prices_are_no_formula():
    words = count_words(split_prose("It costs $5 and the other one costs $10 in all").text)
    assert words.en == 9


def test_a_look_alike_letter_makes_a_word_foreign():
    assert count_words("hello hеllo").other_scripts == 1
    assert grade(think("сначала складываем, 먼저 더한다"), target="en").reward == 0.0


def test_japanese_is_not_chinese():
    words = count_words("二つの数を足す。两个数")
    assert words.other_scripts > words.zh > 0


@pytest.mark.parametrize(
    ("response", "thought_opened", "thought"),
    [
        ("<think>a</think>b", False, "a"),
        ("a</think>b", True, "a"),
        ("a", True, "a"),
        ("<think>a", False, "a"),
        ("x<think>a</think>b<think>c</think>d", False, "a b c"),
        ("<think>a</think>b</think>c", False, "a b"),
        ("a", False, None),
        ("a</think>b", False, None),
        ("<think></think>", False, ""),
    ],
)
def test_the_thought_is_what_the_tags_enclose(response, thought_opened, thought):
    found = chain_of_thought(response, thought_opened)
    assert thought is found is None or " ".join(found.split()) == thought


def test_what_is_said_outside_the_thought_does_not_count():
    assert grade("好的好的<think>we add</think>好的好的", target="en").reward == 1.0


@pytest.mark.parametrize("response", ["", "we add", "<think></think>13", think("2 + 11 = 13")])
def test_without_words_to_judge_there_is_no_reward(response):
    assert grade(response, target="en").reward == 0.0


@pytest.mark.parametrize("target", ["fr", "", None, ["en"], 3])
def test_another_target_is_an_error(target):
    with pytest.raises(ValueError, match="target.*en, zh.*" + re.escape(repr(target))):
        grade(think("a"), target=target)


@pytest.mark.more
def test_much_of_anything_is_graded_within_the_limits():
    """Of memory; and of time, which quadratic work would take a hundred times of."""
    units = ["the quick brown fox ", "我们先算，", "a", "$a ", "`", "```", "\\[", "$$ ", "a_", "A "]
    units += ["\\begin{a}", "a'", "ｈ", "の", "\u0301\u0323", "aB", "1.", "a b "]
    responses = ["<think>" + unit * (150_000 // len(unit.encode())) for unit in units]
    responses.append("<think>" + "the sum 和 x_1, `a` $b$ " * 20_000)

    async def all_of_them():
        async with RewardPool(1, timeout_seconds=100, memory_limit_bytes=2**30) as pool:
            jobs = (pool.grade("language", text, None, target="en") for text in responses)
            return await asyncio.gather(*jobs), pool.snapshot()

    grades, counts = asyncio.run(all_of_them())
    assert counts["graded"] == len(responses), [grade.reason for grade in grades]
    assert grades[0].reward == 1.0 and grades[1].reward == 0.0
    assert 0.5 < grades[-1].reward < 0.9


def morse(word):
    table = {"e": ".", "t": "-", "a": ".-", "i": "..", "n": "-.", "s": "...", "o": "---"}
    return " ".join(table.get(letter, "-..-") for letter in word)


CIPHERS = {
    "letters and commas": lambda word: ",".join(word),
    "letters and full stops": lambda word: ".".join(word),
    "letters and hyphens": lambda word: "-".join(word),
    "letters in code": lambda word: f"`{' '.join(word)}`",
    "letters in a formula": lambda word: f"${', '.join(word)}$",
    "commands": lambda word: "\\" + word,
    "commands in a formula": lambda word: f"$\\{word}$",
    "after numbers": lambda word: f"1{word[:3]}",
    "circled": lambda word: "".join(chr(0x24D0 + ord(c) - 97) for c in word),
    "in brackets": lambda word: "".join(chr(0x249C + ord(c) - 97) for c in word),
    "squared": lambda word: "".join(chr(0x1F130 + ord(c) - 97) for c in word),
    "negative squared": lambda word: "".join(chr(0x1F170 + ord(c) - 97) for c in word),
    "regional": lambda word: "".join(chr(0x1F1E6 + ord(c) - 97) for c in word),
    "tags": lambda word: "".join(chr(0xE0000 + ord(c)) for c in word),
    "variation selectors": lambda word: "".join(chr(0xE0100 + ord(c)) for c in word),
    "mathematical": lambda word: "".join(chr(0x1D44E + ord(c) - 97) for c in word),
    "entities": lambda word: "".join(f"&#{ord(c)};" for c in word),
    "entities, twice": lambda word: "".join(f"&amp;#x{ord(c):x};" for c in word),
    "braille": lambda word: "".join(chr(0x2801 + ord(c) - 97) for c in word),
    "emoji": lambda word: "".join(chr(0x1F600 + ord(c) - 97) for c in word),
    "operators": lambda word: "".join(chr(0x2200 + ord(c) - 97) for c in word),
    "morse": morse,
    "morse in a formula": lambda word: f"${morse(word)}$",
    "Greek letters": lambda word: " ".join(chr(0x3B1 + (ord(c) - 97) % 24) for c in word),
}


@pytest.mark.parametrize("cipher", CIPHERS)
def test_no_other_way_to_spell_a_language_is_neutral_without_bound(cipher):
    spelled = " ".join(CIPHERS[cipher](word.lower()) for word in SPOKEN)
    assert grade(think(f"{spelled * 8} 好"), target="zh").reward < 0.2


HONEST = {
    "arithmetic": "我们把 (3+4)*(5-2) 算出来，(3+4)*(5-2) = 7*3 = 21，再加 4，得 21+4=25。",
    "variables": "设 x 为第一个数，y 为第二个数，则 x + y = 13，所以 y = 13 - x，代入得 x = 5。",
    "Greek": "设角 α 和 β 满足 α + β = π，那么 β = π - α，于是 sin α = sin β。",
    "formulae": "由 $x^2 + 2x + 1 = (x+1)^2$ 得到 $x = -1$，所以方程只有一个解。",
    "display": "于是\n\\[ \\frac{a+b}{2} \\geq \\sqrt{ab} \\]\n当且仅当 $a = b$ 时等号成立。",
    "LaTeX without dollars": "所以 \\frac{1}{2} \\times \\sqrt{x} \\leq \\alpha，因此结论成立。",
    "list": "步骤如下：\n1. **第一步**：计算总和。\n2. **第二步**：求平均值。\n- 检查一下。\n",
    "table": "| 项目 | 数量 |\n|---|---|\n| 苹果 | 13 |\n| 橘子 | 12 |\n所以一共是 25 个。",
    "emoji": "好的，这一步是对的 ✅，我们继续往下算 😊。",
    "points": "在等腰三角形 ABC 中，两条腰 AB 和 AC 相等，点 D 是底边 BC 的中点，所以 AD ⊥ BC。",
    "code": "用 `dp[i][j] = max(dp[i-1][j], dp[i][j-1])` 更新状态，最后输出结果即可。",
}


@pytest.mark.parametrize("kind", HONEST)
def test_honest_chinese_with_its_symbols_keeps_its_reward(kind):
    assert grade(think(HONEST[kind] * 20), target="zh").reward > 0.95
