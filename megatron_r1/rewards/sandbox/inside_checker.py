"""Run a checker inside the sandbox: `python -c THIS_FILE CHECKER INPUT EXPECTED ACTUAL`.

A checker that fails (an exception) exits with status 3; one that rejects exits with another
status. A mark on standard error shows that ACTUAL was opened: a failure before it is not caused by
the output.
"""


def start() -> None:
    import os
    import sys

    builtins = vars(sys.modules["builtins"])
    builtins["exit"] = builtins["quit"] = sys.exit
    sys.setrecursionlimit(50_000)
    del sys.argv[0], globals()["start"]  # the checker finds a `__main__` like any other
    actual = sys.argv[3]

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and os.path.basename(str(arguments[0])) == actual:
            os.write(2, b"\0actual\n")

    sys.addaudithook(watch)
    try:
        with open(sys.argv[0], "rb") as file:
            source = file.read()
        exec(compile(source, sys.argv[0], "exec", dont_inherit=True), globals())
    except SystemExit:
        raise
    except BaseException as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(3)  # testlib's status for a checker that failed


start()
