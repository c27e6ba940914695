"""What becomes of a response: a code that is counted, and the reason."""

from __future__ import annotations

from dataclasses import dataclass

KEPT, NOT_CHOSEN = "kept", "not_chosen"
CHOSEN, REJECTED = "chosen", "rejected"
SAFE, UNSAFE = "safe", "unsafe"
UNGRADED = "ungraded"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Decision:
    """code: `decision` in samples.jsonl. why: for a person who reads the line."""

    code: str
    why: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the response is in the file that is trained on."""
        return self.code in (KEPT, CHOSEN, REJECTED, SAFE, UNSAFE)
