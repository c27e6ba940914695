"""Run a Python program inside the sandbox: `python -c THIS_FILE PROGRAM [ARGUMENT …]`.

The interpreter starts without `site` (a third of its start-up time), which defines `exit` and
`quit`. The recursion limit is the one LiveCodeBench sets.
"""


def start() -> None:
    import sys

    builtins = vars(sys.modules["builtins"])
    builtins["exit"] = builtins["quit"] = sys.exit
    sys.setrecursionlimit(50_000)
    del sys.argv[0], globals()["start"]  # the program finds a `__main__` like any other
    with open(sys.argv[0], "rb") as file:
        source = file.read()
    exec(compile(source, sys.argv[0], "exec", dont_inherit=True), globals())


start()
