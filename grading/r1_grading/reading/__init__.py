"""Reads a response: its final answer, its chain of thought, the parts and words of its text."""

from r1_grading.reading.final_answer import (
    READING_REWARDS,
    READINGS,
    Reading,
    is_number,
    read_answer,
)
from r1_grading.reading.judge_texts import (
    Part,
    break_control_tokens,
    chain_of_thought,
    chat_messages,
    check_template,
    cut_middle,
    fill_template,
    prepare_texts,
    response_part,
)
from r1_grading.reading.languages import HAN_PER_WORD, HAN_RANGES, LANGUAGE_NAMES, judged_words
from r1_grading.reading.tags_and_boxes import (
    ANSWER,
    BOXES,
    END_ANSWER,
    END_THINK,
    THINK,
    Extraction,
    extract_answer,
    unwrap_answer,
)
