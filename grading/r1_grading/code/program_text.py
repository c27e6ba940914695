"""Finds the program in the text of a response."""

import re

from r1_grading.reading.tags_and_boxes import (
    ANSWER,
    END_ANSWER,
    Extraction,
    after_thought,
    extract_answer,
    without_special_tokens,
)

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
NO_PROGRAM = ("text", "txt", "plaintext", "output", "console", "json", "md", "markdown")
"""Languages of fences around what a program reads or prints."""
PROMPTS, SYNTAX = (">>> ", "$ "), "(=:;{"
"""How lines of an interactive session begin, and the signs: a program has at least one of them."""
MAX_ANSWER_CHARS, MAX_PROGRAM_CHARS = 2**20, 2**18


def find_program(response: str, *, thought_opened: bool = False) -> Extraction:
    """Return the last fenced block after the thought, inside `<answer>` if there is one.

    Blocks behind a program that only show its output or calls do not count.

    There is no program in a thought that is not closed, in two <answer> blocks, without a fence, or
    where the last fence is not closed. Which language a fence names does not matter otherwise, and
    its indentation is removed from its lines. Special tokens at the end of the response are
    ignored. Linear in the length of the response."""
    visible_text = after_thought(without_special_tokens(response), thought_opened)
    if visible_text is None:
        return Extraction(None, "no program found: the thought is never closed")
    if ANSWER in visible_text or END_ANSWER in visible_text:
        extraction = extract_answer(response, thought_opened=thought_opened)
        if extraction.text is None:
            return extraction
        visible_text = extraction.text
    if len(visible_text) > MAX_ANSWER_CHARS:
        return Extraction(None, f"the answer is too long: {len(visible_text)} characters")
    program, is_open = _last_block(visible_text)
    if is_open:
        return Extraction(None, "no program found: the last fenced block is not closed")
    if program is None or not program.strip():
        return Extraction(None, "no program found: no fenced block")
    if len(program) > MAX_PROGRAM_CHARS:
        return Extraction(None, f"the program is too long: {len(program)} characters")
    return Extraction(program)


def _is_output(tag: str, lines: list[str]) -> bool:
    """Return whether a block behind a program shows what it prints, or calls at a prompt."""
    if tag in NO_PROGRAM or next(filter(None, map(str.strip, lines)), "").startswith(PROMPTS):
        return True
    return not tag and not any(sign in line for line in lines for sign in SYNTAX)


def _last_block(text: str) -> tuple[str | None, bool]:
    """Return the last complete fenced block (CommonMark), and whether one is open at the end."""
    program: str | None = None
    lines: list[str] = []
    fence = indent = tag = ""
    for line in text.split("\n"):
        match = FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match and not ("`" in match[3] and match[2][0] == "`"):
                indent, fence, lines = match[1], match[2], []
                tag = match[3].strip().lower()
        elif match and match[2].startswith(fence) and not match[3].strip():
            if program is None or not _is_output(tag, lines):
                program = "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    return program, bool(fence)
