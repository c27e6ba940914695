"""An interpreter inside the sandbox that keeps its state from cell to cell: `python -c THIS_FILE`.

Frames of 4 bytes of length and UTF-8 text: on standard input a cell's seconds (a line) and source,
on standard output what it printed, with the value of a last expression, or the error. The cell can
tamper with everything here: what it returns is a tool's result, never a grade."""


def start() -> None:
    """Run cells until standard input ends."""
    import ast
    import io
    import posix
    import signal
    import sys

    requests, replies = posix.dup(0), posix.dup(1)
    null = posix.open("/dev/null", posix.O_RDWR)
    for descriptor in range(3):
        posix.dup2(null, descriptor)
    builtins = vars(sys.modules["builtins"])
    builtins["exit"] = builtins["quit"] = sys.exit
    sys.set_int_max_str_digits(0)
    space = {"__name__": "__main__"}

    def read(count: int) -> bytes:
        """Return the next `count` bytes of requests; at their end the process exits."""
        content = b""
        while len(content) < count:
            piece = posix.read(requests, count - len(content))
            if not piece:
                posix._exit(0)
            content += piece
        return content

    def interrupt(*_: object) -> None:
        """Break off the cell that runs, when the alarm of its time limit goes off."""
        raise TimeoutError("the cell's time is over")

    def run(source: str) -> None:
        """Execute a cell, and print the value of a last expression unless it is None."""
        tree = ast.parse(source)
        last_statement = tree.body[-1] if tree.body else None
        if isinstance(last_statement, ast.Expr):
            tree.body.pop()
        exec(compile(tree, "<cell>", "exec"), space)
        if isinstance(last_statement, ast.Expr):
            value = eval(compile(ast.Expression(last_statement.value), "<cell>", "eval"), space)
            if value is not None:
                print(repr(value))

    signal.signal(signal.SIGALRM, interrupt)
    while True:
        seconds, _, source = read(int.from_bytes(read(4), "big")).decode().partition("\n")
        output = io.StringIO()
        sys.stdout = sys.stderr = output
        try:
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            try:
                run(source)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except SystemExit:
            pass
        except BaseException as error:  # noqa: BLE001 - a cell may raise anything
            output.write(describe_error(error))
        content = output.getvalue().encode("utf-8", "replace")
        message = len(content).to_bytes(4, "big") + content
        while message:
            message = message[posix.write(replies, message) :]


def describe_error(error: BaseException) -> str:
    """Return an error as a line, with the lines of the cell that it passed through."""
    trace, lines = error.__traceback__, []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<cell>":
            lines.append(str(trace.tb_lineno))
        trace = trace.tb_next
    location = f" (line {', '.join(lines)} of the cell)" if lines else ""
    return f"{type(error).__name__}: {error}{location}\n"


start()
