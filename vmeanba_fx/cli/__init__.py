"""The command line: ``vmeanba-fx find|score|apply|export|bench``.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted. With ``--json`` standard output is
exactly one JSON object, ``{"error": ...}`` where the command failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Sequence

from ..errors import VMeanbaError
from ..models import CheckpointError
from . import bench, commands
from .arguments import CommandError, DataSpec, ModelSpec, at_least, rank

__all__ = ["main"]

_EXPECTED = (VMeanbaError, CheckpointError, CommandError, OSError, ImportError)
_EPILOG = """\
--model   MODULE:FACTORY, path/to/file.py:FACTORY or the name of a model of vmeanba_fx.models, each with literal
          arguments if wanted: 'vmamba_tiny_s1l8(num_classes=10)', 'my_models.py:build(depth=4)'. The code of the module
          is run; the arguments are read as Python literals.
--weights a .safetensors file, or a torch file that holds tensors only (loaded without pickle code).
--data    digits | fashion-mnist:FOLDER | random:B,C,H,W | FILE.npz | FILE.safetensors
          (files hold 'images', ready for the model, and may hold 'labels').
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Wrong usage raises ``SystemExit(2)``, as argparse does."""
    args = _parser().parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # about torch's own code
            if args.json:
                # What a user's model prints must not mix with the one JSON object.
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            outcome = args.run(args)
        return _print(json.dumps(outcome.data) if args.json else outcome.text)
    except KeyboardInterrupt:
        print("vmeanba-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, _EXPECTED):
            message = f"unexpected {type(error).__name__}: {message} (--debug shows where)"
        print(f"vmeanba-fx: error: {message}", file=sys.stderr)
        if args.json:
            _print(json.dumps({"error": message, "type": type(error).__name__}))
        return 1


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader left (`| head`): nothing to complain about, but Python would, while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("vmeanba-fx")
    except importlib.metadata.PackageNotFoundError:
        return "(source checkout, not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmeanba-fx", description="Make visual state-space models fast without retraining.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"vmeanba-fx {_version()}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, *groups) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name, help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        _common(sub)
        for group in groups:
            group(sub)
        return sub

    find = command("find", commands.find, "List the scans of a model, and why some cannot be replaced.", _input)
    find.add_argument("--data", type=DataSpec.parse, required=True, help="one batch of it is used as example input")

    score = command("score", commands.score, "Score every site on calibration data, write the plan.", _input, _scoring)
    score.add_argument("--data", type=DataSpec.parse, required=True, help="calibration data")
    score.add_argument("--out", required=True, metavar="PLAN.json", help="where to write the plan")
    score.add_argument(
        "--no-held-out", action="store_true", help="do not measure sites replaced together, as --max-drop needs"
    )
    score.add_argument("--resume", metavar="FILE", help="keep the state here; a run that was killed goes on from it")
    _device(score, "auto")

    apply_ = command("apply", commands.apply, "Replace sites and write the model.", _input, _scoring)
    _source(apply_)
    _choice(apply_, required=True)
    _target(apply_)

    export = command(
        "export", commands.apply, "Write a model for deployment, unchanged (-k 0) or with a plan applied.", _input, _scoring
    )
    _source(export)
    _choice(export, required=False)
    _target(export)

    timing = command("bench", bench.bench, "Time the model against its rewritten forms, after checking their numbers.")
    bench.add_arguments(timing)
    _device(timing, "auto")
    return parser


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", type=ModelSpec.parse, required=True, help="see below")
    sub.add_argument("--weights", metavar="FILE", help="checkpoint to load into the model")
    sub.add_argument("--size", type=at_least(1), help="image size of fashion-mnist and of bench's random images")
    sub.add_argument("--seed", type=at_least(0), default=0, help="of random weights and data, and of the calibration")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _input(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--batch", type=at_least(1), default=32, help="batch size (default: 32)")


def _scoring(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--metric", choices=["accuracy", "loss", "kl"], help="default: accuracy with labels, kl without")
    sub.add_argument("--mean", choices=["direction", "all", "input"], help="variant of the mean (default: direction)")
    sub.add_argument("--batches", type=at_least(1), metavar="N", help="use the first N batches (default: all)")
    sub.add_argument("--reduce", choices=["mean", "rank"], help="the paper's mean (default), or learned rank-r scans")
    sub.add_argument("--rank", type=rank, metavar="R", help="channels per direction of --reduce rank: a number (4) or auto")
    sub.add_argument("--energy", type=float, metavar="X", help="share of a scan that --rank auto must explain (0.9)")
    sub.add_argument("--fit", choices=["scan", "outputs"], help="what rank-r fits keep: the scan (default) or the outputs")
    sub.add_argument(
        "--score", choices=["measured", "gradient", "both"], help="how to score sites (default: measured)"
    )
    sub.add_argument("--refitted", action="store_true", default=None, help="score sites as apply --refit leaves them")
    sub.add_argument("--greedy", action="store_true", default=None, help="score again after every replacement")
    sub.add_argument("--group-by", choices=["module"], help="replace all scans of a module together")
    sub.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="keep these sites (repeatable)")


def _source(sub: argparse.ArgumentParser) -> None:
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--plan", metavar="PLAN.json", help="a plan that score wrote")
    source.add_argument("--data", type=DataSpec.parse, help="calibrate on this now, where the choice needs scores")
    _device(sub, "cpu")


def _choice(sub: argparse.ArgumentParser, required: bool) -> None:
    choice = sub.add_mutually_exclusive_group(required=required)
    choice.add_argument("-k", type=at_least(0), help="replace the k sites that matter least")
    choice.add_argument(
        "--max-drop", type=float, metavar="X", help="stop before the metric falls further, on held-out images"
    )
    choice.add_argument("--speedup", type=float, metavar="X", help="be X times faster, by times measured on --device")
    choice.add_argument("--sites", action="append", metavar="GLOB", help="replace these sites (repeatable)")
    text = "fit new weights to the layers behind replaced sites, or to all later layers that write into the stream"
    sub.add_argument("--refit", choices=["sites", "all"], help=text)
    text = "with --plan: calibration data, where --refit or a plan of rank-r scans needs them"
    sub.add_argument("--calibration", type=DataSpec.parse, metavar="DATA", help=text)


def _target(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="FILE", help="where to write it: FILE.pt2, or FILE.onnx")
    text = "pt2: torch.export; aoti: AOTInductor, for C++ without Python; onnx (default: pt2)"
    sub.add_argument("--format", choices=["pt2", "aoti", "onnx"], default="pt2", help=text)


def _device(sub: argparse.ArgumentParser, default: str) -> None:
    text = f"cpu, cuda, cuda:N, or auto: a GPU if there is one (default: {default})"
    sub.add_argument("--device", default=default, help=text)
