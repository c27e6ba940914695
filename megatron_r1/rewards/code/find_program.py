"""Extract the program of a response: the last fenced code block of its answer."""

import re

from megatron_r1.rewards.answer import ANSWER, END_ANSWER, Extraction, after_thought, extract

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
MAX_ANSWER_CHARS, MAX_PROGRAM_CHARS = 2**20, 2**18


def find_program(response: str, *, opened: bool = False) -> Extraction:
    """Return the last fenced block after the thought, inside `<answer>` if there is one.

    There is no program in a thought that is not closed, in two <answer> blocks, without a fence, or
    where the last fence is not closed. The fence's language is ignored, and the fence's indentation
    is removed from its lines. Linear in the length of the response.
    """
    visible = after_thought(response, opened)
    if visible is None:
        return Extraction(None, "no program found: the thought is never closed")
    if ANSWER in visible or END_ANSWER in visible:
        extraction = extract(response, opened=opened)
        if extraction.text is None:
            return extraction
        visible = extraction.text
    if len(visible) > MAX_ANSWER_CHARS:
        return Extraction(None, f"the answer is too long: {len(visible)} characters")
    program, is_open = _last_block(visible)
    if is_open:
        return Extraction(None, "no program found: the last fenced block is not closed")
    if program is None or not program.strip():
        return Extraction(None, "no program found: no fenced block")
    if len(program) > MAX_PROGRAM_CHARS:
        return Extraction(None, f"the program is too long: {len(program)} characters")
    return Extraction(program)


def _last_block(text: str) -> tuple[str | None, bool]:
    """Return the last complete fenced block (CommonMark), and whether one is open at the end."""
    program: str | None = None
    lines: list[str] = []
    fence = indent = ""
    for line in text.split("\n"):
        match = FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match and not ("`" in match[3] and match[2][0] == "`"):
                indent, fence, lines = match[1], match[2], []
        elif match and match[2].startswith(fence) and not match[3].strip():
            program, fence = "\n".join(lines) + "\n", ""
        else:
            lines.append(line.removeprefix(indent))
    return program, bool(fence)
