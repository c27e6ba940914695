"""`megatron-r1 VERB RECIPE.yaml [--section.key value …]`: parsing and dispatch."""

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, RunError, UserError, did_you_mean
from megatron_r1.base.files import access
from megatron_r1.base.files.access import READ_ONLY
from megatron_r1.base.processes import process_memory, timeline
from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.commands.parts import torchrun
from megatron_r1.commands.verb_module import load_verb, read_verb
from megatron_r1.commands.verb_words import (
    read_verb_options,
    refuse_unknown_options,
    split_verb_words,
)
from megatron_r1.config.keys import boolean_keys
from megatron_r1.config.overrides import parse_overrides
from megatron_r1.engines.server import gpu
from megatron_r1.models.device_connections import trainer_connections

RECIPE_VERBS = {
    "sft": "megatron_r1.commands.sft",
    "reward-model": "megatron_r1.commands.reward_model",
    "rl": "megatron_r1.commands.rl",
    "eval": "megatron_r1.commands.eval",
    "sample": "megatron_r1.commands.sample",
}
"""Verbs that take a recipe: modules with `run(config)`, and what else `VerbModule` lists."""
RECIPELESS_VERBS = {
    "init": "megatron_r1.commands.init.verb",
    "chat": "megatron_r1.commands.chat",
    "score": "megatron_r1.commands.score.verb",
    "compare": "megatron_r1.commands.compare.verb",
    "why": "megatron_r1.commands.why",
    "check-model": "megatron_r1.commands.check_model.verb",
}
"""Verbs that take no recipe: modules with `run(config, *arguments, **options)`, likewise."""
RECIPE_FILE_VERBS = {
    "pipeline": "megatron_r1.commands.pipeline",
    "rehearse": "megatron_r1.commands.rehearse",
    "preflight": "megatron_r1.commands.preflight",
}
"""Verbs that read a recipe and run other verbs, or check the nodes before: modules with
`run(recipe, overrides, RECIPE_VERBS)`, and with `SHORT_OPTIONS`, option → the
key that it is short for, and `RECIPE`, the recipe's class where it is not `Config`."""
VERB_MODULES = RECIPE_VERBS | RECIPELESS_VERBS | RECIPE_FILE_VERBS
SELF_PARSING_VERBS = {
    "plan": "megatron_r1.commands.plan",
    "convert": "megatron_r1.commands.convert.verb",
    "keys": "megatron_r1.commands.keys",
}
"""Verbs with a command line of their own: modules with `main(arguments)`, which returns the exit
status."""
OTHER_WORDS = {
    "train": "rl, sft or reward-model",
    **dict.fromkeys(("grpo", "ppo"), "rl"),
    "finetune": "sft",
    **dict.fromkeys(("generate", "infer"), "sample, or chat for one question"),
    **dict.fromkeys(("evaluate", "benchmark"), "eval"),
    "export": "convert to-hf",
}
"""What verbs of other programs are called here."""
HELP = {"-h", "--help"}
DRY_RUN = "--dry-run"
"""The option of `rl` and `sft` that calls `dry_run(config)` instead of `run(config)`."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

USAGE = f"""usage: megatron-r1 VERB RECIPE.yaml [--section.key value …]

verbs: {", ".join(RECIPE_VERBS)}
       megatron-r1 init MODEL_FOLDER DATA [--out RECIPE.yaml]   writes a recipe for your questions
       megatron-r1 chat RUN_OR_FOLDER [--question TEXT …]   asks a trained model
       megatron-r1 score IN.jsonl OUT.jsonl [--rewards.key value …]   (- is a pipe)
       megatron-r1 score --audit GRADED.jsonl [--json FILE]   how often its grades are wrong
       megatron-r1 compare RUN OTHER_RUN [--json FILE]   the first step and tensor that differ
       megatron-r1 why RUN [--step N] [--memory GB] [--rerun engine,trainer]   why it fails to learn
       megatron-r1 check-model HF_FOLDER [--parallel.key value …] [--json FILE]   a new model, first
       megatron-r1 pipeline RECIPE.yaml [--pipeline.key value …]   several of them, as a graph
       megatron-r1 rehearse RECIPE.yaml [--on null-gpu] [--rehearsal.key value …]   in miniature
       megatron-r1 plan RECIPE.yaml … [--gpus N]   memory, traffic and time, before renting
       megatron-r1 convert to-hf|from-hf|verify A B   Hugging Face ↔ Megatron checkpoints
       megatron-r1 preflight RECIPE.yaml [--json FILE] [--preflight.key value …]   the nodes, last
       megatron-r1 sample RUN_FOLDER   the trained model's answers to the run's questions
       megatron-r1 rl RECIPE.yaml --dry-run   samples and grades one batch, and trains nothing
       megatron-r1 sft RECIPE.yaml --dry-run   shows an example and what of it is learned
