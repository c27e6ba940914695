"""Section `teacher`: the model that on-policy distillation learns from, and its engines."""

from pydantic import Field, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.engine import EngineConfig
from megatron_r1.config.section import Resumable


class TeacherConfig(EngineConfig):
    """The teacher of on-policy distillation, whose engines score the student's samples."""

    path: str = ""
    """Hugging Face folder of the teacher, which rl.algorithm: on_policy_distillation learns from:
    any model that vLLM serves and that has the student's tokenizer"""
    url: Resumable[list[str]] = []
    """addresses of vLLM servers that already serve path's model, started with --enable-scale-out;
    default: the run starts engines of its own"""
    engines: Resumable[int] = Field(1, ge=1)
    """vLLM servers on the controller's host"""
    max_num_seqs: Resumable[int] = Field(64, gt=0)
    """sequences an engine scores at once"""
    tokens_at_once: Resumable[int] = Field(2048, gt=0)
    """tokens that an engine scores in one pass; the logits of all of them exist together, in
    fp32"""
    start_timeout_seconds: float = Field(600.0, gt=0)
    """limit for the start of an engine, and for a url to be reached"""

    @model_validator(mode="after")
    def _fits_together(self):
        if self.url and not self.path:
            raise UserError(
                f"teacher.url: {', '.join(self.url)} serves a model whose tokenizer must be the "
                "student's; set teacher.path to its folder, for the check",
                key="teacher.path",
                cause=Cause.MISSING,
            )
        for url in self.url:
            if not url.startswith(("http://", "https://")):
                raise UserError(
                    f"teacher.url: {url} is no address; write http://host:port",
                    key="teacher.url",
                    cause=Cause.MALFORMED,
                )
        if self.tokens_at_once < self.max_num_seqs:
            raise UserError(
                f"teacher.tokens_at_once: {self.tokens_at_once} is less than teacher.max_num_seqs: "
                f"{self.max_num_seqs}, and every sample has a token; raise it or lower the other",
                key="teacher.tokens_at_once",
                cause=Cause.CONFLICT,
            )
        return self
