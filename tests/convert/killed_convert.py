"""megatron-r1 convert that is killed in the middle of a file: `killed_convert.py COUNT ARGUMENT…`.

kill -9, when the COUNT-th tensor or chunk is about to be written.
"""

import itertools
import os
import signal
import sys

from megatron_r1.commands.convert import from_hf, to_hf
from megatron_r1.commands.convert.verb import main

count = int(sys.argv.pop(1))
calls = itertools.count(1)
from_hf.FILE_BYTES = 60_000


def killing(function):
    def run(*arguments):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return run


def killing_each(function):
    def run(*arguments):
        for item in function(*arguments):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    return run


to_hf._write_tensor = killing(to_hf._write_tensor)
from_hf._read_chunk_values = killing_each(from_hf._read_chunk_values)
sys.exit(main())
