"""Environments that come with this package (`agents.environment.SHIPPED_ENVIRONMENTS`).

`Calculator`: arithmetic with a calculator, sums that are too long to do in the head. A row's truth
is the result; the last integer of the last answer must equal it.

`Lookup`: two-hop look-up; the answer to a question is in a table that only the tool can read. A
row's `seed` fixes the table. Every row has another table, so no policy can memorize it. The
question is a key; its value is a key again, whose value is the answer.

`Gym`: a reasoning-gym task in several steps; an answer is checked, and a wrong one may be
corrected. Rows are those of `data.task`; the scorers are those of the logic reward, with their
guards.

`Python`: mathematics with a Python interpreter; the code runs in the sandbox of the code reward.
The interpreter lives as long as the episode and keeps its variables. The last answer is graded by
the reward of the row's kind.

`Retrieval`: questions about a corpus of the user's, searched by the tools: SQLite's full-text
index, BM25. The corpus is JSONL of {title, text}. Its index is written once, next to it, as
CORPUS.fts5. The last answer is graded by the reward of the row's kind."""

import ast
import contextlib
import json
import math
import operator
import os
import random
import re
import sqlite3
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from r1_grading import grade
from r1_grading.sandbox import Limits, PythonSession, SessionEnded, require_sandbox

PYTHON_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
    ast.USub: operator.neg,
}
MAX_CHARS = 200
"""The longest expression; as there are no powers, its result is short, too."""


class Calculator:
    """One tool, `calculate`."""

    def reset(self, truth: object, **row: object) -> None:
        """Begin an episode whose right answer is `truth`."""
        self._truth, self._answer = str(truth), ""

    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: numbers with + - * / and brackets.
        """
        if len(expression) > MAX_CHARS:
            raise ValueError(f"the expression is longer than {MAX_CHARS} characters")
        return str(_evaluate_node(ast.parse(expression.strip(), mode="eval").body))

    def final_answer(self, text: str) -> None:
        """Take the last whole number of `text` as the answer."""
        numbers = re.findall(r"-?\d+", text)
        self._answer = numbers[-1] if numbers else ""

    def get_reward(self) -> float:
        """Return 1.0 if the answer is the truth, else 0.0."""
        return float(self._answer == self._truth)


def _evaluate_node(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in PYTHON_OPERATORS:
            return PYTHON_OPERATORS[type(op)](_evaluate_node(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in PYTHON_OPERATORS:
            return PYTHON_OPERATORS[type(op)](_evaluate_node(left), _evaluate_node(right))
    raise ValueError("only numbers, + - * / and brackets")


SHOWN_DIGITS = 2


class Lookup:
    """One tool, `lookup`.

    Args:
        hops: how many entries must be read one after the other."""

    def __init__(self, hops: int = 2) -> None:
        self._hops = hops

    def reset(self, seed: int, **row: object) -> str:
        """Draw a chain of keys from `seed`; return the first, with which the question ends."""
        self._seed, self._answer = seed, ""
        key = self._draw_digits("question")
        self._truth = key
        for _ in range(self._hops):
            self._truth = self.lookup(self._truth)
        return key

    def lookup(self, key: str) -> str:
        """Return the entry of the table under a key.

        Args:
            key: two digits.
        """
        if not re.fullmatch(rf"\d{{{SHOWN_DIGITS}}}", key):
            raise KeyError(key)
        return self._draw_digits(key)

    def final_answer(self, text: str) -> None:
        """Take `text` as the answer."""
        self._answer = text.strip()

    def get_reward(self) -> float:
        """Return 1.0 if the answer is the last key of the chain, else 0.0."""
        return float(self._answer == self._truth)

    def _draw_digits(self, name: str) -> str:
        number = random.Random(f"{self._seed}:{name}").randrange(10**SHOWN_DIGITS)
        return f"{number:0{SHOWN_DIGITS}d}"


class Gym:
    """One tool, `submit`.

    Args:
        attempts: answers of an episode.
        discount: a right answer earns `discount` to the power of the wrong ones before it, so that
            guessing does not pay."""

    done = False

    def __init__(self, attempts: int = 3, discount: float = 0.5) -> None:
        if attempts < 1 or not 0 <= discount <= 1:
            raise ValueError(
                f"agents.parameters: attempts={attempts} must be at least 1, and "
                f"discount={discount} from 0 to 1"
            )
        self._attempts, self._discount = attempts, discount

    def reset(
        self, task: str, entry: dict[str, Any], parameters: dict[str, Any] | None = None
    ) -> None:
        """Begin an episode with an entry of the task's data set.

        Args:
            task: the name of the reasoning-gym task.
            entry: the row of its data set.
            parameters: the settings that the row was made with; None: the task's defaults."""
        self._row: dict[str, Any] = {"task": task, "entry": entry, "parameters": parameters}
        self._num_incorrect, self._reward = 0, 0.0

    def submit(self, answer: str) -> str:
        """Check an answer to the question. After a wrong one you may submit another.

        Args:
            answer: the final answer alone, without the way to it.
        """
        text = f"<answer>{answer}</answer>"
        if grade("logic", text, **self._row, reading="tags").reward == 1.0:
            self._reward = math.pow(self._discount, self._num_incorrect)
            self.done = True
            return "right"
        self._num_incorrect += 1
        self.done = self._num_incorrect == self._attempts
        return f"wrong; attempts left: {self._attempts - self._num_incorrect}"

    def final_answer(self, text: str) -> None:
        """Submit `text`, unless the episode is done."""
        if text and not self.done:
            self.submit(text.strip())

    def get_reward(self) -> float:
        """Return the reward of the accepted answer; 0.0 without one."""
        return self._reward


