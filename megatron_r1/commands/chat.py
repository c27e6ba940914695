"""Sends questions to a trained model: typed lines, lines of stdin, or `--question`.

`megatron-r1 chat RUN_OR_FOLDER [--question TEXT …]`; the option may be given several times. A run's
`hf/` is used with the run's template and sampling; another folder with its chat template, else
`plain`. Other settings: `--data.template`, `--rollout.temperature`,
`--rollout.max_response_tokens`, … Each question is a conversation of its own."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.ready_input import read_when_ready
from megatron_r1.commands.parts.guessed_settings import yaml_value_text
from megatron_r1.commands.parts.trained_model import CONVERT, find_exported, trained_recipe
from megatron_r1.commands.parts.trained_template import template_of_model
from megatron_r1.config import Config, infer_verb
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.model_config import max_positions
from megatron_r1.engines.server.server import temporary_logs
from megatron_r1.evaluation.engine_model import EngineModel
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.trainer.checkpoints.checkpoint_folders import complete_checkpoints

ARGUMENTS = ("RUN_OR_FOLDER",)
OPTIONS = {"question": "TEXT"}
REPEATED_OPTIONS = ("question",)
SETTINGS = ("data.template", "rollout", "run.seed")

SEQUENCE_TOKENS, RESPONSE_TOKENS = 4096, 512
"""Limits of prompt and response together, and of the response, for a folder that no RL run made: a
KV cache on a CPU does not hold a sequence of 131,072 tokens, which some models allow."""
INPUT_PROMPT = "> "


def run(config: Config, folder: str, question: list[str] | None = None) -> None:
    """Print the model's response to each question on stdout, and all else on stderr.

    Args:
        config: the settings given on the command line.
        folder: a run's folder, or a model's.
        question: the questions; None: those typed at the terminal, or the lines of stdin.

    Raises:
        UserError: a run without an export."""
    model = find_exported(folder, ARGUMENTS[0])
    config = _engine_settings(config, model)
    _print_note(
        f"model: {model}; template: {yaml_value_text(config.data.template)}; sampled at "
        f"temperature {config.rollout.temperature:g}"
    )
    checkpoints = complete_checkpoints(model.parent / "checkpoints")
    if model.name == "hf" and checkpoints:
        export, checkpoint = model / "config.json", checkpoints[-1]
        if export.stat().st_mtime < checkpoint.stat().st_mtime:
            _print_note(f"{checkpoint} is newer: {CONVERT} to-hf {checkpoint} FOLDER exports it")
    questions = question
    if question is None and not sys.stdin.isatty():
        questions = [line.strip() for line in sys.stdin if line.strip()]
        if not questions:
            raise UserError(
                "stdin holds no question; give one a line, or --question TEXT",
                key="stdin",
                cause=Cause.EMPTY,
            )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run_chat(config, model, questions))


def _engine_settings(config: Config, model: Path) -> Config:
    """Return the settings for one engine here: the run's, or a folder's defaults, overridden by
    the command line."""
    recipe, template = trained_recipe(model), template_of_model(model, ARGUMENTS[0])[0]
    if recipe is not None and infer_verb(recipe) == "rl":
        rollout = recipe.rollout.model_dump()
    else:
        max_tokens = min(SEQUENCE_TOKENS, max_positions(model, ARGUMENTS[0]))
        rollout = {
            "dtype": "float32" if gpu.engine_device() == "cpu" else "bfloat16",
            "max_model_len": max_tokens,
            "max_response_tokens": min(RESPONSE_TOKENS, max_tokens // 2),
        }
    data: dict[str, Any] = {"template": template}
    data |= config.data.model_dump(exclude_unset=True)
    set_values = config.rollout.model_dump(exclude_unset=True)
    single_engine = {"engines": 1, "placement": "local", "colocated": False, "hosts_per_engine": 1}
    tree = config.model_dump() | {"data": data, "rollout": rollout | single_engine | set_values}
    return Config.model_validate(tree)


async def _run_chat(config: Config, model: Path, questions: list[str] | None) -> None:
    """Answer the questions on one engine; questions None: those typed at the terminal."""
    rollout = config.rollout
    decoding = SamplingSettings.from_rollout(rollout)
    with temporary_logs() as scratch:
        engine_model = EngineModel(config, model, decoding, scratch, None)
        try:
            _print_note("starting vLLM")
            with contextlib.redirect_stdout(sys.stderr):
                await engine_model.start()
            if questions is None:
                await _answer_terminal(engine_model, config.run.seed)
            else:
                await _answer_all(engine_model, questions, config.run.seed)
        finally:
            await engine_model.close()


async def _answer_terminal(engine_model: EngineModel, seed: int) -> None:
    """Answer each line of the terminal, with another seed each time."""
    _print_note("one question a line; Ctrl-D ends")
    async for line in _typed_lines():
        if line.strip():
            print(_show_response(await engine_model.respond(line.strip(), seed)), flush=True)
            seed += 1


async def _answer_all(engine_model: EngineModel, questions: list[str], seed: int) -> None:
    """Answer all questions at once; print the answers in their order, each below its question where
    there are several."""
    answers = await asyncio.gather(
        *(engine_model.respond(question, seed) for question in questions)
    )
    for question, answer in zip(questions, answers, strict=True):
        if len(questions) > 1:
            print(f"--- {question}")
        print(_show_response(answer), flush=True)


async def _typed_lines() -> AsyncIterator[str]:
    """Yield the terminal's lines until its end. The event loop goes on meanwhile, and with it the
    watch over the engine."""
    remainder = b""
    while True:
        print(INPUT_PROMPT, end="", file=sys.stderr, flush=True)
        if not (chunk := await read_when_ready(sys.stdin.fileno(), 65_536)):
            return
        *lines, remainder = (remainder + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")


def _show_response(response: TextResponse) -> str:
    if response.refusal:
        return f"[{response.refusal}]"
    note = " [cut off: raise --rollout.max_response_tokens]" if response.is_truncated else ""
    return response.full_text.strip() + note


def _print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
