"""Run a Python program inside the sandbox: `python -c THIS_FILE PROGRAM`, or a checker, with
INPUT EXPECTED ACTUAL.

The interpreter starts without `site` (a third of its start-up time), which defines `exit` and
`quit`. The recursion limit is the one LiveCodeBench sets. A checker that fails (an exception) exits
with status 3; one that rejects exits with another status. A mark on standard error shows that
ACTUAL was opened: a failure before it is not caused by the output."""


def start() -> None:
    """Run the program as `__main__`, with its own standard input and output."""
    import sys

    builtins = vars(sys.modules["builtins"])
    builtins["exit"] = builtins["quit"] = sys.exit
    sys.setrecursionlimit(50_000)
    sys.set_int_max_str_digits(0)  # solutions print numbers of more than 4,300 digits
    del sys.argv[0], globals()["start"]  # the program finds a `__main__` like any other
    path, *files = sys.argv

    if files:
        import os

        def watch(event: str, arguments: tuple) -> None:
            if event == "open" and os.path.basename(str(arguments[0])) == files[-1]:
                os.write(2, b"\0actual\n")

        sys.addaudithook(watch)
    try:
        with open(path, "rb") as file:
            source = file.read()
        code = compile(source, path, "exec", dont_inherit=True)
        if provide_names := globals().pop("provide_names", None):
            provide_names(code, globals())
        exec(code, globals())
    except BaseException as error:
        if not files or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(3)  # testlib's status for a checker that failed


start()
