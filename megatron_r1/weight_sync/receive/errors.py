"""The error of a push that an engine's server has to recognise.

Apart from `buffer`, whose checksums import llvmlite: in a process that has imported it before vLLM
0.32 starts the engine core, vLLM fails (triton_utils/dispatcher.py:143 asks every attribute of every
module for its `__dict__`, and llvmlite's library is not one for that).
"""


class IncompletePush(ValueError):
    """A push did not come to its end, and nothing of it is in use.

    vLLM passes errors between its processes as text (v1/engine/core.py:1751 and, from the ranks,
    v1/executor/multiproc_executor.py:1004), so the text has `CODE`, by which
    `vllm_plugin.swap_endpoint` recognises it.
    """

    CODE = "incomplete_push"

    def __init__(self, what: str) -> None:
        super().__init__(f"{self.CODE}: {what}")
