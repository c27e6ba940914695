"""The report of a source of data: how many rows were read, and which were left out and why."""

from dataclasses import dataclass, field


@dataclass
class SkippedRows:
    """Rows left out for one reason.

    Attributes:
        count: how many.
        first: "file:line" of the first.
        key: the column or setting."""

    count: int
    first: str
    key: str


@dataclass
class DataReport:
    """Counts the rows of one source.

    Attributes:
        source: the file or data set.
        num_read: rows read.
        num_duplicates: rows whose question and truth another row has.
        num_unused: questions beyond `data.num_train` and `data.num_heldout`.
        left_out: reason → rows.
        columns: our name → the file's column, for those that were found by their names.
        kinds: rewards, or forms of examples, where these differ → rows.
        is_complete: False where reading ended before the file did, as enough questions were found.
    """

    source: str = ""
    num_read: int = 0
    num_duplicates: int = 0
    num_unused: int = 0
    left_out: dict[str, SkippedRows] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    is_complete: bool = True

    def skip_row(self, reason: str, location: str, key: str) -> None:
        """Count a row that is left out.

        Args:
            reason: what it fails.
            location: "file:line".
            key: the column or the setting that it fails."""
        if reason in self.left_out:
            self.left_out[reason].count += 1
        else:
            self.left_out[reason] = SkippedRows(1, location, key)

    def lines(self) -> list[str]:
        """Return what became of the source's rows as lines for the terminal: read, left out and
        why, kinds, columns."""
        row_word = "row" if self.num_read == 1 else "rows"
        num_kept = self.num_read - self.num_duplicates
        num_kept -= sum(rows.count for rows in self.left_out.values())
        remark = "" if self.is_complete else " (more are not needed)"
        lines = [f"{self.source}: {self.num_read:,} {row_word} read{remark}, {num_kept:,} usable"]
        if self.columns:
            column_pairs = ", ".join(
                f"{name} = {source_column}" for name, source_column in self.columns.items()
            )
            lines.append(f"  columns, by their names: {column_pairs}")
        if self.kinds:
            counts = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.items())
            lines.append(f"  kinds of rows: {counts}")
        if self.num_duplicates:
            lines.append(
                f"  {self.num_duplicates:,} left out: question and truth are those of another row"
            )
        if self.num_unused:
            lines.append(
                f"  {self.num_unused:,} not used: data.num_train or data.num_heldout is reached"
            )
        for reason, rows in self.left_out.items():
            lines.append(f"  {rows.count:,} left out: {reason} (first: {rows.first})")
        return lines
