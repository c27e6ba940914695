"""How many of something, in words."""


def counted(count: int, noun: str) -> str:
    """1 file, 1,300 files."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
