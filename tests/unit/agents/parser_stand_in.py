"""A parser worker that hangs, dies or raises as the text demands."""

import os
import sys
import time

import msgspec
from r1_grading.base.workers import LENGTH_HEADER, encode_frame

from megatron_r1.agents.parser_worker import ParseJob, ParseReply
from megatron_r1.base.errors import Cause


def send(reply):
    sys.stdout.buffer.write(encode_frame(reply))
    sys.stdout.buffer.flush()


if "unknown" in sys.argv[1]:
    send(ParseReply("unusable", "no", key="agents.tool_parser", cause=Cause.UNKNOWN))
    sys.exit()
send(ParseReply("ready"))
while header := sys.stdin.buffer.read(LENGTH_HEADER.size):
    job = msgspec.json.decode(sys.stdin.buffer.read(LENGTH_HEADER.unpack(header)[0]), type=ParseJob)
    if job.text == "hang":
        time.sleep(100_000)
    if job.text == "die":
        os._exit(3)
    if job.text == "raise":
        send(ParseReply("failed", "ValueError: text"))
    else:
        send(ParseReply("parsed", "", "thought", job.text + str(os.getpid())))
