"""Runs command lines of one process: a JSON list a line of stdin, [exit status, output] a line of
the original stdout.

An import of the command line costs two seconds, so a module's 60 commands share one."""

import contextlib
import io
import json
import os
import sys

from megatron_r1.commands import cli


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what processes of a command print
    for line in sys.stdin:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                status = cli.main(json.loads(line))
            except SystemExit as ended:
                status = ended.code
        replies.write(json.dumps([status, output.getvalue()]) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
