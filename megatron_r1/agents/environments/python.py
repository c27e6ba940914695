"""Mathematics with a Python interpreter: the code runs in the sandbox of the code reward.

The interpreter lives as long as the episode and keeps its variables. The last answer is graded by
the reward of the row's kind."""

from r1_grading.sandbox import Limits, PythonSession, SessionEnded, require_sandbox


class Python:
    """One tool, `python`. seconds: the wall time limit of a call. cpu_seconds: the limit of the CPU
    time of all calls of an episode. memory_mib: the interpreter's memory limit. output_chars: the
    length at which a call's output is cut off."""

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
        self.close()

    def close(self) -> None:
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
