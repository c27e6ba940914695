"""The shape of the problem, and presets for the usual ones."""

from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
LONGEST_SEQUENCE = 4_096


@dataclass(frozen=True)
class ProblemSizes:
    """tokens (T), vocab (V, before the division by tp), hidden (H), dtype by name, tp ranks."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    tp: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab", "hidden", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if self.vocab % self.tp:
            raise ValueError(f"vocab {self.vocab} does not divide by tp {self.tp}: change one")
        if self.tokens % self.sequences:
            raise ValueError(f"tokens is {self.tokens}: give a multiple of {self.sequences}")

    @property
    def torch_dtype(self) -> Any:
        import torch  # here, so that --help does not import it

        return getattr(torch, self.dtype)

    @property
    def shard(self) -> int:
        """Vocabulary entries on one rank; only one rank is measured."""
        return self.vocab // self.tp

    @property
    def sequences(self) -> int:
        """Packed sequences of equal length: at least 8, none longer than LONGEST_SEQUENCE."""
        return max(8, -(-self.tokens // LONGEST_SEQUENCE))

    @property
    def length(self) -> int:
        return self.tokens // self.sequences

    def __str__(self) -> str:
        of = f" (1/{self.tp} of {self.vocab:,})" if self.tp > 1 else ""
        shape = f"{self.tokens:,} tokens x {self.shard:,} vocabulary{of} x {self.hidden:,} hidden"
        return f"{shape}, {self.dtype}"


# `full` is DeepSeek-V3's output layer on one micro-batch, `shard` what one of eight tensor-parallel
# ranks holds of it; `cpu` takes eager PyTorch 3 GB.
PRESETS = {
    "full": ProblemSizes(65_536, 129_280, 7_168, "bfloat16"),
    "shard": ProblemSizes(65_536, 129_280, 7_168, "bfloat16", tp=8),
    "cpu": ProblemSizes(1_536, 129_280, 128, "float32"),
    "tiny": ProblemSizes(64, 1_000, 32, "float32"),
}
