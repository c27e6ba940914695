"""Runs programs of a model in a bubblewrap sandbox, within limits of time, memory and output."""

from r1_grading.sandbox.limits import Limits
from r1_grading.sandbox.programs import require_sandbox
from r1_grading.sandbox.python_session import PythonSession, SessionEnded
from r1_grading.sandbox.requirements import SandboxUnavailable
from r1_grading.sandbox.run import SandboxError
