"""Engine processes that write their Python stacks to their log when they are asked by a signal."""

import faulthandler
import signal


def answer_signal() -> None:
    """On SIGUSR2, which vLLM does not use. The handler is C and needs no interpreter lock, so a
    process answers that is stuck in a kernel or a collective; children that are forked inherit it.
    """
    faulthandler.register(signal.SIGUSR2, all_threads=True)
