"""Section `teacher`: the models that on-policy distillation learns from, and their engines."""

import re

from pydantic import Field, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.engine import EngineConfig
from megatron_r1.config.section import Resumable

DEFAULT = ""
"""The name of the teacher of all sources that have none of their own."""
OTHER_SOURCES = "others"
"""That teacher in metrics."""
SOURCE_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""A name that every tracker accepts as a part of a metric's name."""


class TeacherEngineConfig(EngineConfig):
    """The engines of one teacher, which compute log-probabilities of the student's samples."""

    path: str = ""
    """Hugging Face folder of the teacher, which rl.algorithm: on_policy_distillation learns from:
    any model that vLLM serves and that has the student's tokenizer"""
    url: Resumable[list[str]] = []
    """addresses of vLLM servers that already serve path's model, started with --enable-scale-out;
    default: the run starts engines of its own"""
    engines: Resumable[int] = Field(1, ge=1)
    """vLLM servers on the controller's node"""
    max_num_seqs: Resumable[int] = Field(64, gt=0)
    """sequences an engine computes at once"""
    max_num_batched_tokens: Resumable[int] = Field(2048, gt=0)
    """tokens that an engine computes in one pass; the logits of all of them exist together, in
    fp32"""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """limit for the start of an engine, and for a url to be reached"""


class TeacherConfig(TeacherEngineConfig):
    """The teacher of on-policy distillation, or several: one for each source of questions."""

    by_source: dict[str, TeacherEngineConfig] = {}
    """further teachers: {SOURCE: {path: FOLDER, engines: 1, …}}, with the keys of this section.
    SOURCE is what a row's data_source, source or dataset says, or the kind of its reward, where
    its source has no teacher; questions without either have path's teacher"""

    @property
    def sections(self) -> dict[str, TeacherEngineConfig]:
        """Every teacher by the key of its settings; empty for a run without a teacher.

        A key is "teacher" or "teacher.by_source.SOURCE"."""
        if not self.path:
            return {}
        return {source_key(name): self.engines_of(name) for name in (DEFAULT, *self.by_source)}

    def engines_of(self, name: str) -> TeacherEngineConfig:
        """Return the teacher of a key of `by_source`, or of `DEFAULT`."""
        return self.by_source[name] if name else self

    @model_validator(mode="after")
    def _fits_together(self):
        if self.by_source and not self.path:
            raise UserError(
                "teacher.by_source: questions of other sources have no teacher; set teacher.path",
                key="teacher.path",
                cause=Cause.MISSING,
            )
        _check_engines(self, "teacher")
        for name, engines in self.by_source.items():
            if not SOURCE_NAME.fullmatch(name) or name == OTHER_SOURCES:
                raise UserError(
                    f"teacher.by_source: {name!r} cannot be the name of a source, which metrics "
                    "have: letters, digits, _, -, . and single slashes, and not "
                    f"{OTHER_SOURCES!r}, which "
                    "is path's teacher there; rename it in the data, or name its reward's kind",
                    key="teacher.by_source",
                    cause=Cause.MALFORMED,
                )
            if not engines.path:
                raise UserError(
                    f"{source_key(name)}.path must be set: the folder of the teacher of {name}",
                    key=f"{source_key(name)}.path",
                    cause=Cause.MISSING,
                )
            _check_engines(engines, source_key(name))
        return self


def source_key(name: str) -> str:
    """Return the key of the settings of a source's teacher."""
    return f"teacher.by_source.{name}" if name else "teacher"


def _check_engines(engines: TeacherEngineConfig, key: str) -> None:
    """Check the settings of one teacher.

    Args:
        engines: its settings.
        key: theirs, for messages.

    Raises:
        UserError: settings contradict each other, or an address is malformed."""
    if engines.url and not engines.path:
        raise UserError(
            f"{key}.url: {', '.join(engines.url)} serves a model whose tokenizer must be the "
            f"student's; set {key}.path to its folder, for the check",
            key=f"{key}.path",
            cause=Cause.MISSING,
        )
    for url in engines.url:
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"{key}.url: {url} is no address; write http://host:port",
                key=f"{key}.url",
                cause=Cause.MALFORMED,
            )
    if engines.max_num_batched_tokens < engines.max_num_seqs:
        raise UserError(
            f"{key}.max_num_batched_tokens: {engines.max_num_batched_tokens} is less than "
            f"{key}.max_num_seqs: {engines.max_num_seqs}, and every sample has a token; raise it "
            "or lower the other",
            key=f"{key}.max_num_batched_tokens",
            cause=Cause.CONFLICT,
        )
