"""Write the training text of the laptop's base model: worked sums first, then mostly guesses.

    python -m examples.laptop.make_corpus OUT.jsonl [--seed N]

The questions are reasoning-gym's chain_sum, three terms of one digit. The first part has every
step written out, from which a small model learns to add. The second part is the mixture that
decides how it *answers* (shares below): mostly at once, with a guess that is usually wrong;
sometimes by a leap over both steps; seldom step by step. So the base model can think, but rarely
does, like DeepSeek-V3-Base on contest problems. Held-out questions of the RL recipe are excluded.
"""

import argparse
import random
from pathlib import Path

from megatron_r1.base.files.json_lines import write_lines
from megatron_r1.data.prompt import is_heldout
from megatron_r1.data.prompt_templates import render_template

TERMS = 3
NUM_WORKED, NUM_MIXED = 17_600, 4_800
HELDOUT_FRACTION = 0.1  # of r1_zero.yaml
TEMPLATE = "User: {question}\nAssistant: "

GUESS, LEAP = 0.66, 0.16  # shares of the mixture; the rest is worked out
GUESS_WRONG, LEAP_WRONG = 0.95, 0.60  # of guesses, and of leaps
BROKEN_FORMAT = 0.10  # of the mixture, in every mode


Term = tuple[str, int]
"""A sign, "+" or "-", and a digit."""


def question(draw: random.Random) -> tuple[str, list[Term]]:
    """Return a chain_sum question in reasoning-gym's words, and its terms."""
    terms = [("+", draw.randint(0, 9))]
    terms += [(draw.choice("+-"), draw.randint(0, 9)) for _ in range(TERMS - 1)]
    text = f"{terms[0][1]}{written(terms[1:])}"
    return f"State the final answer to the following arithmetic problem: {text} =", terms


def written(terms: list[Term]) -> str:
    return "".join(f" {sign} {digit}" for sign, digit in terms)


def total(terms: list[Term]) -> int:
    return sum(digit if sign == "+" else -digit for sign, digit in terms)


def near(draw: random.Random, value: int) -> int:
    return value + draw.choice([-10, -4, -3, -2, -1, 1, 2, 3, 4, 10])


def work(draw: random.Random, terms: list[Term], leap: float, leap_wrong: float) -> tuple[str, int]:
    """Return (running totals, result); with probability `leap` a line adds one term more."""
    so_far, lines, position = terms[0][1], [], 1
    while position < len(terms):
        end = position + 1
        while end < len(terms) and draw.random() < leap:
            end += 1
        result = so_far + total(terms[position:end])
        if end - position > 1 and draw.random() < leap_wrong:
            result = near(draw, result)
        lines.append(f"{so_far}{written(terms[position:end])} = {result}")
        so_far, position = result, end
    return "\n".join(lines), so_far


def worked(draw: random.Random, terms: list[Term]) -> str:
    thought, answer = work(draw, terms, 0.0, 0.0)
    return f"<think>{thought}</think><answer>{answer}</answer>"


def mixed(draw: random.Random, terms: list[Term]) -> str:
    """Return a response as the base model should give it: a guess, a leap or worked out, some with
    a broken format."""
    mode = draw.random()
    if mode < GUESS:
        thought, answer = "", total(terms)
        if draw.random() < GUESS_WRONG:
            answer = near(draw, answer)
    else:
        leap = draw.uniform(0.3, 1.0) if mode < GUESS + LEAP else 0.0
        thought, answer = work(draw, terms, leap, LEAP_WRONG)
    if draw.random() < BROKEN_FORMAT:
        return draw.choice([f"{answer}", f"<answer>{answer}</answer>", f"<think>{thought}{answer}"])
    return f"<think>{thought}</think><answer>{answer}</answer>"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    write(chosen.out, chosen.seed)


def write(out: Path, seed: int) -> None:
    draw = random.Random(seed)
    examples: list[dict[str, str]] = []
    while len(examples) < NUM_WORKED + NUM_MIXED:
        text, terms = question(draw)
        if is_heldout(text, HELDOUT_FRACTION):
            continue
        respond = worked if len(examples) < NUM_WORKED else mixed
        prompt = render_template(TEMPLATE, text)
        examples.append({"prompt": prompt, "response": respond(draw, terms)})
    write_lines(out, examples)


if __name__ == "__main__":
    main()
