"""`megatron-r1 convert VERB …`: Hugging Face folders ↔ Megatron distributed checkpoints.

to-hf CHECKPOINT OUT    a Megatron checkpoint, or a run's newest, as a Hugging Face folder
from-hf HF_DIR OUT      a Hugging Face folder as a Megatron checkpoint of the weights
verify A B              two of either kind, tensor by tensor; exit status 1 if they differ

The model is never whole in memory. The same command continues a conversion that was stopped, also
by kill -9. Formats, memory and times: docs/convert.md."""

import argparse
import sys
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.convert import from_hf, to_hf, verify

EXPORT_DTYPES = ("bfloat16", "float32", "float16", "fp8")


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main = argparse.ArgumentParser(
        prog="megatron-r1 convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = main.add_subparsers(dest="verb", required=True)

    exporter = verbs.add_parser("to-hf", help=to_hf.__doc__)
    exporter.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run's folder")
    exporter.add_argument("out", type=Path, help="the folder to create")
    exporter.add_argument(
        "--dtype", choices=EXPORT_DTYPES, help="of the weights; default: the checkpoint's"
    )
    exporter.add_argument("--max-file-bytes", type=int, default=5 * 10**9, help="of a weight file")
    exporter.add_argument(
        "--no-check", action="store_true", help="do not reload and compare at the end"
    )
    exporter.add_argument(
        "--checksums",
        choices=("full", "size", "none"),
        default="full",
        help="how much of the checkpoint is compared with its manifest first; default: all bytes",
    )
    _add_config_option(exporter)

    importer = verbs.add_parser("from-hf", help=from_hf.__doc__)
    importer.add_argument("hf", type=Path, metavar="HF_DIR", help="config.json and safetensors")
    importer.add_argument("out", type=Path, help="the folder to create")
    importer.add_argument(
        "--dtype",
        choices=EXPORT_DTYPES[:3],
        help="of the weights; default: the folder's, of FP8 bfloat16",
    )
    importer.add_argument(
        "--names",
        choices=("megatron", "transformer_engine"),
        default="megatron",
        help="whose layers will load it; differs for latent attention only (default: megatron)",
    )

    verifier = verbs.add_parser("verify", help=verify.__doc__)
    verifier.add_argument("a", type=Path)
    verifier.add_argument("b", type=Path)
    _add_config_option(verifier)

    for verb in (exporter, importer, verifier):
        verb.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    return main


def _add_config_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config",
        type=Path,
        metavar="HF_DIR",
        help="folder with config.json and tokenizer, for a checkpoint that does not name it",
    )


def run(arguments: list[str]) -> int:
    """Run the command line; return 0, or 1 where the models differ.

    Raises:
        UserError: a number that is out of range, or a folder that the verb cannot read or write.
    """
    args = _make_parser().parse_args(arguments)
    args.arguments = arguments
    if args.workers < 1:
        raise UserError(
            f"--workers {args.workers} must be at least 1",
            key="--workers",
            cause=Cause.OUT_OF_RANGE,
        )
    if args.verb == "to-hf" and args.max_file_bytes < 1:
        raise UserError(
            f"--max-file-bytes {args.max_file_bytes} must be at least 1",
            key="--max-file-bytes",
            cause=Cause.OUT_OF_RANGE,
        )
    verb = {"to-hf": to_hf, "from-hf": from_hf, "verify": verify}[args.verb]
    return verb.run(args)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 the models differ, 2 a user's mistake, 130 stopped."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"megatron-r1 convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"megatron-r1 convert: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megatron-r1 convert: stopped; the same command continues", file=sys.stderr)
        return 130
