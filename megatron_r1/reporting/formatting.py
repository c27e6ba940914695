"""Formats numbers, times and texts for the terminal and for reports."""

import unicodedata
from typing import Any


def format_number(value: float) -> str:
    """Format with about three significant digits: 0.451, 61.3, 3,412, 3.2e-06."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 0.001 or size >= 1e7:
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:,.0f}"
    # Decimals chosen after rounding, so that 9.996 reads 10.0 and not 10.00.
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.9995 else f"{value:.3f}"


def format_percent(fraction: float) -> str:
    """Format a fraction: 0.947 as 94.7%."""
    return f"{100 * fraction:.1f}%"


def format_count(count: int, noun: str) -> str:
    """Format a count: 1 file, 1,300 files, 2 batches."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def format_clock(seconds: float) -> str:
    """Format a time: 0:07, 12:34, 1:02:03."""
    total_seconds = max(0, int(seconds))
    hours = total_seconds // 3600
    minutes = total_seconds // 60 % 60
    last_seconds = total_seconds % 60
    return f"{hours}:{minutes:02}:{last_seconds:02}" if hours else f"{minutes}:{last_seconds:02}"


def format_duration(seconds: float) -> str:
    """Format a duration: 7.2 s, 6 min 12 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    total_seconds = round(seconds)
    if total_seconds < 3600:
        return f"{total_seconds // 60} min {total_seconds % 60} s"
    if total_seconds < 86400:
        return f"{total_seconds // 3600} h {total_seconds // 60 % 60} min"
    return f"{total_seconds // 86400} d {total_seconds // 3600 % 24} h"


def format_seconds(seconds: float) -> str:
    """Format a duration in one unit: 12 s, 3 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"


def make_printable(text: Any, keep_newlines: bool = False) -> str:
    """Replace control and bidirectional characters, so that text is safe for terminals and logs.

    A model under training may write any character, escape sequences included.
    """
    kept_chars = "\n" if keep_newlines else ""
    text = str(text).replace("\t", "    ")
    return "".join(
        char
        if char in kept_chars or unicodedata.category(char)[0] != "C"
        else ("↵" if char == "\n" else "�")
        for char in text
    )


def shorten_middle(text: str, max_characters: int) -> str:
    """Replace the middle of a longer text by the number of characters left out."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    left_out = f"\n[… {len(text) - max_characters:,} characters left out …]\n"
    return text[:half] + left_out + text[-half:]