class Python:
    """One tool, `python`.

    Args:
        seconds: the wall time limit of a call.
        cpu_seconds: the limit of the CPU time of all calls of an episode.
        memory_mib: the interpreter's memory limit.
        output_chars: the length at which a call's output is cut off."""

    def __init__(
        self,
        seconds: float = 5.0,
        cpu_seconds: float = 60.0,
        memory_mib: int = 512,
        output_chars: int = 4_000,
    ) -> None:
        require_sandbox("python")
        self._limits = Limits(cpu_seconds=cpu_seconds, memory_mib=memory_mib, output_mib=1)
        self._seconds, self._output_chars = seconds, output_chars
        self._session: PythonSession | None = None

    def reset(self, **row: object) -> None:
        """End the session of the episode before."""
        self.close()

    def close(self) -> None:
        """End the session, if one was started."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def python(self, code: str) -> str:
        """Run Python code and return what it prints and the value of its last expression. Variables
        stay for the next call. There are no files and no network.

        Args:
            code: the code to run.
        """
        if self._session is None:
            self._session = PythonSession(self._limits)
        try:
            output = self._session.run(code, self._seconds)
        except ValueError:
            raise  # the cell was not sent
        except BaseException as error:
            self.close()
            if isinstance(error, SessionEnded):
                raise RuntimeError(f"{error}; all variables are lost") from None
            raise
        if len(output) > self._output_chars:
            return f"{output[: self._output_chars]} … (cut off)"
        return output or "(no output)"


SNIPPET_WORDS = 32


class Retrieval:
    """Two tools, `search` and `read`.

    Args:
        corpus: the path of the JSONL file.
        text_chars: the most characters of a document that `read` returns."""

    def __init__(self, corpus: str, text_chars: int = 4_000) -> None:
        self._index = sqlite3.connect(f"file:{_make_index(Path(corpus))}?mode=ro", uri=True)
        self._text_chars = text_chars

    @classmethod
    def _before_episodes(cls, corpus: str, **_: object) -> None:
        """Write the index before the first episode, whose time limit a large corpus exceeds."""
        _make_index(Path(corpus))

    def reset(self, **row: object) -> None:
        """Begin an episode; there is nothing to draw."""

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def search(self, query: str, limit: int = 3) -> list[dict[str, object]]:
        """Search the corpus and return the number, title and a snippet of the best documents.

        Args:
            query: words to search for.
            limit: how many documents to return, 10 at most.
        """
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        if not words:
            return []
        rows = self._index.execute(
            "SELECT rowid, title, snippet(documents, 1, '', '', '…', ?) FROM documents "
            "WHERE documents MATCH ? ORDER BY rank LIMIT ?",
            (SNIPPET_WORDS, words, max(1, min(limit, 10))),
        )
        return [{"number": row[0], "title": row[1], "snippet": row[2]} for row in rows]

    def read(self, number: int) -> str:
        """Return a document.

        Args:
            number: the document's number, as search returns it.
        """
        query = "SELECT title, text FROM documents WHERE rowid = ?"
        row = self._index.execute(query, (number,)).fetchone()
        if row is None:
            raise KeyError(f"there is no document {number}")
        return f"{row[0]}\n{row[1][: self._text_chars]}"


def _make_index(corpus: Path) -> Path:
    """Return the index of a corpus, and write it where there is none, or an older one."""
    index = corpus.with_name(f"{corpus.name}.fts5")
    if index.exists() and index.stat().st_mtime >= corpus.stat().st_mtime:
        return index
    descriptor, name = tempfile.mkstemp(dir=corpus.parent, prefix=index.name)
    os.close(descriptor)
    try:
        _write_index(corpus, name)
        os.replace(name, index)  # others may be writing the same
    except BaseException:  # an environment's time limit is one, too
        os.unlink(name)
        raise
    return index


def _write_index(corpus: Path, name: str) -> None:
    with (
        open(corpus, encoding="utf-8") as lines,
        contextlib.closing(sqlite3.connect(name)) as database,
        database,
    ):
        database.execute("CREATE VIRTUAL TABLE documents USING fts5(title, text)")
        rows = map(json.loads, filter(str.strip, lines))
        database.executemany(
            "INSERT INTO documents VALUES (?, ?)",
            ((row.get("title", ""), row["text"]) for row in rows),
        )