The same command continues a run that was stopped.
On many GPUs: torchrun … -m megatron_r1 VERB RECIPE.yaml
What a verb does and reads: megatron-r1 VERB --help
Every key, its default and meaning: megatron-r1 keys, or keys rl sample.keep for some of them;
keys WORD finds what another library calls WORD: keys kl_coef, keys overlong filtering"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status. 0: done; 1: failed (`RunError`, a full disk); 2: a
    mistake of the user's (`UserError`, a file that cannot be written); 130: stopped. Other
    exceptions keep their traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch_command(arguments)
    except (UserError, RunError) as error:
        print(f"megatron-r1: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # `| head` has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in READ_ONLY and error.filename:
            remedy = "give a place that you may write to"
            print(f"megatron-r1: {error.filename}: {error.strerror}; {remedy}", file=sys.stderr)
            return 2
        if error.errno not in DISK_FULL:
            raise
        print(
            f"megatron-r1: the disk is full: {error}; make room and run the same command again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        continuation = (
            "starts over" if arguments[0] in {*RECIPELESS_VERBS, "plan"} else "continues from here"
        )
        print(f"megatron-r1: stopped; the same command {continuation}", file=sys.stderr)
        return 130


def _dispatch_command(arguments: list[str]) -> int:
    """Run the command that the arguments name; return its exit status. Under torchrun, ranks
    that do not run the command serve it instead."""
    if arguments[:1] == ["help"] and set(arguments[1:2]) & SELF_PARSING_VERBS.keys():
        arguments = [arguments[1], "--help"]
    if arguments and arguments[0] in SELF_PARSING_VERBS:
        return importlib.import_module(SELF_PARSING_VERBS[arguments[0]]).main(arguments[1:])
    if not arguments or arguments[0] == "help" or HELP & set(arguments):
        topics = [argument for argument in arguments if argument not in {"help", *HELP}]
        print(_verb_help(topics[0]) if topics and topics[0] in VERB_MODULES else USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("version", "--version"):
        print(f"megatron-r1 {metadata.version('megatron-r1')}")
        return 0
    verb, *words = arguments
    if verb in RECIPELESS_VERBS:
        return _run_plain_verb(verb, words)
    if verb not in VERB_MODULES:
        known_verbs = [*VERB_MODULES, *SELF_PARSING_VERBS]
        verbs = OTHER_WORDS.get(verb)
        hint = f"; here it is {verbs}" if verbs else did_you_mean(verb, known_verbs, "{}")
        hint = hint or f"; use one of {', '.join(known_verbs)}"
        raise UserError(f"unknown verb {verb}{hint}", key="verb", cause=Cause.UNKNOWN)
    if not words or words[0].startswith("--"):
        raise UserError(
            f"{verb} needs a recipe: megatron-r1 {verb} RECIPE.yaml",
            key="RECIPE",
            cause=Cause.MISSING,
        )
    recipe, *options = words
    if verb in RECIPE_FILE_VERBS:
        runner = importlib.import_module(RECIPE_FILE_VERBS[verb])
        for name, key in getattr(runner, "SHORT_OPTIONS", {}).items():
            options = [re.sub(rf"^--{name}(?=$|=)", f"--{key}", option) for option in options]
        switches = boolean_keys(getattr(runner, "RECIPE", configuration.Config))
        runner.run(recipe, parse_overrides(options, switches), RECIPE_VERBS)
        return 0
    return _run_recipe(verb, recipe, options, arguments)


def _run_recipe(verb: str, recipe: str, options: list[str], arguments: list[str]) -> int:
    timeline.mark("controller/command line read")
    with without_garbage_collection():
        module = load_verb(verb, RECIPE_VERBS[verb])
    timeline.mark("controller/verb imported")
    is_dry = DRY_RUN in options
    if is_dry and module.dry_run is None:
        raise UserError(
            f"{DRY_RUN}: {verb} has none; rl and sft have",
            key=DRY_RUN,
            cause=Cause.UNSUPPORTED,
        )
    options = [option for option in options if option != DRY_RUN]
    implied = module.implied_settings
    if module.from_run is not None and Path(recipe).is_dir():
        recipe, implied = module.from_run(recipe)
    extra_options = [DRY_RUN.removeprefix("--")] if module.dry_run is not None else []
    overrides = {**implied, **_parse_settings(options, extra_options)}
    config = configuration.load_recipe(recipe, overrides, required=module.required_keys)
    access.allow_readers(config.run.readable_by)  # before anything is written, or a process started
    module.check(config)
    if is_dry and module.dry_run is not None:
        if torchrun.is_rank():
            raise UserError(
                f"{DRY_RUN} needs no trainer ranks: start it without torchrun",
                key=DRY_RUN,
                cause=Cause.CONFLICT,
            )
        module.dry_run(config)
        return 0
    if torchrun.is_rank():
        return _serve_as_rank(config, arguments)
    module.run(config)
    return 0


def _verb_help(name: str) -> str:
    """Return the help of a verb: its purpose, required settings, and own settings."""
    verb = read_verb(name, VERB_MODULES[name])
    options = "".join(
        f" [--{option} {value}]" + (" …" if option in verb.repeated_options else "")
        for option, value in verb.options.items()
    )
    settings = " [--section.key value …]" if verb.settings else ""
    required = ", ".join(verb.required_keys)
    parts = [
        f"usage: megatron-r1 {name} {' '.join(verb.arguments)}{options}{settings}",
        verb.about,
        f"The recipe has to set {required}." if required else None,
        _describe_keys(verb.settings) if verb.settings else None,
        "The other settings: megatron-r1 keys" if name in RECIPE_VERBS else None,
    ]
    return "\n\n".join(part for part in parts if part)


def _run_plain_verb(verb: str, words: list[str]) -> int:
    module = load_verb(verb, RECIPELESS_VERBS[verb])
    values, options = split_verb_words(verb, module, words)
    verb_options = read_verb_options(module, options)
    refuse_unknown_options(verb, module, options)
    overrides = {**module.implied_settings, **_parse_settings(options)}
    config = configuration.from_overrides(overrides)
    for key in overrides:
        if not any(f"{key}.".startswith(f"{setting}.") for setting in module.settings):
            settings = ", ".join(module.settings) or "no settings: write it into the recipe"
            raise UserError(
                f"--{key}: {verb} does not read it; it reads {settings}",
                key=key,
                cause=Cause.UNSUPPORTED,
            )
    module.run(config, *values, **verb_options)
    return 0


def _parse_settings(options: list[str], extra_options: Sequence[str] = ()) -> dict[str, Any]:
    return parse_overrides(options, boolean_keys(configuration.Config), extra_options)


def _describe_keys(names: Sequence[str]) -> str:
    return importlib.import_module(SELF_PARSING_VERBS["keys"]).describe_all_keys(names)


def _serve_as_rank(config: configuration.Config, arguments: list[str]) -> int:
    """Be a trainer rank until the controller ends; return the exit status. Rank 0 starts the
    controller and returns its status."""
    inherited = dict(os.environ)
    connections = trainer_connections(config.parallel, os.environ, gpu.architecture())
    os.environ.update(connections)
    if gpu.is_usable():  # before torch is imported
        os.environ.update(process_memory.trainer_allocator(os.environ))
    with without_garbage_collection():
        from megatron_r1.trainer import rank_server

    if int(os.environ["RANK"]) != 0:
        rank_server.serve_under_torchrun(config, lambda: None)
        return 0
    controller, address = torchrun.start_controller(arguments, inherited)
    rank_server.serve_under_torchrun(config, lambda: torchrun.await_listening(controller, address))
    return controller.wait()
